"""Sharded training is the same training: the step, the checkpoint, and what continues it on any number of ranks."""

from __future__ import annotations

import json
import signal
import subprocess
import textwrap
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from torch import nn

from nearfar.ssl import checkpoint, config, train
from nearfar.ssl.data import open_source
from nearfar.ssl.disk.metrics import read_metrics
from nearfar.ssl.errors import UserError
from nearfar.ssl.learning.dino import build_dino_learner
from nearfar.ssl.parallel import sharding
from nearfar.ssl.settings.defaults import ResolvedRun, as_resolved
from nearfar.ssl.settings.run import Run

Make = Callable[..., Run]
Together = Callable[..., list[subprocess.Popen[str]]]
Finish = Callable[..., list[str]]


def test_what_is_not_sharded_stays_what_it_is() -> None:
    tensor = torch.randn(3, 2)
    assert not sharding.is_sharded(tensor)
    assert sharding.local(tensor) is tensor and sharding.whole(tensor) is tensor
    copy = sharding.split_like(tensor, torch.empty(3, 2))
    assert torch.equal(copy, tensor) and copy.data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize(
    ("weight", "why"), [(torch.tensor(1.0), "a single number"), (torch.ones(3, 2).T, "not contiguous")]
)
def test_a_weight_that_cannot_be_split_is_named(weight: torch.Tensor, why: str) -> None:
    network = nn.Module()
    network.layer = nn.Module()
    network.layer.scale = nn.Parameter(weight)
    with pytest.raises(UserError, match=rf"layer\.scale is {why}.*train\.shard=false"):
        sharding.shard(network, learns=True)


# A step

STEPS = """
    import json, sys
    import torch
    from nearfar.ssl import config
    from nearfar.ssl.parallel import distributed
    from nearfar.ssl.run import resume
    from nearfar.ssl.settings.defaults import resolve
    from nearfar.ssl.learning.dino import build_dino_learner
    from nearfar.ssl.learning.optim import optimizer_of
    from nearfar.ssl.parallel.sharding import is_sharded, local, shard
    from nearfar.ssl.learning.step import Stepper

    torch.set_num_threads(1)
    VALUES = {"lr": 1e-3, "weight_decay": 0.04, "teacher_momentum": 0.9, "teacher_temp": 0.04}
    world = distributed.from_environment()
    results = []
    with distributed.joined(world):
        for settings, dtype in json.loads(sys.argv[1]):
            numbers = torch.float64 if dtype == "float64" else torch.float32
            for sharded in (False, True):
                run = resolve(config.load(None, settings), 2000, world_size=world.size)[0]
                learner = build_dino_learner(run).to(numbers)
                if sharded:
                    shard(learner.student, learns=True)
                    shard(learner.teacher, learns=False)
                    for p in learner.parameters():
                        assert is_sharded(p) and local(p).numel() <= -(-len(p) // world.size) * (p.numel() // len(p))
                optimizer = optimizer_of(run.optim, learner.student)
                stepper = Stepper(learner, optimizer, 0.02, accumulate_steps=run.train.accumulate_steps)
                if dtype == "bfloat16":
                    stepper.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
                reports, before = [], None
                for step in range(5):
                    generator = torch.Generator().manual_seed(step)
                    shapes = [(2, 8, 3, 16, 16), (2, 8, 3, 8, 8)]
                    groups = [torch.randn(shape, generator=generator, dtype=numbers) for shape in shapes]
                    mine = slice(8 // world.size * world.rank, 8 // world.size * (world.rank + 1))
                    if step == 3:  # one rank alone meets a number that is not finite: nothing changes from here on
                        before = {name: t.clone() for name, t in resume.contents(learner, optimizer)}
                        groups[0][:, 0] = float("nan")
                    torch.manual_seed(step)
                    report = stepper(
                        [group[:, mine] for group in groups], VALUES, freeze_last_layer=step == 0,
                        votes=lambda: (float(world.rank), 2.0),
                    ).report.read()
                    reports.append([report.loss, report.grad_norm, report.finite, report.votes])
                after = dict(resume.contents(learner, optimizer))
                assert before.keys() == after.keys()
                # Running statistics belong to the forward pass (step.py).
                names = [name for name in before if "running_" not in name and "num_batches" not in name]
                assert [name for name in names if not torch.equal(before[name], after[name])] == []
                results.append([reports[:3], {name: after[name].double().flatten().tolist() for name in names}])
                assert [each[2] for each in reports] == [True, True, True, False, False]
    if world.first:
        json.dump(results, open(sys.argv[2], "w"))
"""


def test_a_sharded_step_is_the_unsharded_one_up_to_rounding(
    tmp_path: Path, tiny_settings: list[str], together: Together, finish: Finish
) -> None:
    """Three steps, the first with frozen prototypes, and two that are not finite. Loss, norm, votes, and every weight,
    moment and the center.
    """
    script, file = tmp_path / "steps.py", tmp_path / "out.json"
    script.write_text(textwrap.dedent(STEPS))
    small = [*tiny_settings, "backbone.name=vit_tiny_patch4", "backbone.drop_path=0"]
    small += ["views.global_crops_size=16", "views.local_crops_size=8", "train.batch_size=8"]
    vim = ["backbone.name=vim_tiny_patch4", "backbone.gaug=false", "backbone.prr=false", "backbone.num_heads=null"]
    cases = [
        ([*small, "loss.centering=sinkhorn_knopp", "loss.koleo_weight=0.1", "loss.coding_rate_weight=0.2"], "float64"),
        ([*small, "head.batch_norm=false", "train.accumulate_steps=2"], "float64"),
        ([*small, *vim, "head.batch_norm=false"], "float64"),
        ([*small, "backbone.lgp=true", "head.batch_norm=false", "optim.name=muon"], "float64"),
        ([*small, "head.batch_norm=false"], "float32"),
        ([*small, "head.batch_norm=false"], "bfloat16"),
    ]
    close = {  # of losses and norms; of weights, whose updates by AdamW have the size of the rate and a sign
        "float64": ({"rtol": 1e-9}, {"rtol": 1e-7, "atol": 1e-9}),
        "float32": ({"rtol": 1e-4}, {"rtol": 2e-3, "atol": 2e-5}),
        "bfloat16": ({"rtol": 2e-2}, {"rtol": 0, "atol": 6e-3}),
    }
    finish(together(2, str(script), json.dumps(cases), str(file)))
    results = json.loads(file.read_text())
    for (_, dtype), whole, sharded in zip(cases, results[::2], results[1::2], strict=True):
        of_reports, of_weights = close[dtype]
        for (loss, norm, _, votes), (expected, its_norm, _, its_votes) in zip(sharded[0], whole[0], strict=True):
            np.testing.assert_allclose([loss, norm], [expected, its_norm], **of_reports)
            assert votes == its_votes == [0.5, 2.0]
        assert sharded[1].keys() == whole[1].keys() and any(name.startswith("optimizer/exp_avg/") for name in whole[1])
        for name, values in sharded[1].items():
            np.testing.assert_allclose(values, whole[1][name], **of_weights, err_msg=name)


# A run


@pytest.fixture
def recipe(tiny: Make, tmp_path: Path) -> Callable[..., Path]:
    """A tiny sharded run over images on disk, as a file of settings; returns its path."""
    images = tmp_path / "images.npz"
    np.savez(images, images=np.random.default_rng(0).integers(0, 256, (48, 32, 32, 3), np.uint8))

    def make(*settings: str, folder: str = "runs") -> Path:
        run = tiny(f"data.path={images}", "train.batch_size=12", "train.shard=true", *settings, folder=folder)
        file = tmp_path / f"{folder}.yaml"
        file.write_text(yaml.safe_dump(yaml.safe_load(config.to_yaml(run))))
        return file

    return make


RUN = """
    import sys
    from pathlib import Path
    from nearfar.ssl import config, train
    from nearfar.ssl.parallel import distributed
    from nearfar.ssl.data import open_source

    def probe(backbone, _):
        assert not backbone.training
        return {"knn": float(sum(p.double().abs().sum() for p in backbone.parameters()))}

    run, world, polls = config.load(Path(sys.argv[1])), distributed.from_environment(), []
    last = int(sys.argv[2])
    outcome = train.pretrain(
        run, open_source(run.data.path), train.Observers(probe=probe if world.first else None), world=world,
        should_stop=lambda: polls.append(0) or (world.rank == world.size - 1 and len(polls) == last),
    )
    print(outcome.step)
"""


@pytest.fixture
def trained(tmp_path: Path, together: Together, finish: Finish) -> Callable[..., list[int]]:
    """Runs a recipe on so many ranks; its last rank asks for a stop in its `last` step. Returns where they ended.

    Once, on a loaded machine, SIGABRT ended the first rank of two within its first seconds, and 80 more starts under
    load did not show why. A run that a signal ended is started again, once, and all that it said is in the warnings.
    """
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(RUN))

    def run(size: int, file: Path, last: int = 0) -> list[int]:
        command = (str(script), str(file), str(last))
        processes = together(size, *command)
        outputs = [process.communicate(timeout=240) for process in processes]
        if any(process.returncode < 0 for process in processes):
            warnings.warn(f"{[process.returncode for process in processes]} {outputs}", stacklevel=2)
            return [int(out.split()[-1]) for out in finish(together(size, *command))]
        assert [process.returncode for process in processes] == [0] * size, outputs
        return [int(out.split()[-1]) for out, _ in outputs]

    return run


def ended(file: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    folder = config.load(file).path
    saved = checkpoint.latest(folder / "checkpoints")
    assert saved is not None
    assert checkpoint.load(folder).state_dict().keys() == checkpoint.load(saved.path).state_dict().keys()
    return saved.tensors, read_metrics(folder / "metrics.jsonl")


def test_stopped_killed_and_continued_on_as_many_ranks_it_ends_with_the_same_bits(
    recipe: Callable[..., Path],
    trained: Callable[..., list[int]],
    same_runs: Callable[[Path, Path, int], None],
    together: Together,
) -> None:
    """And with the scores of the uninterrupted run; its checkpoint has the names and shapes of an unsharded one's."""
    whole, parts = recipe(folder="whole"), recipe("train.save_every_steps=3", folder="parts")
    assert trained(2, whole) == [16, 16]
    assert trained(2, parts, 5) == [5, 5]
    kill(parts, 9, together)
    assert trained(2, parts) == [16, 16]
    same_runs(config.load(whole).path, config.load(parts).path, 16)
    (sharded, metrics), (_, metrics_of_parts) = ended(whole), ended(parts)
    scores = [[line["knn"] for line in lines if "knn" in line] for lines in (metrics, metrics_of_parts)]
    assert scores[0] == scores[1] and len(scores[0]) == 4

    run = as_resolved(ResolvedRun, config.load(config.load(whole).path / "config.yaml"))
    learner = build_dino_learner(run)
    shapes = {f"learner/{name}": tensor.shape for name, tensor in learner.state_dict().items()}
    for name, parameter in learner.student.named_parameters():
        shapes |= {f"optimizer/{key}/{name}": parameter.shape for key in ("exp_avg", "exp_avg_sq")}
        shapes[f"optimizer/step/{name}"] = torch.Size()
    assert {name: tensor.shape for name, tensor in sharded.items()} == shapes


def kill(file: Path, lines: int, together: Together) -> None:
    """Continue it on two ranks, and kill both at once as soon as there are so many lines of metrics."""
    processes = together(2, "-m", "nearfar.launch.local.rank", str(file))
    metrics, until = config.load(file).path / "metrics.jsonl", time.monotonic() + 120
    while metrics.read_bytes().count(b"\n") < lines:
        assert time.monotonic() < until and all(process.poll() is None for process in processes)
        time.sleep(0.005)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate()


def losses(metrics: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in metrics if "loss" in line]


def test_one_rank_continues_what_two_have_begun(
    recipe: Callable[..., Path], trained: Callable[..., list[int]], quiet: Console
) -> None:
    """An epoch, stopped after its second step: the losses of one rank alone, whose sums are rounded otherwise."""
    settings = ("train.epochs=1", "backbone.drop_path=0", "eval.knn_every_epochs=0", "head.batch_norm=false")
    whole, parts = recipe(*settings, folder="whole"), recipe(*settings, folder="parts")
    assert trained(2, parts, 2) == [2, 2]
    for file in (parts, whole):
        run = config.load(file)
        assert train.pretrain(run, open_source(run.data.path), console=quiet).finished
    log = (config.load(parts).path / "run.log").read_text()
    assert "each of 2 ranks holds" in log and "Saved by 2 ranks, continued by 1" in log
    (weights, metrics), (weights_of_parts, metrics_of_parts) = ended(whole), ended(parts)
    assert len(losses(metrics)) == 4 and losses(metrics_of_parts) == pytest.approx(losses(metrics), rel=2e-3)
    assert weights.keys() == weights_of_parts.keys() and any(name.startswith("optimizer/") for name in weights)
    for name, tensor in weights.items():
        torch.testing.assert_close(weights_of_parts[name], tensor, rtol=2e-2, atol=2e-4, msg=name)


@pytest.mark.long
def test_any_number_of_ranks_continues_it_sharded_or_not(
    recipe: Callable[..., Path], trained: Callable[..., list[int]]
) -> None:
    """Two ranks, one (which holds all), two, and three, by which no weight here divides: the losses of the whole run,
    whose sums are rounded otherwise.
    """
    settings = ("backbone.drop_path=0", "eval.knn_every_epochs=0", "head.batch_norm=false")
    whole, parts = recipe(*settings, folder="whole"), recipe(*settings, folder="parts")
    trained(2, whole)
    for ranks, steps in ((2, 4), (1, 4), (2, 4), (3, 0)):
        trained(ranks, parts, steps)
    log = (config.load(parts).path / "run.log").read_text()
    for before, after in ((2, 1), (1, 2), (2, 3)):
        assert f"Saved by {before} ranks, continued by {after}" in log
    assert "this process is alone" in log and "each of 3 ranks holds" in log
    (_, metrics), (_, metrics_of_parts) = ended(whole), ended(parts)
    assert losses(metrics)[:4] == losses(metrics_of_parts)[:4] and len(losses(metrics_of_parts)) == 16
    assert losses(metrics_of_parts) == pytest.approx(losses(metrics), rel=2e-3)
