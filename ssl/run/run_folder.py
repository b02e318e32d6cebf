"""The folder of a run: one owner at a time, one config for its lifetime, metrics that match the weights.

runs/NAME/ config.yaml  metrics.jsonl  run.log  events.out.tfevents...  checkpoints/  teacher.safetensors  lock
"""

from __future__ import annotations

import json
import logging
import os
import socket
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, TypeVar

from nearfar.ssl import checkpoint, config
from nearfar.ssl.checkpoint import CLASSIFIER, TEACHER
from nearfar.ssl.disk import checkpoint_names, file_lock, files
from nearfar.ssl.disk.metrics import read_metrics, step_of_line
from nearfar.ssl.errors import UserError
from nearfar.ssl.settings.defaults import differences, only_longer
from nearfar.ssl.settings.finetune_settings import FinetuneRun, recorded, recorded_in
from nearfar.ssl.settings.run import AnyRun, Run

START = "start.safetensors"  # the backbone as it began, of a pretraining run that begins with weights
VERBS: dict[type[AnyRun], Literal["pretrain", "finetune"]] = {Run: "pretrain", FinetuneRun: "finetune"}
R = TypeVar("R", bound=AnyRun)
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
        self._made: list[Path] = []  # folders that this start made, innermost first

    def __enter__(self) -> RunFolder:
        if not self.owns:
            return self
        self._made = [path for path in (self.path, *self.path.parents) if not _exists(path)]
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
        if self._made and os.listdir(self.path) == ["lock"]:  # a start that failed leaves nothing behind
            (self.path / "lock").unlink()
            with suppress(OSError):  # another process uses it by now
                for folder in self._made:
                    folder.rmdir()
        self._lock.close()  # releases the lock, as the end of the process does, however it dies

    def saved_settings(self) -> Run | None:
        """`saved` of a pretraining run."""
        return self.saved(Run)

    def saved(self, kind: type[R]) -> R | None:
        """The resolved settings of the run that was begun here; None where there is none.

        Raises:
            UserError: another version of nearfar wrote them, or the run is not of this kind.
        """
        try:
            if not self._begun():
                return None
            file = self.path / "config.yaml"
            written = self._written(file) if file.exists() else None
        except OSError as error:
            raise UserError(f"The run folder {self.path} cannot be read: {error.strerror}.") from None
        trained = self._trained_settings()
        if isinstance(trained, Run) and written and only_longer(trained, written):
            written = trained  # a longer run that was accepted, and has no checkpoint yet
        if written and trained and (changed := differences(trained, written)):
            raise UserError(
                f"{file} was changed: the checkpoints were trained with other settings ({'; '.join(changed)}). Put it "
                "back, or remove it, since checkpoints know their settings; for other settings choose another name=."
            )
        found = written or trained
        if found is not None and not isinstance(found, kind):
            raise UserError(
                f"{self.path} holds a run of nearfar {VERBS[type(found)]}, and not of nearfar {VERBS[kind]}: choose "
                "another name=."
            )
        return found

    def _written(self, file: Path) -> AnyRun:
        try:
            return recorded_in(file)
        except UserError as error:
            raise UserError(f"{file} does not fit this version of nearfar. {error}") from None

    def _trained_settings(self) -> AnyRun | None:
        """What the newest readable checkpoint, or else the exported teacher, records as its settings."""
        for path in reversed(checkpoint_names.finished(self.checkpoints)):
            try:
                settings = json.loads((path / checkpoint.STATE).read_text())["run"]
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                continue  # a damaged one; the resume sets it aside and says so
            return self._validated(settings, path)
        for name in (TEACHER, CLASSIFIER):
            try:
                settings = checkpoint.about(self.path / name)["run"]
            except (UserError, KeyError):
                continue
            return self._validated(settings, self.path / name)
        return None

    @staticmethod
    def _validated(settings: Any, where: Path) -> AnyRun:
        try:
            return recorded(settings)
        except UserError as error:
            raise UserError(f"{where} does not fit this version of nearfar. {error}") from None

    def record(self, run: AnyRun) -> None:
        """Write config.yaml, once the start is accepted: a refused one must not change the run's recorded settings.

        Raises:
            UserError: it cannot be written.
        """
        file = self.path / "config.yaml"
        try:
            files.write_text(file, config.to_yaml(run))
        except OSError as error:
            raise UserError(f"{file} could not be written: {error}.") from None

    def _begun(self) -> bool:
        """Are there weights that other settings would not fit? A start that failed leaves only its config."""
        exported = any((self.path / name).exists() for name in (TEACHER, CLASSIFIER))
        return bool(checkpoint_names.finished(self.checkpoints)) or exported

    def exported_step(self, name: str = TEACHER) -> int | None:
        """The step of the exported weights; None where there are none, or none that can be read."""
        try:
            return int(checkpoint.about(self.path / name)["step"])
        except (UserError, KeyError, TypeError, ValueError):
            return None

    def scored(self, step: int) -> bool:
        """Do the metrics hold a score of this step, and not only its loss?"""
        return any(line["step"] == step and "loss" not in line for line in read_metrics(self.metrics))

    def forget_metrics_after(self, step: int) -> None:
        """Drop the lines of metrics past `step`: those steps are run again, and give the same lines."""
        try:
            if self.metrics.exists():
                kept = [line for line in self.metrics.read_text().splitlines() if step_of_line(line) <= step]
                files.write_text(self.metrics, "".join(f"{line}\n" for line in kept))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.metrics} cannot be read or written: {error}.") from None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # no right to look, or a name longer than names can be: `mkdir` will say so
        return True
