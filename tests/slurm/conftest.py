"""Runs of a second on a real SLURM cluster: what the tests here share."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from nearfar.launch import cli
from nearfar.launch.slurm import records, snapshot
from nearfar.launch.slurm.status import Status, statuses

STEPS = 60
PATIENCE = 400.0  # seconds until a test gives up; other tests may be using the machine


def load(file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(file).stem, Path(__file__).with_name(file))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


cluster_module = load("cluster.py")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three nodes of eight made-up cores, without accounting; one for each file of tests."""
    if reason := cluster_module.why_not():
        pytest.skip(reason)
    with cluster_module.Cluster(nodes=3) as running, pytest.MonkeyPatch.context() as patch:
        for name, value in running.environment.items():
            patch.setenv(name, value)
        yield running


@pytest.fixture(scope="module")
def accounting_cluster() -> Iterator[Any]:
    """One node, with slurmdbd behind it."""
    if reason := cluster_module.why_not(accounting=True):
        pytest.skip(reason)
    with cluster_module.Cluster(nodes=1, accounting=True) as running, pytest.MonkeyPatch.context() as patch:
        for name, value in running.environment.items():
            patch.setenv(name, value)
        yield running


class Launched:
    """A submitted run."""

    def __init__(self, run: Path) -> None:
        self.run = run

    @property
    def job(self) -> str:
        job = records.latest_job(self.run, "train")
        assert job is not None
        return job.job

    @property
    def status(self) -> Status:
        (status,) = statuses([self.run])
        return status

    @property
    def step(self) -> int:
        return records.reached_step(self.run)

    @property
    def log(self) -> str:
        job = records.latest_job(self.run, "train")
        return job.log.read_text() if job and job.log.exists() else "no log"

    def wait(self, what: str, ready: Callable[[Status], bool], seconds: float = PATIENCE) -> Status:
        until = time.monotonic() + seconds
        while not ready(status := self.status):
            if time.monotonic() > until:
                queue = subprocess.run(["squeue", "-t", "all"], capture_output=True, text=True, check=False).stdout
                raise AssertionError(f"{what}: {status}\n{queue}\n{self.log}")
            time.sleep(0.05)
        return status

    def finish(self, seconds: float = PATIENCE) -> Status:
        gone = ("finished", "failed", "stopped", "cancelled", "unknown", "timeout", "node_fail", "completed")
        status = self.wait("end", lambda status: status.state in gone, seconds)
        assert status.state == "finished", f"{status}\n{self.log}"
        return status

    def reach(self, step: int) -> None:
        """Wait until so many steps are done, but not all."""
        until = time.monotonic() + PATIENCE
        while self.step < step:
            assert time.monotonic() < until, f"step {step}: {self.status}\n{self.log}"
            time.sleep(0.02)
        assert self.step < STEPS

    def interrupted(self, action: Callable[[], object], began: int = 1) -> tuple[int, float]:
        """Steps lost and seconds lost by an action that must lead to attempt number `began` + 1 and a step in it."""
        moment = time.time()
        action()
        self.wait("another attempt", lambda status: len(status.attempts) > began)
        attempt = records.attempts(self.run)[began]
        first = self.wait("a step", lambda _: self.step > attempt.step and self._told() > attempt.time)
        assert len(first.attempts) == began + 1
        return attempt.lost, self._told() - moment

    def _told(self) -> float:
        return float(records.last_metrics(self.run).get("time", 0.0))


@pytest.fixture(scope="session")
def same(same_runs: Callable[[Path, Path, int], None]) -> Callable[[Path, Path], None]:
    """Asserts that two whole runs ended with the same bits, on the way of the same metrics."""
    return lambda one, two: same_runs(one, two, STEPS)


@pytest.fixture(scope="session")
def recipe(tiny_recipe: Callable[..., dict[str, dict[str, Any]]]) -> str:
    """The text of a recipe: the tiny run, long enough to be interrupted."""
    return yaml.safe_dump(tiny_recipe(epochs=12) | {"eval": {"knn_every_epochs": 0}})


@pytest.fixture(scope="session")
def classes_recipe(tiny_recipe: Callable[..., dict[str, dict[str, Any]]]) -> str:
    """The text of a recipe of `nearfar finetune`: the same network and steps, with labels."""
    tiny = tiny_recipe(epochs=12)
    own = {"augment": {"size": 32}, "classifier": {"mixup": 0.8}, "eval": {"every_epochs": 0}}
    return yaml.safe_dump({name: tiny[name] for name in ("data", "backbone", "train")} | own)


def two_classes(folder: Path, seed: int) -> Path:
    """20 images of each of two classes."""
    rng = np.random.default_rng(seed)
    for k in range(40):
        file = folder / ("cat", "dog")[k % 2] / f"{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(file)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What runs learn from."""
    return two_classes(tmp_path_factory.mktemp("data") / "pictures", 0)


@pytest.fixture(scope="session")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What runs are scored on."""
    return two_classes(tmp_path_factory.mktemp("data") / "others", 1)


Launch = Callable[..., Launched]


@pytest.fixture(scope="module")
def launch(
    tmp_path_factory: pytest.TempPathFactory, pictures: Path, recipe: str, classes_recipe: str
) -> Iterator[Launch]:
    """`nearfar launch` of the tiny recipe; `pace` seconds are added to each step, `code` is run before it."""
    folder = tmp_path_factory.mktemp("launched")
    (folder / "pretrain.yaml").write_text(recipe)
    (folder / "finetune.yaml").write_text(classes_recipe)

    def run(
        *words: str, name: str, pace: float = 0.0, code: str = "", runs: str = "runs", verb: str = "pretrain"
    ) -> Launched:
        schedule = {"pretrain": "Schedule", "finetune": "FinetuneSchedule"}[verb]
        lines = [
            "import time", f"_at = {schedule}.at", "def _slow(self, step):", f"    time.sleep({pace})",
            *(f"    {line}" for line in code.splitlines()), "    return _at(self, step)", f"{schedule}.at = _slow",
        ]  # fmt: skip

        def take(target: Path, real: Callable[[Path], None] = snapshot.copy_code) -> None:
            """The copy of the code is what a job runs: here is where it can be made slow, or wrong."""
            real(target)
            name = {"pretrain": "learning/schedule.py", "finetune": "training/finetuning.py"}[verb]
            file = target / "nearfar" / "ssl" / name
            file.write_text("\n".join([file.read_text(), *lines, ""]))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(snapshot, "copy_code", take)
            settings = [f"data.path={pictures}", f"folder={folder / runs}", f"name={name}"]
            flags = ["--cpu", "--cluster", "slurm", *(() if "--cpus-per-task" in words else ("--cpus-per-task", "1"))]
            assert cli.main(["launch", verb, str(folder / f"{verb}.yaml"), *settings, *words, *flags]) == 0
        return Launched(folder / runs / name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("XDG_CONFIG_HOME", str(folder / "no site file"))
        yield run


Reference = Callable[..., Path]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, pictures: Path, recipe: str, classes_recipe: str) -> Reference:
    """The folder of the uninterrupted run on so many ranks, which nothing but `nearfar VERB` has touched."""
    folder = tmp_path_factory.mktemp("reference")
    (folder / "pretrain.yaml").write_text(recipe)
    (folder / "finetune.yaml").write_text(classes_recipe)

    def make(ranks: int, *settings: str, verb: str = "pretrain") -> Path:
        run = folder / "-".join([str(ranks), *settings]) / verb
        if not run.exists():
            words = [
                f"data.path={pictures}",
                f"folder={run.parent}",
                f"train.world_size={ranks}",
                "train.device=cpu",
                *settings,
            ]
            command = [sys.executable, "-m", "nearfar.launch.cli", verb, str(folder / f"{verb}.yaml"), *words]
            ended = subprocess.run(
                command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
            )
            assert ended.returncode == 0, ended.stderr
        return run

    return make
