"""Several processes as one run: which of them this is, and the collectives between them.

Every process ("rank") holds the whole student, teacher and optimizer, and takes its slice of each batch. All sums below
are over all ranks, and change nothing in a process that runs alone. The gradients' mean is in gradients.py.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from nearfar.ssl.errors import PeerError, UserError
from nearfar.ssl.parallel import gpus, heartbeat
from nearfar.ssl.parallel.heartbeat import FAILURE, MISTAKE, Heartbeat, of_attempt

T = TypeVar("T")

JOIN_TIMEOUT = timedelta(minutes=5)  # until all ranks must have come together
NAME_TIMEOUT = 30.0  # seconds until the name of the first rank's machine must be known, which may be starting
COLLECTIVE_TIMEOUT = timedelta(minutes=20)  # for a rank that scores or saves while the others wait
_beats: Heartbeat | None = None  # of the ranks that are joined now
_met = False


@dataclass(frozen=True)
class Ranks:
    """Which process this is among those of a run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those on this machine: the number of its GPU
    cores: int = 0  # CPU cores for this rank; 0 = all that the process may use
    init_method: str = "env://"  # where they meet: MASTER_ADDR and MASTER_PORT, or tcp://host:port
    listening: int | None = None  # of the first rank: an open socket at init_method, for its store to take over

    @property
    def first(self) -> bool:
        return self.rank == 0


ALONE = Ranks()


def from_environment(env: Mapping[str, str] = os.environ) -> Ranks:
    """The rank that torchrun (RANK, WORLD_SIZE, LOCAL_RANK) or srun (SLURM_PROCID ...) gave this process.

    Without them it is alone; also in a batch script or an allocation outside srun, however many tasks were asked for.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        here = int(env.get("LOCAL_WORLD_SIZE", 1))
        return Ranks(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)), _share(here))
    size = int(env.get("SLURM_STEP_NUM_TASKS", 1))
    if size == 1 or "SLURM_PROCID" not in env:
        return ALONE
    cores = int(env.get("SLURM_CPUS_PER_TASK", 0)) or _share(1)
    init_method = "env://"
    if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
        port = 20000 + (101 * int(env.get("SLURM_JOB_ID", 0)) + int(env.get("SLURM_STEP_ID", 0))) % 20000
        init_method = f"tcp://{_first_host(env['SLURM_STEP_NODELIST'])}:{port}"
    return Ranks(int(env["SLURM_PROCID"]), size, int(env.get("SLURM_LOCALID", 0)), cores, init_method)


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _share(processes: int) -> int:
    return max(1, available_cores() // processes)


def _first_host(nodes: str) -> str:
    hosts = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return hosts.stdout.split()[0]


@contextmanager
def joined(
    ranks: Ranks, timeout: timedelta = COLLECTIVE_TIMEOUT, *, device: str = "auto", silence: float = heartbeat.SILENCE
) -> Iterator[None]:
    """Within it the ranks of a run can communicate.

    Args:
        timeout: how long one may keep the others waiting.
        device: auto, cpu or cuda: on a CPU no GPU is touched.
        silence: seconds without a sign of life after which a rank counts as lost; 0: none ever does. A process that
            cannot be called back from waiting for a lost rank says which one it was, and ends (exit code 3).

    Raises:
        PeerError: another rank ended first. Where connections break with the process, this is raised at once.
        UserError: another rank ended first, because of a mistake of the user's; two ranks share a GPU; or the name of
            the first rank's machine leads nowhere.
    """
    global _beats, _met
    if ranks.size == 1:
        yield
        return
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(ranks.local_rank % torch.cuda.device_count())
    _require_known_host(ranks)
    try:
        store = _store(ranks)
        beats = Heartbeat(store, ranks.rank, ranks.size, first_of_machine=ranks.local_rank == 0, silence=silence)
    except (RuntimeError, ValueError) as error:
        raise PeerError(f"Rank {ranks.rank} did not meet the other {ranks.size - 1}: {_short(error)}") from error
    with beats:
        try:
            _beats, _met = beats, True
            with _told_to_others(ranks, of_attempt(store), beats):
                if cuda:
                    _refuse_shared_gpu(of_attempt(store))
                _connect("cpu:gloo,cuda:nccl" if cuda else "gloo", store, ranks, timeout)
                yield
        finally:
            _beats = None
            if dist.is_initialized():
                dist.destroy_process_group()


def _connect(backend: str, store: dist.Store, ranks: Ranks, timeout: timedelta) -> None:
    try:
        dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise PeerError(f"Rank {ranks.rank} did not meet the other {ranks.size - 1}: {_short(error)}") from error


@contextmanager
def _told_to_others(ranks: Ranks, store: dist.Store, beats: Heartbeat) -> Iterator[None]:
    """An error of this rank is left in the store; where another one ended first, its message is raised here."""
    this_rank = f"Rank {ranks.rank} on {socket.gethostname()}"
    try:
        yield
    except PeerError:  # they did not meet
        raise
    except RuntimeError as error:
        if not _broken_connection(error):
            _publish_failure(store, f"{this_rank} ended: {_short(error)}")
            raise
        message = beats.verdict or _published_failure(store)
        if not message and ranks.listening is None:  # else this process started the others, and knows which one died
            message = beats.wait_for_verdict()
        if message.startswith(MISTAKE):
            raise UserError(message.removeprefix(MISTAKE)) from error
        raise PeerError(message or f"{this_rank} lost another rank, which ended without a message.") from error
    except UserError as error:
        _publish_failure(store, f"{MISTAKE}{this_rank}: {_short(error)}")
        raise
    except BaseException as error:
        _publish_failure(store, f"{this_rank} ended: {_short(error) or type(error).__name__}")
        raise


def _refuse_shared_gpu(store: dist.Store) -> None:
    """NCCL refuses two ranks on one GPU in words that few understand, and training on it would be slower anyway."""
    name = gpus.identity(torch.cuda.current_device())
    if store.add(f"gpu/{socket.gethostname()}/{name}", 1) > 1:
        raise UserError(
            f"Two processes of this run share the GPU {name} of {socket.gethostname()}: more processes were started "
            f"there than the {torch.cuda.device_count()} that each of them sees ({gpus.HIDING}). Start as many as "
            "there are GPUs, or compute on the CPU (train.device=cpu, or --device cpu)."
        )


def _require_known_host(ranks: Ranks) -> None:
    """torch asks for ten minutes for a name that leads nowhere, with a page of frames for a message."""
    address = os.environ.get("MASTER_ADDR") if ranks.init_method == "env://" else urlsplit(ranks.init_method).hostname
    if not address:
        return  # torch says at once which variable is missing
    until = time.monotonic() + NAME_TIMEOUT
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except OSError as error:
            if time.monotonic() >= until:
                raise UserError(
                    f"Rank {ranks.rank} on {socket.gethostname()} cannot find the machine of the first rank: the name "
                    f"'{address}' leads nowhere from here ({_short(error)}). Set MASTER_ADDR to an address that all "
                    "machines of the run can reach, and MASTER_PORT to a free port there."
                ) from error
            time.sleep(1)


def _store(ranks: Ranks) -> dist.Store:
    """The key-value store through which the ranks find each other; the first one serves it.

    torch would listen on every interface of the machine; a socket that is open already listens where it was bound.
    """
    if ranks.listening is None:
        store, _, _ = next(dist.rendezvous(ranks.init_method, ranks.rank, ranks.size, timeout=JOIN_TIMEOUT))
        return store
    host, _, port = ranks.init_method.removeprefix("tcp://").rpartition(":")
    return dist.TCPStore(
        host, int(port), ranks.size, is_master=True, timeout=JOIN_TIMEOUT, master_listen_fd=ranks.listening
    )


def _broken_connection(error: RuntimeError) -> bool:
    message = str(error).lower()
    return isinstance(error, dist.DistError) or any(name in message for name in ("gloo", "nccl", "connection closed"))


def _publish_failure(store: dist.Store, message: str) -> None:
    with suppress(RuntimeError):  # the rank that serves the store is gone already
        store.set(FAILURE, message)


def _published_failure(store: dist.Store) -> str:
    try:
        store.wait([FAILURE], timedelta(seconds=3))
        return str(store.get(FAILURE).decode())
    except RuntimeError:
        return ""


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:1000]


def at_step(step: int) -> None:
    """So many steps are done: what the other ranks say of this one if it is lost."""
    if _beats:
        _beats.step = step


@contextmanager
def finishing() -> Iterator[None]:
    """What is done within it, such as writing a checkpoint, is finished first where another rank is lost meanwhile.

    Nothing within may wait for another rank.
    """
    with _beats.finishing() if _beats else nullcontext():
        yield


def lost(message: str) -> bool:
    """Another rank is known to be lost: this one reports it and ends, as all ranks do. False where nothing watches."""
    if _beats is None or not _beats.watches:
        return False
    _beats.lost(message)
    return True


def met() -> bool:
    """Has this process ever met the other ranks? From then on the first one tells what goes wrong in any."""
    return _met


def count() -> int:
    """Ranks that are joined now."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of the joined ranks this is."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_sum_(tensor: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if count() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_mean_(tensor: Tensor) -> Tensor:
    """The mean over all ranks, in place."""
    return all_sum_(tensor).div_(count()) if count() > 1 else tensor


class PendingSum:
    """The sum of a tensor over all ranks, in place, on its way while this rank computes on."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._work = dist.all_reduce(tensor, async_op=True) if count() > 1 else None

    def wait(self) -> Tensor:
        """On a GPU its stream waits, and the host does not."""
        if self._work is not None:
            self._work.wait()
        return self._tensor


class _Sum(torch.autograd.Function):
    """All-reduce whose gradient is all-reduced too: every rank's output depends on every rank's input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_sum_(x.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_sum_(grad.contiguous().clone())


def all_sum(tensor: Tensor) -> Tensor:
    """The sum over all ranks, with gradients."""
    out: Tensor = _Sum.apply(tensor)
    return out


class _Concatenate(torch.autograd.Function):
    """All-gather. Its gradient is added over all ranks: every rank's loss depends on every rank's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.rows = len(rows)
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(count())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_sum_(grad.contiguous().clone()).narrow(0, dist.get_rank() * ctx.rows, ctx.rows)


def concatenated(rows: Tensor) -> tuple[Tensor, int]:
    """Rows (N, ...) of all ranks in order, with gradients, and where those of this rank begin; N is the same on all."""
    if count() == 1:
        return rows, 0
    everyone: Tensor = _Concatenate.apply(rows)
    return everyone, dist.get_rank() * len(rows)


def all_logsumexp(rows: Tensor) -> Tensor:
    """logsumexp over dimension 0, and over all ranks: (N, K) -> (1, K). Sums within +-700, float64's exponents."""
    here = rows.logsumexp(0, keepdim=True)
    return all_sum_(here.double().exp()).log().to(here.dtype) if count() > 1 else here


def mean_of(values: dict[str, float]) -> dict[str, float]:
    """Each number's mean over all ranks."""
    mean = all_mean_(torch.tensor(list(values.values()), dtype=torch.float64))
    return dict(zip(values, mean.tolist(), strict=True))


def from_first(make: Callable[[], T]) -> T:
    """What rank 0's call returns, on every rank; the others do not call. It must be JSON-serializable.

    JSON and not torch's object collectives: those unpickle whatever bytes arrive.
    """
    if count() == 1:
        return make()
    text = json.dumps(make()).encode() if dist.get_rank() == 0 else b""
    size = torch.tensor([len(text)])
    dist.broadcast(size, 0)
    content = (
        torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(int(size), dtype=torch.uint8)
    )
    dist.broadcast(content, 0)
    value: T = json.loads(content.numpy().tobytes())
    return value


def gathered(texts: list[str]) -> list[str]:
    """The lists of all ranks, concatenated in their order."""
    if count() == 1:
        return texts
    mine = torch.frombuffer(bytearray(json.dumps(texts).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(count())]
    dist.all_gather(sizes, torch.tensor([len(mine)]))
    longest = max(int(size) for size in sizes)
    parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(count())]
    dist.all_gather(parts, torch.cat([mine, mine.new_zeros(longest - len(mine))]))
    lists = (json.loads(part[: int(size)].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True))
    return [text for each in lists for text in each]
