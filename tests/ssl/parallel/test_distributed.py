"""Several processes are one run: same loss as one process, same bits after a stop, and nobody waits for the dead."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from PIL import Image

from nearfar.ssl import checkpoint, config
from nearfar.ssl.backbones import create
from nearfar.ssl.data.views import epoch_order
from nearfar.ssl.disk.metrics import read_metrics
from nearfar.ssl.errors import UserError
from nearfar.ssl.parallel import distributed
from nearfar.ssl.parallel.distributed import Ranks, available_cores, from_environment
from nearfar.ssl.settings.run import Run

Make = Callable[..., Run]
Together = Callable[..., list[subprocess.Popen[str]]]
Finish = Callable[..., list[str]]


# Who am I


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, Ranks()),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Ranks(3, 8, 1, available_cores())),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "10000"}, Ranks(0, 2, 0, 1)),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}, Ranks()),  # in the batch script, outside srun
        (
            {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_CPUS_PER_TASK": "6"}
            | {"MASTER_ADDR": "node1", "MASTER_PORT": "2345"},
            Ranks(2, 4, 0, 6),
        ),
    ],
)
def test_the_environment_says_which_rank_this_is(env: dict[str, str], expected: Ranks) -> None:
    assert from_environment(env) == expected


def test_srun_without_an_address_meets_on_the_first_node_of_the_step(tmp_path: Path, monkeypatch: Any) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\ntest \"$*\" = 'show hostnames gpu[07-08]' && printf 'gpu07\\ngpu08\\n'\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    env = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "gpu[07-08]"}
    first, second = (from_environment(env | {"SLURM_JOB_ID": "11", "SLURM_STEP_ID": step}) for step in "01")
    assert first.init_method.startswith("tcp://gpu07:") and second.init_method.startswith("tcp://gpu07:")
    assert first.init_method != second.init_method


@pytest.mark.parametrize("init_method", ["tcp://node1.invalid:29500", "env://"])
def test_a_first_machine_whose_name_leads_nowhere_is_named(init_method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would ask for ten minutes."""
    monkeypatch.setenv("MASTER_ADDR", "node1.invalid")
    monkeypatch.setattr(distributed, "NAME_TIMEOUT", 0.0)
    ranks = Ranks(1, 2, init_method=init_method)
    with (
        pytest.raises(UserError, match=r"'node1\.invalid' leads nowhere .* Set MASTER_ADDR"),
        distributed.joined(ranks),
    ):
        raise AssertionError("it met nobody")


def test_alone_every_sum_is_ones_own() -> None:
    x = torch.randn(3, 4)
    assert torch.equal(distributed.all_sum_(x.clone()), x) and torch.equal(distributed.all_mean_(x.clone()), x)
    assert torch.equal(distributed.all_logsumexp(x), x.logsumexp(0, keepdim=True))
    assert (
        distributed.from_first(lambda: 5) == 5
        and distributed.gathered(["a", "b"]) == ["a", "b"]
        and distributed.count() == 1
    )


WORDS = """
    import json
    from nearfar.ssl.parallel import distributed

    world = distributed.from_environment()
    with distributed.joined(world):
        texts = ["\\udcff \\x1b", "ä" * 999, "x" * world.rank][: world.rank + 1]
        first = distributed.from_first(lambda: {"rank": world.rank, "third": 1 / 3, "none": None})
        print(json.dumps([first, distributed.gathered(texts), distributed.gathered([])]))
"""


def test_words_reach_every_rank_as_they_were(tmp_path: Path, together: Together, finish: Finish) -> None:
    script = tmp_path / "words.py"
    script.write_text(textwrap.dedent(WORDS))
    odd, long = "\udcff \x1b", "ä" * 999
    expected = [{"rank": 0, "third": 1 / 3, "none": None}, [odd, odd, long, odd, long, "xx"], []]
    assert [json.loads(message) for message in finish(together(3, str(script)))] == [expected] * 3


# One loss

LEARNERS = """
    import json, sys
    import torch
    from nearfar.ssl import config
    from nearfar.ssl.parallel import distributed
    from nearfar.ssl.settings.defaults import resolve
    from nearfar.ssl.parallel.gradients import GradientMean
    from nearfar.ssl.learning.dino import build_block_masks
    from nearfar.ssl.training.choose_learner import learner_of

    torch.set_num_threads(1)
    world = distributed.from_environment()
    results = []
    with distributed.joined(world):
        for settings in json.loads(sys.argv[1]):
            run = resolve(config.load(None, settings), 2000, world_size=world.size)[0]
            learner = learner_of(run).double()
            gram = run.loss.gram_weight > 0
            hidden = build_block_masks(run, 4, world.rank)
            optimizer = torch.optim.SGD(learner.student.parameters(), lr=0.1)  # Adam scales up rounding
            gradients = GradientMean(learner.student.parameters(), 1000)  # in many buckets
            assert len(gradients.buckets) > 5
            losses = []
            for step in range(3):
                generator = torch.Generator().manual_seed(step)
                shapes = [(2, 8, 3, 16, 16), (2, 8, 3, 8, 8)]
                groups = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
                mine = slice(8 // world.size * world.rank, 8 // world.size * (world.rank + 1))
                masks = hidden.of_step(step, torch.device("cpu"))[0] if hidden else None
                if step == 1 and gram:
                    learner.take_anchor()
                out = learner([group[:, mine] for group in groups], 0.04, masks, float(gram))
                gradients.begin()
                out.loss.backward()
                (loss,) = gradients.finish(out.loss.detach()[None])
                optimizer.step()
                optimizer.zero_grad()
                learner.after_step(0.9)
                losses.append(float(loss))
            state = {k: v.double().flatten().tolist() for k, v in learner.state_dict().items()}
            results.append([losses, state])
    if world.first:
        json.dump(results, open(sys.argv[2], "w"))
"""


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.long)])
def test_ranks_with_a_slice_each_agree_with_one_rank_in_float64(
    tmp_path: Path, tiny_settings: list[str], together: Together, finish: Finish, ranks: int
) -> None:
    """Loss of three steps, then every weight, the center and the running statistics of the head's batch norm."""
    script = tmp_path / "learners.py"
    script.write_text(textwrap.dedent(LEARNERS))
    small = [*tiny_settings, "backbone.name=vit_tiny_patch4", "backbone.drop_path=0"]
    small += ["views.global_crops_size=16", "views.local_crops_size=8"]
    teacher = tmp_path / "teacher.safetensors"
    checkpoint.export(teacher, create("vit_tiny_patch8", img_size=16, embed_dim=12, depth=1, num_heads=2), {"step": 1})
    cases = [
        [*small, "loss.centering=sinkhorn_knopp", "loss.koleo_weight=0.1", "loss.coding_rate_weight=0.2"],
        [*small, "head.batch_norm=false"],
        small,
        [*small, "loss.ibot_weight=1"],
        [*small, "loss.recipe=dinov3"],
        [*small, f"distill.teacher={teacher}"],
    ]
    one, many = (tmp_path / f"{size}.json" for size in (1, ranks))
    for size, file in ((1, one), (ranks, many)):
        finish(together(size, str(script), json.dumps(cases), str(file)))
    for (losses, state), (expected, weights) in zip(
        json.loads(many.read_text()), json.loads(one.read_text()), strict=True
    ):
        np.testing.assert_allclose(losses, expected, rtol=1e-9)
        assert len(set(losses)) == 3 and state.keys() == weights.keys()
        for name, values in state.items():
            np.testing.assert_allclose(values, weights[name], rtol=1e-6, atol=1e-9, err_msg=name)


# One run


@pytest.fixture
def recipe(tiny: Make, tmp_path: Path) -> Callable[..., Path]:
    """A tiny run over images on disk, as a file of settings; returns its path."""
    images = tmp_path / "images.npz"
    np.savez(images, images=np.random.default_rng(0).integers(0, 256, (48, 32, 32, 3), np.uint8))

    def make(*settings: str, folder: str = "runs") -> Path:
        run = tiny(
            f"data.path={images}", "train.batch_size=12", "loss.centering=sinkhorn_knopp", *settings, folder=folder
        )
        file = tmp_path / f"{folder}.yaml"
        tree = yaml.safe_load(config.to_yaml(run))
        file.write_text(yaml.safe_dump(tree))
        return file

    return make


@pytest.fixture
def same(same_runs: Callable[[Path, Path, int], None]) -> Callable[[Path, Path], None]:
    """Asserts that the runs of two recipes ended with the same bits and the same metrics."""
    return lambda one, two: same_runs(config.load(one).path, config.load(two).path, 16)


def wait_for_lines(file: Path, lines: int, processes: list[subprocess.Popen[str]]) -> None:
    metrics, until = config.load(file).path / "metrics.jsonl", time.monotonic() + 60
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
        assert time.monotonic() < until and all(process.poll() is None for process in processes)
        time.sleep(0.005)


RANK = ("-m", "nearfar.launch.local.rank")
PRETRAIN = (sys.executable, "-m", "nearfar.launch.cli", "pretrain")


ALL_PARTS = ["loss.recipe=dinov3", "loss.gram_start_epoch=1", "optim.schedule=wsd"]


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        pytest.param(2, [], id="2"),
        pytest.param(3, [], id="3", marks=pytest.mark.long),
        pytest.param(2, ALL_PARTS, id="2 dinov3", marks=pytest.mark.long),
    ],
)
def test_stopped_on_one_rank_and_continued_ends_with_the_same_bits(
    recipe: Callable[..., Path],
    size: int,
    settings: list[str],
    same: Callable[[Path, Path], None],
    together: Together,
    finish: Finish,
) -> None:
    """SIGTERM reaches one rank only, and not the first; all save and leave. `nearfar pretrain`, which starts the ranks
    itself, continues, and the last checkpoint is that of ranks started by hand and never stopped.
    """
    whole, parts = recipe(*settings, folder="whole"), recipe(*settings, folder="parts")
    finish(together(size, *RANK, str(whole)))
    processes = together(size, *RANK, str(parts))
    wait_for_lines(parts, 5, processes)
    processes[-1].send_signal(signal.SIGTERM)
    finish(processes)
    stopped = checkpoint.latest(config.load(parts).path / "checkpoints")
    assert stopped is not None and 5 <= stopped.state["step"] < 16 and stopped.state["world_size"] == size
    subprocess.run([*PRETRAIN, str(parts), f"train.world_size={size}"], check=True, capture_output=True, timeout=240)
    same(whole, parts)


LATE = """
    import sys
    from pathlib import Path
    import numpy as np
    from nearfar.ssl import config, train
    from nearfar.ssl.parallel import distributed
    from nearfar.ssl.data.sources.base import ArraySource

    world, polls, set_up = distributed.from_environment(), [], train.set_up

    def behind(*parts):
        training = set_up(*parts)
        training.steps_behind = 1
        return training

    def stop():
        polls.append(0)
        return world.rank == 1 and len(polls) == 3

    train.set_up = behind
    images = ArraySource(np.random.default_rng(0).integers(0, 256, (48, 32, 32, 3), np.uint8))
    print(train.pretrain(config.load(Path(sys.argv[1])), images, should_stop=stop, world=world).step)
"""


def test_ranks_that_hear_of_a_stop_a_step_late_stop_together(
    recipe: Callable[..., Path], tmp_path: Path, together: Together, finish: Finish
) -> None:
    """As on GPUs. The first rank saves after every step, for which it looks at steps that the others have not."""
    script = tmp_path / "late.py"
    script.write_text(textwrap.dedent(LATE))
    file = recipe("train.log_every_steps=100", "train.save_every_minutes=1e-9", "eval.knn_every_epochs=0")
    assert [message.split()[-1] for message in finish(together(2, str(script), str(file)))] == ["4", "4"]
    saved = checkpoint.latest(config.load(file).path / "checkpoints")
    assert saved is not None and saved.state["step"] == 4


def test_another_number_of_ranks_continues_and_says_so(
    recipe: Callable[..., Path], together: Together, finish: Finish
) -> None:
    file = recipe()
    processes = together(2, *RANK, str(file))
    wait_for_lines(file, 3, processes)
    processes[0].send_signal(signal.SIGTERM)
    finish(processes)
    finish(together(1, *RANK, str(file)))
    log = (config.load(file).path / "run.log").read_text()
    assert "Saved by 2 ranks, continued by 1" in log
    assert len(read_metrics(config.load(file).path / "metrics.jsonl")) == 16


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_killed_rank_ends_the_other_at_once(recipe: Callable[..., Path], victim: int, together: Together) -> None:
    file = recipe("train.epochs=4000")
    processes = together(2, *RANK, str(file))
    wait_for_lines(file, 3, processes)
    processes[victim].kill()
    _, output = processes[1 - victim].communicate(timeout=60)
    assert processes[1 - victim].returncode == 3, output
    assert "Traceback" not in output
    processes[victim].communicate()


def test_a_mistake_on_one_rank_is_told_by_the_first(
    recipe: Callable[..., Path], tmp_path: Path, together: Together
) -> None:
    """Rank 1 alone meets too many bad images: its slices of the first three batches are unreadable."""
    file = recipe("data.max_bad_fraction=0")
    folder = tmp_path / "files"
    folder.mkdir()
    second = set(epoch_order(0, 0, 48)[:36].reshape(3, 2, 6)[:, 1].flat)
    for i in range(48):
        if i in second:
            (folder / f"{i:02d}.png").write_bytes(b"")
        else:
            Image.new("RGB", (32, 32), (i, 2 * i, 3 * i)).save(folder / f"{i:02d}.png")
    tree = yaml.safe_load(file.read_text())
    tree["data"]["path"] = str(folder)
    file.write_text(yaml.safe_dump(tree))
    processes = together(2, *RANK, str(file))
    outputs = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], outputs
    assert "Rank 1 on" in outputs[0] and "cannot be used" in outputs[0] and "Traceback" not in outputs[0]


def test_ranks_that_nearfar_pretrain_starts_hear_this_machine_alone_and_a_killed_one_is_named(
    recipe: Callable[..., Path],
) -> None:
    endless = recipe("train.epochs=4000", folder="endless")
    process = subprocess.Popen(
        [*PRETRAIN, str(endless), "train.world_size=2"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wait_for_lines(endless, 3, [process])
    (child,) = psutil.Process(process.pid).children()
    listening = [
        connection.laddr.ip
        for each in (psutil.Process(process.pid), child)
        for connection in each.net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening and set(listening) == {"127.0.0.1"}  # no other machine may reach the ranks
    child.kill()
    _, output = process.communicate(timeout=60)
    assert process.returncode == 3 and "rank 1 was killed by SIGKILL" in " ".join(output.split()), output


def test_a_first_rank_that_is_killed_leaves_neither_ranks_nor_files(
    recipe: Callable[..., Path], tmp_path: Path
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    command = [*PRETRAIN, str(recipe("train.epochs=4000")), "train.world_size=2"]
    environment = os.environ | {"TMPDIR": str(temporary)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 300
    while not (children := psutil.Process(process.pid).children()):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.01)
    process.kill()  # the other rank is still importing
    process.wait()
    assert psutil.wait_procs(children, timeout=120)[1] == []
    # A killed process leaves what others made when they were imported: torch 2.8 a folder for modules that it
    # generates, and wandb two, which timm imports where it is installed.
    theirs = [file for file in temporary.iterdir() if (file / "_remote_module_non_scriptable.py").exists()]
    theirs += [file for file in temporary.iterdir() if file.name.endswith(("wandb-media", "wandb-artifacts"))]
    assert set(temporary.iterdir()) - set(theirs) == set()
