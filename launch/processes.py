"""One run over several processes of this machine: this one is the first rank, and starts the others."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from nearfar.ssl import config
from nearfar.ssl.config import Run
from nearfar.ssl.defaults import Derived, local_ranks
from nearfar.ssl.distributed import ALONE, Ranks, available_cores
from nearfar.ssl.errors import EXIT_PEER, PeerError
from nearfar.ssl.run_folder import RunFolder


def wanted(run: Run) -> Derived:
    """Processes for a run on this machine: as set, as it was begun, or by the cores."""
    saved = RunFolder(run.path).saved_settings()
    if run.train.world_size:
        count, why = run.train.world_size, "as set"
    elif saved and saved.train.world_size:
        count, why = saved.train.world_size, "as the run was begun"
    elif run.train.device != "cpu" and torch.cuda.is_available():
        count, why = 1, "with a GPU; torchrun or `nearfar launch` start one for each"
    else:
        count = local_ranks(run.train.batch_size, available_cores())
        why = f"{available_cores()} cores, and equal slices of at least 16 of {run.train.batch_size} images"
    return Derived("train.world_size", count, why)


@contextmanager
def started(run: Run, size: int) -> Iterator[Ranks]:
    """The other `size - 1` processes of `run` work while this is open; gives the place of this one.

    They get no Ctrl-C (a session of their own): the first rank hears it, and all agree to stop. When this process ends,
    however it dies, they end too: their connection to it breaks, and they look for it every second.

    Raises:
        PeerError: naming the process that died, when one did.
    """
    if size == 1:
        yield ALONE
        return
    cores = max(1, available_cores() // size)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"OMP_NUM_THREADS": cores, "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")}
    with tempfile.TemporaryDirectory(prefix="nearfar-") as folder:
        settings = Path(folder) / "run.yaml"
        settings.write_text(config.to_yaml(run))
        others = {}
        for rank in range(1, size):
            own = {"RANK": rank, "LOCAL_RANK": rank}
            others[rank] = subprocess.Popen(
                [sys.executable, "-m", "nearfar.launch.rank", str(settings)],
                env=os.environ | {name: str(value) for name, value in (shared | own).items()},
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        try:
            yield Ranks(0, size, 0, cores, f"tcp://127.0.0.1:{port}")
            for process in others.values():
                with suppress(subprocess.TimeoutExpired):  # all is saved: who does not leave by itself is ended below
                    process.wait(timeout=60)
        except PeerError as error:
            dead = [f"rank {rank} {_how(process)}" for rank, process in others.items() if _ended_badly(process)]
            raise PeerError(f"{error} {'; '.join(dead)}".strip()) from error
        finally:
            for process in others.values():
                if process.poll() is None:
                    process.kill()
                process.wait()


def _ended_badly(process: subprocess.Popen[bytes]) -> bool:
    try:
        return process.wait(timeout=2) not in (0, EXIT_PEER)
    except subprocess.TimeoutExpired:
        return False


def _how(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    if code < 0:
        return f"was killed by {signal.Signals(-code).name} (SIGKILL: often too little memory)"
    return f"ended with exit code {code}"
