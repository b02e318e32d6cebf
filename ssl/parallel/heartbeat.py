"""Signs of life between the ranks of a run: one that dies or stands still is named, and the others end.

A rank that waits in a collective for a dead one learns of it at once where the connection between them breaks (gloo,
mostly), after 20 minutes where it does not (NCCL), and never where the other's process was only stopped. So a thread of
every rank writes a beat into the store through which the ranks met, and another one judges: the first rank those of
all, every rank those of the first, whose machine answers for the store. What is found is written into the store, told
on one rank of each machine, and ends the process, since nothing can call the main thread back out of a collective.

Beats are judged by this process's own clock alone, from one arrival to the next, and the time in which this
process itself stood still does not count. A thread beats on through a long evaluation, a compilation, a checkpoint and
a breakpoint of pdb; only a process that is stopped whole (SIGSTOP, gdb), or a call of minutes that keeps Python's lock,
falls silent.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist

from nearfar.ssl.errors import EXIT_PEER, EXIT_USER

SILENCE = 40.0  # seconds without a beat after which a rank counts as lost
ARRIVAL = 300.0  # seconds in which every rank must have come
SAVING = 300.0  # seconds that a checkpoint in the making may take when another rank is lost
FAILURE = "failure"  # key of the store under which the first rank to fail, or to find one lost, leaves its message
MISTAKE = "mistake: "  # in front of such a message that is for the user
_LEFT = "left"


@dataclass
class _PeerState:
    """What is known of another rank."""

    beat: str = ""  # as it was last read: "HOST COUNT STEP", the step empty before the first; or `_LEFT`
    host: str = ""
    step: str = ""
    since: float = field(default_factory=time.monotonic)  # when it last changed

    def read(self, beat: str) -> None:
        if beat == self.beat:
            return
        self.beat, self.since = beat, time.monotonic()
        if beat != _LEFT:
            self.host, _, self.step = beat.split(" ")

    def last_step(self) -> str:
        return f"its last step was {int(self.step):,}" if self.step else "it had not finished a step"


class Heartbeat:
    """Context manager: within it this rank beats, watches, and ends when another one is lost.

    Args:
        store: through which the ranks met; a second connection to it is made.
        first_of_machine: one rank on each machine, which tells what happened.
        silence: seconds; 0: nothing is watched, and no rank is ever taken for lost.
    """

    def __init__(
        self, store: dist.Store, rank: int, size: int, *, first_of_machine: bool, silence: float = SILENCE
    ) -> None:
        self.rank, self.silence = rank, silence
        self.every = min(3.0, silence / 15)  # seconds between two beats
        self.step: int | None = None  # steps that this rank has finished
        self.verdict = ""  # what went wrong elsewhere, once it is known
        self._tells = first_of_machine or rank == 0
        self._store = _second_connection(store, silence) if silence else store
        self._others = {other: _PeerState() for other in (range(size) if rank == 0 else (0,)) if other != rank}
        self._answered = time.monotonic()  # when the store last did
        self._broken = False  # the connection to it
        self._beats = 0
        self._in_use = threading.Lock()  # the store's connection
        self._saving = threading.Lock()
        self._leaving = threading.Event()
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._beat, self._judge)]

    @property
    def watches(self) -> bool:
        return self.silence > 0

    def __enter__(self) -> Heartbeat:
        if self.watches:
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Say that this rank leaves; the first one, with whom the store goes, waits a little for the others."""
        self._leaving.set()
        if not self.watches:
            return
        self._say_goodbye()
        for thread in self._threads:  # one that is still in the store's code when Python ends would abort the process
            thread.join(2 * self.every)

    def _say_goodbye(self) -> None:
        if self._silent_store(2 * self.every):
            return
        self._set(_key(self.rank), _LEFT)
        until = time.monotonic() + 3 * self.every
        while self.rank == 0 and self._staying() and time.monotonic() < until:
            time.sleep(self.every / 20)

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """What is done within it may be finished when another rank is lost; nothing here may wait for one."""
        with self._saving:
            yield

    def lost(self, verdict: str) -> None:
        """Another rank is lost, as is known from elsewhere."""
        if not self.verdict:
            self.verdict = verdict
            if self.rank == 0:
                self._set(FAILURE, verdict)

    def wait_for_verdict(self) -> str:
        """Which rank was lost, where the connection to one has broken and it left no message; "" where none is found.

        With a broken connection, a few missing beats are enough.
        """
        until = time.monotonic() + (6 * self.every if self.watches else 0)
        while not self.verdict and time.monotonic() < until:
            self._find(4 * self.every)
            time.sleep(self.every / 4)
        return self.verdict

    def _beat(self) -> None:
        while True:
            try:
                self._exchange()
            except RuntimeError:
                self._broken = True
                return
            if self._leaving.wait(self.every):
                return

    def _exchange(self) -> None:
        """One beat, and a look at those of others."""
        with self._in_use:
            if self._leaving.is_set():
                return
            self._beats += 1
            step = "" if self.step is None else self.step
            self._store.set(_key(self.rank), f"{socket.gethostname()} {self._beats} {step}")
            self._look()
            if not self.verdict and self._store.check([FAILURE]):
                self.verdict = self._store.get(FAILURE).decode()
        self._answered = time.monotonic()

    def _look(self) -> None:
        there = [rank for rank, seen in self._others.items() if seen.beat or self._store.check([_key(rank)])]
        if there:
            for rank, beat in zip(there, self._store.multi_get([_key(rank) for rank in there]), strict=True):
                self._others[rank].read(beat.decode())

    def _set(self, key: str, value: str) -> None:
        """In the store, unless that no longer answers."""
        if self._in_use.acquire(timeout=self.every):
            try:
                with suppress(RuntimeError):
                    self._store.set(key, value)
            finally:
                self._in_use.release()

    def _staying(self) -> bool:
        """Is any of the ranks that are watched still in the run?"""
        with suppress(RuntimeError), self._in_use:
            self._look()
        now = time.monotonic()
        return any(seen.beat not in ("", _LEFT) and now - seen.since < 3 * self.every for seen in self._others.values())

    def _silent_store(self, silence: float) -> bool:
        return self._broken or time.monotonic() - self._answered > silence

    def _judge(self) -> None:
        tick = time.monotonic()
        while not self._leaving.wait(self.every / 3):
            now = time.monotonic()
            if (stood_still := now - tick) > self.every:
                self._answered += stood_still
                for seen in self._others.values():
                    seen.since += stood_still
            tick = now
            self._find(self.silence)
            if self.verdict:
                self._end()
                return

    def _find(self, silence: float) -> None:
        """Who has been silent for so many seconds."""
        if self.verdict:
            return
        now, first = time.monotonic(), self._others.get(0)
        if self._silent_store(silence):
            how = "the connection to it broke" if self._broken else f"no answer for {now - self._answered:.0f} s"
            if first is None:
                self.lost(_ends(f"Lost the store through which the ranks met: {how}."))
            elif first.beat != _LEFT:
                self._tells = self._tells or self.rank == 1  # on a machine that lost its own first rank
                self.lost(_ends(f"Lost rank 0{_on(first.host)}: {how}; {first.last_step()}."))
            return
        for rank, seen in self._others.items():
            if not seen.beat and now - seen.since > max(silence, ARRIVAL):
                self.lost(_ends(f"Rank {rank} has not met the others within {now - seen.since:.0f} s."))
            elif seen.beat not in ("", _LEFT) and now - seen.since > silence:
                how = f"no sign of life for {now - seen.since:.0f} s"
                self.lost(_ends(f"Lost rank {rank}{_on(seen.host)}: {how}; {seen.last_step()}."))

    def _end(self) -> None:
        """End the process, unless the main thread does within a moment: where it can, it ends in better order."""
        moment = (3 if self.rank == 0 else 2) * self.every  # the first keeps the store, in which the others read
        if self._leaving.wait(moment):
            return
        mistake = self.verdict.startswith(MISTAKE)
        if self._tells:
            shown = "\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar has hidden the cursor
            print(f"{shown}nearfar: {self.verdict.removeprefix(MISTAKE)}", file=sys.stderr, flush=True)
        self._saving.acquire(timeout=SAVING)
        os._exit(EXIT_USER if mistake else EXIT_PEER)


def _key(rank: int) -> str:
    return f"beat/{rank}"


def _on(host: str) -> str:
    return f" on {host}" if host else ""


def _ends(what: str) -> str:
    return (
        f"{what} Its process or machine died, or was stopped, so this process ends too. Checkpoints saved before are "
        "intact."
    )


def of_attempt(store: dist.Store) -> dist.Store:
    """`store` without the keys of others: torchrun keeps one for itself and all of its attempts."""
    return dist.PrefixStore(f"nearfar/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", _tcp(store))


def _tcp(store: dist.Store) -> dist.TCPStore:
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    assert isinstance(store, dist.TCPStore)
    return store


def _second_connection(store: dist.Store, silence: float) -> dist.Store:
    """A connection of the threads' own: while the main thread waits for an answer, its connection is taken."""
    met = _tcp(store)
    patience = timedelta(seconds=max(10.0, silence))
    return of_attempt(dist.TCPStore(met.host, met.port, is_master=False, wait_for_workers=False, timeout=patience))
