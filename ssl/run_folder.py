"""The folder of a run: one owner at a time, one config for ever, metrics that match the weights.

runs/NAME/ config.yaml  metrics.jsonl  run.log  events.out.tfevents...  checkpoints/  teacher.safetensors  lock
"""

from __future__ import annotations

import json
import logging
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from nearfar.ssl import checkpoint, config, defaults, distributed, file_lock
from nearfar.ssl.config import Run
from nearfar.ssl.defaults import Derived
from nearfar.ssl.errors import UserError

TEACHER = "teacher.safetensors"
_log = logging.getLogger(__name__)

# A forked worker holds its parent's lock as well, and would keep it for seconds after the parent was killed.
_held: set[IO[str]] = set()


def _release_in_child() -> None:
    for lock in _held:
        lock.close()
    _held.clear()


os.register_at_fork(after_in_child=_release_in_child)


class RunFolder:
    """Context manager that owns `path` while a run trains in it.

    Of a run's ranks only the first owns the folder (`owns`); the others read it.

    Raises (on entering):
        UserError: another run owns it, it cannot be written, or it belongs to a run with other settings.
    """

    def __init__(self, path: Path, owns: bool = True) -> None:
        self.path = path
        self.owns = owns
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self._lock: IO[str] | None = None

    def __enter__(self) -> RunFolder:
        if not self.owns:
            return self
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / "lock").open("a+")
        except OSError as error:
            raise UserError(f"The run folder {self.path} cannot be written: {error}.") from None
        try:
            if not file_lock.acquire(self._lock):
                _log.warning(
                    f"The file system of {self.path} has no locks (flock): nothing keeps a second process out of it."
                )
        except BlockingIOError:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "another process"
            self._lock.close()
            self._lock = None
            raise UserError(
                f"{self.path} is in use by {owner}. Two processes in one run folder would overwrite each other: wait "
                "for it, stop it, or choose another name=."
            ) from None
        except OSError as error:
            self._lock.close()
            self._lock = None
            raise UserError(f"The run folder {self.path} cannot be locked: {error}.") from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()
        _held.add(self._lock)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is None:
            return
        self._lock.truncate(0)
        _held.discard(self._lock)
        self._lock.close()  # gives the lock back, as does the end of the process however it dies

    def saved_settings(self) -> Run | None:
        """The resolved settings of the run that was begun here; None where there is none.

        Raises:
            UserError: another version of nearfar wrote them.
        """
        file = self.path / "config.yaml"
        if not (file.exists() and self._begun()):
            return None
        try:
            return config.load(file)
        except UserError as error:
            raise UserError(f"{file} does not fit this version of nearfar. {error}") from None

    def settle(self, run: Run, images: int, cores: int = 0) -> tuple[Run, list[Derived]]:
        """The resolved settings of this run: those saved here if it was begun before, else derived now.

        cores: CPU cores for each of its processes; 0 = all of the machine's.

        Raises:
            UserError: the folder holds a run with other settings; names each one.
        """
        if saved := self.saved_settings():
            run = inherit(run, saved)
            if changed := differences(saved, run):
                raise UserError(
                    f"{self.path} holds a run with other settings ({'; '.join(changed)}). Continue it with its own "
                    "settings, or choose another name=."
                )
        return defaults.resolve(run, images, cores or distributed.available_cores())

    def record(self, run: Run) -> None:
        """Write config.yaml, once the start is accepted: a refused one must not change what the run says of itself.

        Raises:
            UserError: it cannot be written.
        """
        file = self.path / "config.yaml"
        partial = file.with_suffix(".writing")
        try:
            partial.write_text(config.to_yaml(run))
            partial.replace(file)
        except OSError as error:
            raise UserError(f"{file} could not be written: {error}.") from None

    def _begun(self) -> bool:
        """Is there anything that other settings would put at risk? A start that failed leaves only its config."""
        return any(self.checkpoints.glob("step-*")) or (self.path / TEACHER).exists()

    def exported_step(self) -> int | None:
        """The step of the exported teacher; None where there is none, or none that can be read."""
        try:
            return int(checkpoint.about(self.path / TEACHER)["step"])
        except (UserError, KeyError):
            return None

    def scored(self, step: int) -> bool:
        """Do the metrics hold a score of this step, and not only its loss?"""
        return any(line["step"] == step and "loss" not in line for line in read_metrics(self.metrics))

    def forget_metrics_after(self, step: int) -> None:
        """Drop the lines of metrics past `step`: those steps are run again, and give the same lines."""
        if not self.metrics.exists():
            return
        kept = [line for line in self.metrics.read_text().splitlines() if _step(line) <= step]
        partial = self.metrics.with_suffix(".writing")
        partial.write_text("".join(f"{line}\n" for line in kept))
        partial.replace(self.metrics)


def inherit(run: Run, saved: Run) -> Run:
    """Fill every `None` of `run` from a resolved run: a requeue on other cores must not derive other values."""
    tree = run.model_dump()
    for section, values in saved.model_dump().items():
        if isinstance(values, dict):
            kept = {key: value for key, value in tree[section].items() if value is not None}
            tree[section] = values | kept
    return Run.model_validate(tree)


def differences(old: Run, new: Run) -> list[str]:
    """Dotted `key: old -> new` for every setting that would change the weights of a continued run."""
    found = []
    for setting in config.settings():
        before, after = _get(old, setting.key), _get(new, setting.key)
        if not setting.free and before != after:
            found.append(f"{setting.key}: {before} -> {after}")
    return found


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a `metrics.jsonl`; a last line that a crash cut off is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if _step(line) != float("inf")]


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _get(run: Run, key: str) -> Any:
    node: Any = run
    for part in key.split("."):
        node = getattr(node, part)
    return node
