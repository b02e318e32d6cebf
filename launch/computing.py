"""Where scores and features are computed: on which device, in which precision, and by which ranks of a job."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import timedelta

from nearfar.eval.features import sharing
from nearfar.eval.features.extraction import compute_share
from nearfar.eval.features.images import Decoding
from nearfar.ssl.backbones import Backbone
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.parallel.device import Compute, choose, keep_freed_memory
from nearfar.ssl.parallel.distributed import from_environment, joined

# The other ranks wait while the first one trains probes; if it dies, they notice by its heartbeat.
PATIENCE = timedelta(days=2)


def compute_for(backbone: Backbone, device: str, setting: str = "--device ") -> Compute:
    """The device of `auto`, `cpu` or `cuda`, and whether frozen features are read in bf16 there, as training would.

    A process that computes on a CPU keeps the memory of a batch for the next one from here on. setting: what the user
    wrote before the device's name, for messages. Raises UserError where there is none.
    """
    compute = choose(device, "auto", backbone.embed_dim, setting)
    if compute.device.type == "cpu":
        keep_freed_memory()
    return compute


def by_all_ranks(
    work: Callable[[Decoding], None],
    backbones: Callable[[], Iterable[Backbone]],
    sources: Iterable[Source],
    decoding: Decoding,
    device: str = "auto",
) -> None:
    """Do `work`; under torchrun or srun with several processes the first one does it, and the others compute their
    share of its extractions, of these backbones (a function, called when each rank knows its GPU) and images.

    device: auto, cpu or cuda, as the user chose.

    Raises:
        UserError: raised by the work, in every rank.
        PeerError: another rank ended.
    """
    world = from_environment()
    with joined(world, PATIENCE, device=device):
        if world.first:
            shared = world.size > 1
            work(replace(decoding, shared=shared))
            if shared:
                sharing.dismiss()
        else:
            compute_share(backbones(), sources, decoding)
