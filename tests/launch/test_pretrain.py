"""Who starts the processes of a run, and which images the online k-NN looks at."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from io import StringIO
from pathlib import Path

import psutil
import pytest
import torch
from rich.console import Console

from nearfar.launch import pretrain
from nearfar.launch.local import processes
from nearfar.ssl import config
from nearfar.ssl.errors import EXIT_PEER, UserError
from nearfar.ssl.parallel import distributed
from nearfar.ssl.parallel.distributed import Ranks
from nearfar.ssl.settings.run import Run


def make(folder: Path, *settings: str) -> Run:
    return config.load(None, ["name=r", f"folder={folder}", "train.device=cpu", "train.batch_size=64", *settings])


@pytest.mark.parametrize(
    ("settings", "cores", "size"),
    [([], 1, 1), ([], 2, 2), ([], 64, 4), (["train.batch_size=30"], 8, 1), (["train.world_size=4"], 2, 4)],
)
def test_processes_follow_the_cores_and_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str], cores: int, size: int
) -> None:
    monkeypatch.setattr(processes, "available_cores", lambda: cores)
    assert processes.ranks_here(make(tmp_path, *settings)).value == size


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        (["train.device=auto"], 2, "one for each of 2 GPUs"),
        (["train.device=cuda"], 2, "one for each of 2 GPUs"),
        (["train.device=cpu"], 4, "4 cores"),
        (["train.device=auto", "train.world_size=1"], 1, ""),
    ],
)
def test_pretrain_starts_a_process_for_each_visible_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str], size: int, message: str
) -> None:
    started: list[dict[str, object]] = []

    class Child:
        def __init__(self, run: Run, environment: dict[str, object]) -> None:
            started.append(environment)

        def poll(self) -> int:
            return 0

        def wait(self, timeout: float | None = None) -> int:
            return 0

    worlds: list[Ranks] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(processes, "available_cores", lambda: 4)
    monkeypatch.setattr(processes, "_start", Child)
    monkeypatch.setattr(pretrain, "pretrain_rank", lambda run, console, world: worlds.append(world))
    output = StringIO()
    pretrain.run_pretraining(make(tmp_path, *settings), Console(file=output, width=200))
    assert [(world.rank, world.size, world.cores) for world in worlds] == [(0, size, 4 // size if size > 1 else 0)]
    assert [(each["LOCAL_RANK"], each["WORLD_SIZE"]) for each in started] == [(r, size) for r in range(1, size)]
    assert message in output.getvalue() and ("derived" in output.getvalue()) == bool(message)


def test_more_processes_than_gpus_or_none_at_all_are_told_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    nowhere = ["train.device=auto", "data.path=/nowhere"]
    with pytest.raises(UserError, match=r"train.world_size=4, but 2 GPUs are visible"):
        pretrain.run_pretraining(make(tmp_path, *nowhere, "train.world_size=4"), Console(file=StringIO()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees no CUDA device here"):
        pretrain.run_pretraining(make(tmp_path, *nowhere, "train.device=cuda"), Console(file=StringIO()))


def test_a_dead_process_is_reported_where_the_first_one_would_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[str] = []
    monkeypatch.setattr(processes, "NOTICED_WITHIN", 0.01)
    monkeypatch.setattr(distributed, "lost", lambda message: lost.append(message) or True)
    fine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    dead = subprocess.Popen([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    try:
        processes._watch({1: fine, 2: dead}, threading.Event())
    finally:
        fine.kill()
        fine.wait()
    assert len(lost) == 1 and "Lost rank 2 of this machine: rank 2 was killed by SIGKILL" in lost[0]


def test_a_process_that_dies_before_the_ranks_meet_is_named_at_once(tmp_path: Path) -> None:
    """The first rank waits for it where no thread of Python runs; its children end with it."""
    code = """
        import os, sys
        from nearfar.launch.local import processes
        from nearfar.ssl.parallel import distributed
        from nearfar.ssl import config

        start = processes.subprocess.Popen
        dead = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
        processes.subprocess.Popen = lambda command, **options: start(dead, **options)
        with processes.started(config.load(None, ["name=r"]), 3) as world, distributed.joined(world):
            print("met")
    """
    script = tmp_path / "start.py"
    script.write_text(textwrap.dedent(code))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == EXIT_PEER and done.stdout == ""
    assert "Lost rank 1 of this machine: rank 1 was killed by SIGKILL" in done.stderr


def test_a_run_goes_on_with_as_many_processes_as_it_was_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = make(tmp_path, "train.world_size=2")
    begun.path.mkdir(parents=True)
    (begun.path / "config.yaml").write_text(config.to_yaml(begun))
    (begun.path / "teacher.safetensors").touch()
    monkeypatch.setattr(processes, "available_cores", lambda: 64)
    assert processes.ranks_here(make(tmp_path)) == ("train.world_size", 2, "as the run was begun")


@pytest.mark.parametrize("size", [1, 2])
def test_under_torchrun_no_further_process_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    seen: list[Ranks] = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(size))
    monkeypatch.setattr(processes, "started", lambda *_: pytest.fail("torchrun starts what is to run"))
    monkeypatch.setattr(pretrain, "pretrain_rank", lambda run, console, world: seen.append(world))
    pretrain.run_pretraining(make(tmp_path), Console(file=StringIO()))
    assert [world.size for world in seen] == [size]


def test_derived_ranks_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, worlds = StringIO(), []
    monkeypatch.setattr(processes, "available_cores", lambda: 1)
    monkeypatch.setattr(pretrain, "pretrain_rank", lambda run, console, world: worlds.append(world))
    pretrain.run_pretraining(make(tmp_path), Console(file=output, width=200))
    assert "derived train.world_size = 1  (1 core," in output.getvalue()
    pretrain.run_pretraining(make(tmp_path, "train.world_size=1"), Console(file=output, width=200))
    assert output.getvalue().count("derived") == 1 and len(worlds) == 2


def test_a_rank_ends_when_its_starter_is_gone() -> None:
    watched = "import os; from nearfar.launch.local.rank import end_with; end_with(os.getppid())"
    child = f"{watched}; import time; print(1, flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; c = subprocess.Popen([sys.executable, '-c', {child!r}]); print(c.pid); c.wait()"
    with subprocess.Popen([sys.executable, "-uc", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        orphan = psutil.Process(int(process.stdout.readline()))
        assert process.stdout.readline() == "1\n"  # the child's: it watches now
        process.kill()
    assert orphan not in psutil.wait_procs([orphan], timeout=20)[1]


def test_a_rank_whose_starter_died_before_it_ran_ends_without_importing_torch() -> None:
    code = "import sys; from nearfar.launch.local.rank import main; sys.stdin.read(); main(['-', '1'])"
    with subprocess.Popen([sys.executable, "-X", "importtime", "-c", code], stdin=-1, stderr=-1, text=True) as process:
        _, output = process.communicate(timeout=60)
    assert process.returncode == EXIT_PEER and "nearfar.launch.local.rank" in output
    assert "| torch\n" not in output
