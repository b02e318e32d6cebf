"""What the tests of training share: the tiny run (40 images of 32x32, 20 steps, every switch on) and its images."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from nearfar.ssl import config
from nearfar.ssl.data import libjpeg, open_source
from nearfar.ssl.data.beton_writer import write_beton
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.settings.run import Run

if TYPE_CHECKING:
    from rich.console import Console


@pytest.fixture
def tiny_settings(tiny_recipe: Callable[..., dict[str, dict[str, Any]]]) -> list[str]:
    """The tiny recipe as `section.key=value`, with batch norm too and a learning rate that no batch size scales."""
    settings = [f"{name}.{key}={value}" for name, section in tiny_recipe().items() for key, value in section.items()]
    return ["name=tiny", *settings, "head.batch_norm=true", "optim.lr=1e-3"]


@pytest.fixture
def tiny(tmp_path: Path, tiny_settings: list[str]) -> Callable[..., Run]:
    def make(*overrides: str, folder: str = "runs") -> Run:
        return config.load(None, [*tiny_settings, f"folder={tmp_path / folder}", *overrides])

    return make


@pytest.fixture
def images() -> ArraySource:
    rng = np.random.default_rng(0)
    return ArraySource(rng.integers(0, 256, (40, 32, 32, 3), np.uint8), labels=np.arange(40) % 4)


@pytest.fixture
def quiet() -> Console:
    from rich.console import Console  # bench/gpu.py runs tests that need no run where it is not installed

    return Console(file=StringIO())


@pytest.fixture
def time_limit() -> Iterator[None]:
    """A test that waits for ever fails after a minute instead."""

    def late(*_: object) -> None:
        raise TimeoutError("the test took longer than a minute")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 60)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 JPEGs like photographs in 3 class folders: smooth shapes, edges, texture and noise; sizes 60 to 200."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(1)
    for i in range(60):
        height, width = rng.integers(60, 200, 2)
        y, x = np.mgrid[:height, :width]
        planes = []
        for _ in range(3):
            a, b, c = rng.uniform(0.02, 0.2, 3)
            planes.append(127 + 70 * np.sin(a * x + b * y) + 50 * np.sign(np.sin(c * x - a * y)))
        pixels = np.stack(planes, -1) + rng.normal(0, 8, (height, width, 1))
        target = folder / f"class{i % 3}" / f"{i:03}.jpg"
        target.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(target, quality=90)
    return folder


@pytest.fixture(scope="session")
def beton(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photos as a .beton."""
    if not libjpeg.available():
        pytest.skip("FFCV is not installed")
    file = tmp_path_factory.mktemp("beton") / "photos.beton"
    write_beton(open_source(photos), file)
    return file


@pytest.fixture(scope="session")
def together() -> Callable[..., list[subprocess.Popen[str]]]:
    """Starts a command in so many processes that find each other as torchrun's would."""

    def start(size: int, *command: str) -> list[subprocess.Popen[str]]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        shared |= {"OMP_NUM_THREADS": 1, "PYTHONFAULTHANDLER": 1}
        return [
            subprocess.Popen(
                [sys.executable, *command],
                env=os.environ | {k: str(v) for k, v in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]

    return start


@pytest.fixture(scope="session")
def finish() -> Callable[..., list[str]]:
    """Waits for processes; what each wrote to stdout, but for older gloos' word that they are connected.

    All must have ended well: what one that did not has said is shown in full.
    """

    def wait(processes: list[subprocess.Popen[str]], timeout: float = 240) -> list[str]:
        outputs = [process.communicate(timeout=timeout) for process in processes]
        if any(process.returncode for process in processes):
            ends = zip(processes, outputs, strict=True)
            pytest.fail(
                "\n".join(f"exit {process.returncode}:\n{out}\n{error}" for process, (out, error) in ends), False
            )
        return ["".join(line for line in out.splitlines(True) if not line.startswith("[Gloo]")) for out, _ in outputs]

    return wait
