"""What a step keeps in memory: the estimate from two images against a count; activations that are computed twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from nearfar.ssl import train
from nearfar.ssl.backbones import create
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.errors import UserError
from nearfar.ssl.learning import memory
from nearfar.ssl.learning.dino import Network, build_dino_learner
from nearfar.ssl.learning.learner import Learner
from nearfar.ssl.learning.memory import MemoryNeed
from nearfar.ssl.learning.optim import adamw
from nearfar.ssl.learning.step import Stepper
from nearfar.ssl.run import announce
from nearfar.ssl.settings.defaults import ResolvedRun, resolve
from nearfar.ssl.settings.run import Run

Make = Callable[..., Run]
VALUES = {"lr": 1e-3, "weight_decay": 0.04, "teacher_momentum": 0.9, "teacher_temp": 0.04}
VIEWS = [(2, 32), (3, 16)]
IMAGES = 6
PLAIN = ["backbone.lgp=false", "backbone.gaug=false", "backbone.prr=false"]
VIM = ["backbone.name=vim_tiny_patch8", "backbone.num_heads=null", "backbone.gaug=false", "backbone.prr=false"]
TIMM = [
    "backbone.name=timm/vit_tiny_patch16_224", "backbone.lgp=false", "backbone.gaug=false", "backbone.prr=false",
    "backbone.embed_dim=null", "backbone.depth=null", "backbone.num_heads=null",
]  # fmt: skip
NETWORKS = {"vit": PLAIN, "lgp, gaug and prr": [], "vim": VIM, "timm": TIMM}


def made(tiny: Make, name: str, *settings: str) -> Learner:
    return build_dino_learner(resolve(tiny("backbone.depth=4", *NETWORKS[name], *settings), 40)[0])


def counted(network: Network, groups: list[Tensor]) -> int:
    """Bytes of all storages that autograd saves of a pass, without those of weights: by torch's hooks alone."""
    own = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}
    saved: dict[int, Any] = {}

    def save(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage())
        return tensor

    with saved_tensors_hooks(save, lambda tensor: tensor):
        outputs = network(groups)
    assert outputs[0].requires_grad
    return sum(storage.nbytes() for address, storage in saved.items() if address not in own)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_estimate_is_within_three_percent_of_what_is_kept(tiny: Make, name: str) -> None:
    learner = made(tiny, name)
    groups = [torch.randn(number, IMAGES, 3, side, side) for number, side in VIEWS]
    need = memory.estimate(learner, VIEWS, IMAGES)
    assert need.activations == pytest.approx(counted(learner.student, groups), rel=0.03)
    weights = 4 * sum(p.numel() for p in learner.student.parameters())
    assert (need.weights, need.gradients, need.moments) == (2 * weights, weights, 2 * weights)
    assert need.logits == 4 * (5 + 3 * 2) * IMAGES * 20
    assert need.total == sum(need)


@pytest.mark.parametrize("name", NETWORKS)
def test_computing_activations_twice_needs_less(tiny: Make, name: str) -> None:
    learner = made(tiny, name)
    whole, less = (memory.estimate(learner, VIEWS, IMAGES, recompute=on).activations for on in (False, True))
    memory.recompute_activations(learner.student.backbone)
    # What is kept until the backward pass, which adds one block at a time.
    kept = counted(learner.student, [torch.randn(number, IMAGES, 3, side, side) for number, side in VIEWS])
    assert kept < less < min(kept + (whole - kept) / 2, 0.8 * whole)


def test_asking_changes_neither_statistics_nor_random_numbers(tiny: Make, same_bits: Callable[..., None]) -> None:
    learner = made(tiny, "vit", "head.batch_norm=true")
    before = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    state = torch.get_rng_state()
    memory.estimate(learner, VIEWS, IMAGES)
    assert torch.equal(torch.get_rng_state(), state)
    same_bits(before, learner.state_dict())
    assert not any(p.grad is not None for p in learner.parameters())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("parts", [1, 2])
def test_computing_activations_twice_changes_no_bit(tiny: Make, name: str, parts: int) -> None:
    """Two steps with drop-path: weights, moments, center and teacher."""
    found = []
    for recompute in (False, True):
        learner = made(tiny, name, "backbone.drop_path=0.3")
        if recompute:
            memory.recompute_activations(learner.student.backbone)
        stepper = Stepper(learner, adamw(learner.student), 3.0, accumulate_steps=parts)
        views = [torch.randn((n, 4, 3, s, s), generator=torch.Generator().manual_seed(s)) for n, s in VIEWS]
        for step in range(2):
            torch.manual_seed(step)
            assert stepper(views, VALUES).report.read().finite
        moments = [tensor for state in stepper.optimizer.state.values() for tensor in state.values()]
        found.append([*learner.state_dict().values(), *moments])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True)) and len(found[0]) > 50


def test_a_run_may_be_continued_with_activations_computed_twice(
    tiny: Make, images: ArraySource, quiet: Console, same_runs: Callable[[Path, Path, int], None]
) -> None:
    whole, mixed = tiny(folder="whole"), tiny(folder="mixed")
    train.pretrain(whole, images, console=quiet)
    steps = iter(range(1, 21))
    train.pretrain(mixed, images, should_stop=lambda: next(steps) == 8, console=quiet)
    assert train.pretrain(tiny("train.checkpoint_activations=true", folder="mixed"), images, console=quiet).finished
    same_runs(whole.path, mixed.path, 20)
    log = (whole.path / "run.log").read_text()
    assert "A step needs about" in log and "activations" in log and "for 8 images at a time" in log


def test_a_network_of_timm_without_the_switch_is_named() -> None:
    backbone = create("timm/test_vit.r160_in1k", img_size=32)
    backbone.model = torch.nn.Identity()
    with pytest.raises(UserError, match=r"test_vit.*leave out|Leave out train\.checkpoint_activations"):
        memory.recompute_activations(backbone)


def test_what_is_free_is_the_least_of_machine_and_group(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 2000 kB\nMemAvailable:    1000 kB\n")
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert list(memory._free_in_machine(meminfo)) == [1024 * 1000]
    assert list(memory._free_in_group(tmp_path)) == [2000]
    (tmp_path / "memory.max").write_text("max\n")
    assert list(memory._free_in_group(tmp_path)) == []
    assert list(memory._free_in_machine(tmp_path / "none")) == list(memory._free_in_group(tmp_path / "none")) == []


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs Linux")
def test_what_is_free_on_this_machine_is_no_more_than_psutil_finds() -> None:
    found = memory.free(torch.device("cpu"))
    assert found is not None and 2**20 < found < 1.5 * psutil.virtual_memory().available


def resolved(tiny: Make, *settings: str) -> ResolvedRun:
    return resolve(tiny("train.batch_size=64", *settings), 40, world_size=2)[0]


def test_too_little_memory_is_said_before_the_first_step(tiny: Make) -> None:
    need = MemoryNeed(2_000_000_000, 10**9, 2_000_000_000, 5_500_000_000, 10_000_000)
    run = resolved(tiny, "train.accumulate_steps=2")
    line = announce.memory_line(run, need, 20_000_000_000)
    assert "A step of each of 2 processes needs about 10.5 GB" in line
    assert "activations 5.5 GB for 16 images at a time" in line and "20.0 GB are free." in line
    assert "train.accumulate_steps" not in line and "free" not in announce.memory_line(run, need, None)
    line = announce.memory_line(run, need, 8_000_000_000)
    assert "That is more than there is. Try train.accumulate_steps=4 (now 2: 16 images at a time" in line
