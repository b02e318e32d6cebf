"""What a training step keeps in memory, estimated before the first one; and activations that are computed twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from nearfar.ssl.backbones import Backbone
from nearfar.ssl.backbones.adapter import Adapter
from nearfar.ssl.errors import UserError
from nearfar.ssl.learning.classifier import Classifier, ClassifierLearner
from nearfar.ssl.learning.learner import HeadedBackbone, Learner


class MemoryNeed(NamedTuple):
    """Bytes that one process keeps at the end of the forward pass, when a step needs most."""

    weights: int  # student and teacher, and networks that stay as they are
    gradients: int
    moments: int  # of the optimizer; two of AdamW
    activations: int  # of the student
    logits: int  # gradient of the student's, and the teacher's with its probabilities

    @property
    def total(self) -> int:
        return sum(self)

    def split(self, ranks: int) -> MemoryNeed:
        """With weights, gradients and moments spread over so many ranks (train.shard)."""
        whole = (self.weights, self.gradients, self.moments)
        weights, gradients, moments = (-(-each // ranks) for each in whole)
        return self._replace(weights=weights, gradients=gradients, moments=moments)


class Activations(NamedTuple):
    """Bytes that autograd keeps of one forward pass."""

    everything: int
    recomputed: int  # with train.checkpoint_activations: what is outside of blocks, their inputs, and one block


def recompute_activations(backbone: Backbone) -> None:
    """From now on keep only the inputs of blocks, and compute the rest again in the backward pass.

    Raises:
        UserError: a network of timm without this switch.
    """
    model: Any = backbone.model if isinstance(backbone, Adapter) else backbone
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError, NotImplementedError):
        raise UserError(
            f"{backbone.arch['name']} cannot compute its activations a second time: timm has no gradient "
            "checkpointing for it. Leave out train.checkpoint_activations; train.accumulate_steps=2 or more needs "
            "less memory too."
        ) from None


def estimate(
    learner: Learner,
    views: Sequence[tuple[int, int]],
    images: int,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    recompute: bool = False,
) -> MemoryNeed:
    """What a step keeps, from forward passes of one and of two images, which differ by what each image adds.

    Args:
        views: (number of views of an image, their side in pixels) for each size, the global ones first.
        images: of a process that are in memory at a time.
        recompute: are activations computed again in the backward pass?
    """
    student = learner.student
    count = sum(number for number, _ in views) + 3 * views[0][0]
    logits = count * images * student.outputs * next(student.parameters()).element_size()
    need = _need(student, lambda n: activations(student, views, n, autocast), images, logits, recompute)
    return need._replace(weights=need.weights + sum(map(_bytes, learner.frozen)))


def estimate_classifier(
    learner: ClassifierLearner,
    side: int,
    images: int,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    recompute: bool = False,
) -> MemoryNeed:
    """`estimate` of supervised training on one view of `side` pixels of each image; its logits are few."""
    student = learner.student

    def kept(count: int) -> Activations:
        return activations(student, [(1, side)], count, autocast, lambda groups: student(groups[0][0]))

    return _need(student, kept, images, 0, recompute)


def _need(
    student: nn.Module, kept: Callable[[int], Activations], images: int, logits: int, recompute: bool
) -> MemoryNeed:
    one, two = kept(1), kept(2)
    first, second = (pair.recomputed if recompute else pair.everything for pair in (one, two))
    weights = _bytes(student)
    return MemoryNeed(2 * weights, weights, 2 * weights, first + (images - 1) * max(0, second - first), logits)


def activations(
    network: HeadedBackbone | Classifier,
    views: Sequence[tuple[int, int]],
    images: int,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    forward: Callable[[list[Tensor]], Any] | None = None,
) -> Activations:
    """What autograd keeps of a pass of `images` (black ones) through `network`, which is left as it was.

    forward: how they pass, in groups (V, images, 3, s, s); the network itself by default.
    """
    device = next(network.parameters()).device
    groups = [torch.zeros((number, images, 3, side, side), device=device) for number, side in views]
    with unchanged(network), _Saved(network) as kept, autocast():
        (forward or network)(groups)
    return kept.counted()


@contextmanager
def unchanged(network: nn.Module) -> Iterator[None]:
    """Passes in this context leave the buffers of `network` (of batch norm) and the random numbers as they were."""
    device = next(network.parameters()).device
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for name, buffer in network.named_buffers():
            buffer.copy_(before[name])


class _Saved:
    """Within this context every storage that autograd saves is counted once, by the block that saved it."""

    def __init__(self, network: HeadedBackbone | Classifier) -> None:
        self.blocks = _blocks(network.backbone)
        self._own = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
        self._saved: dict[int, tuple[Any, int]] = {}  # address -> the storage, kept so that no other takes it; its pass
        self._pass = 0  # number of the pass through a block that runs now; 0: outside of blocks
        self._passes = 0
        self._inputs = 0

    def __enter__(self) -> _Saved:
        self._handles = [
            handle
            for block in self.blocks
            for handle in (block.register_forward_pre_hook(self._entered), block.register_forward_hook(self._left))
        ]
        self._hooks = saved_tensors_hooks(self._save, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _entered(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._passes += 1
        self._pass = self._passes
        self._inputs += inputs[0].nbytes

    def _left(self, *_: Any) -> None:
        self._pass = 0

    def _save(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in self._own and address not in self._saved:
            self._saved[address] = (storage, self._pass)
        return tensor

    def counted(self) -> Activations:
        by_pass = [0] * (self._passes + 1)
        for storage, number in self._saved.values():
            by_pass[number] += storage.nbytes()
        outside, *inside = by_pass
        return Activations(sum(by_pass), outside + self._inputs + max(inside, default=0))


def _blocks(backbone: nn.Module) -> list[nn.Module]:
    """What is computed again under train.checkpoint_activations; none is known for convolutional networks."""
    found = getattr(getattr(backbone, "model", backbone), "blocks", None)
    return list(found) if isinstance(found, nn.ModuleList | nn.Sequential) else []


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def free(device: torch.device) -> int | None:
    """Bytes that this process may still take on the device, as far as the system tells: None where it does not."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device)
    found = [*_free_in_machine(), *_free_in_group()]
    return min(found) if found else None


def _free_in_machine(meminfo: Path = Path("/proc/meminfo")) -> Iterator[int]:
    with _unreadable_is_unknown():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield 1024 * int(line.split()[1])


def _free_in_group(folder: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """By the limit of a container or a SLURM job (control groups, version 2)."""
    with _unreadable_is_unknown():
        limit = (folder / "memory.max").read_text().strip()
        if limit != "max":
            yield max(0, int(limit) - int((folder / "memory.current").read_text()))


@contextmanager
def _unreadable_is_unknown() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError):
        return
