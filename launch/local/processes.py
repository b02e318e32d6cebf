"""One run over several processes of this machine: this one is the first rank, and starts the others."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from rich.console import Console

from nearfar.ssl.errors import EXIT_PEER, EXIT_USER, PeerError
from nearfar.ssl.parallel import distributed, gpus
from nearfar.ssl.parallel.distributed import ALONE, Ranks, available_cores, from_environment
from nearfar.ssl.run.run_folder import RunFolder
from nearfar.ssl.settings import defaults
from nearfar.ssl.settings.defaults import Derived
from nearfar.ssl.settings.run import AnyRun

R = TypeVar("R", bound=AnyRun)
T = TypeVar("T")
NOTICED_WITHIN = 5.0  # seconds in which the main thread must have noticed that another rank died


def ranks_here(run: AnyRun) -> Derived:
    """Processes for a run on this machine: as set, as the run was started, or by its GPUs or cores.

    Raises:
        UserError: the device is not there, or has not as many GPUs as processes are set.
    """
    saved = RunFolder(run.path).saved(run.as_asked())
    return defaults.world_size(run, saved, available_cores(), gpus.visible(run.train.device))


def in_all(run: R, console: Console, train_rank: Callable[[R, Console, Ranks], T]) -> T:
    """What `train_rank` returns as one of the processes that torchrun or srun started, or as the first of those that it
    starts here: one for each visible GPU, or by the cores, unless `train.world_size` says how many.

    Raises:
        UserError: the device is not there, or has not as many GPUs as processes are set.
        PeerError: another of the run's processes ended.
    """
    world = from_environment()
    if world != ALONE:
        return train_rank(run, console, world)
    key, size, reason = ranks_here(run)
    if run.train.world_size is None:
        console.print(f"derived {key} = {size}  ({reason})", highlight=False, soft_wrap=True)
    threads = torch.get_num_threads()
    try:
        with started(run, size) as world:
            return train_rank(run, console, world)
    finally:
        torch.set_num_threads(threads)


@contextmanager
def started(run: AnyRun, size: int) -> Iterator[Ranks]:
    """The other `size - 1` processes of `run` work while this is open; yields the rank of this one.

    They get no Ctrl-C (a session of their own): the first rank hears it, and all agree to stop. When this process ends,
    however it dies, they end too: their connection to it breaks, and they check for it every second. One of them that
    dies is noticed within a second; where the main thread waits for it in a collective, this process says so and ends
    (exit code 3).

    Raises:
        PeerError: naming the process that died, when one did.
    """
    if size == 1:
        yield ALONE
        return
    cores = max(1, available_cores() // size)
    with _only_loopback(), socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        shared |= {"OMP_NUM_THREADS": cores, "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")}
        others = {rank: _start(run, shared | {"RANK": rank, "LOCAL_RANK": rank}) for rank in range(1, size)}
        ended = threading.Event()
        threading.Thread(target=_watch, args=(others, ended), daemon=True).start()
        try:
            yield Ranks(0, size, 0, cores, f"tcp://127.0.0.1:{port}", os.dup(server.fileno()))
            for process in others.values():
                with suppress(subprocess.TimeoutExpired):  # all is saved: those that do not exit are killed below
                    process.wait(timeout=60)
        except PeerError as error:
            dead = [f"rank {rank} {_how(process)}" for rank, process in others.items() if _ended_badly(process)]
            untold = [text for text in dead if text not in str(error)]
            raise PeerError(f"{error} {'; '.join(untold)}".strip()) from error
        finally:
            ended.set()
            for process in others.values():
                if process.poll() is None:
                    process.kill()
                process.wait()


def _watch(others: dict[int, subprocess.Popen[bytes]], ended: threading.Event) -> None:
    """End this process, the first rank, soon after another one died: it may wait in a collective where nothing tells.

    The main thread has time to end in better order where its connection to the dead rank broke.
    """
    while not ended.wait(1.0):
        for rank, process in others.items():
            if process.poll() in (None, 0, EXIT_PEER):
                continue
            if ended.wait(NOTICED_WITHIN):
                return
            message = f"Lost rank {rank} of this machine: rank {rank} {_how(process)}. Checkpoints saved are intact."
            if not distributed.lost(message):  # the ranks have not met yet, or nothing watches them
                print(f"nearfar: {message}", file=sys.stderr, flush=True)
                # The others notice within a second. A mistake of the user's was told by the rank that met it.
                os._exit(EXIT_USER if process.returncode == EXIT_USER else EXIT_PEER)
            return


def _start(run: AnyRun, environment: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Another rank. It reads its settings from a pipe: no file of them is left behind, however this process ends."""
    process = subprocess.Popen(
        [sys.executable, "-m", "nearfar.launch.local.rank", "-", str(os.getpid())],
        env=os.environ | {name: str(value) for name, value in environment.items()},
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin as pipe:  # one that died at once is reported when the ranks join
        pipe.write(run.model_dump_json().encode())
    return process


@contextmanager
def _only_loopback() -> Iterator[None]:
    """Within it gloo and NCCL listen at no other interface than the machine's own; ranks started now inherit it."""
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    variables = {f"{library}_SOCKET_IFNAME": name for library in ("GLOO", "NCCL") for name in names}
    before = {key: os.environ.get(key) for key in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


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
