"""Where the numbers and pictures of a run go besides its own files: TensorBoard, or Weights & Biases."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from nearfar.ssl.disk import files
from nearfar.ssl.errors import UserError

Track = Literal["tensorboard", "wandb"]
RUN_ID = "wandb-run-id.txt"
PROJECT = "nearfar"  # the environment variable WANDB_PROJECT names another
PATIENCE = 30  # seconds that a start, a login or the last upload may take


class Tracker(Protocol):
    def record(self, step: int, values: dict[str, Any]) -> None:
        """Numbers after `step` finished steps; what is no number is left out."""

    def settings(self, values: dict[str, Any]) -> None:
        """The settings of the run, in sections."""

    def picture(self, name: str, step: int, pixels: np.ndarray) -> None:
        """A picture (H, W, 3), uint8."""

    def close(self) -> None: ...


def check(track: Track) -> None:
    """Raises UserError where the package that `track` needs is not installed."""
    if track == "wandb" and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "track=wandb needs the package wandb, which is not installed: pip install wandb (or nearfar[wandb]), or "
            "leave track out for TensorBoard."
        )


def open_tracker(track: Track, folder: Path, start: int, say: Callable[[str], None]) -> Tracker:
    """What `track` names, for a run in `folder` that continues from step `start`; `say` tells the user what failed.

    Raises UserError as `check`, and OSError where TensorBoard's file cannot be written.
    """
    check(track)
    return WeightsAndBiases(folder, say) if track == "wandb" else TensorBoard(folder, start)


class TensorBoard:
    """Event files in the run's folder. What an earlier process wrote past step `start` is hidden."""

    def __init__(self, folder: Path, start: int) -> None:
        # Here, so that whoever takes steps without a log (a benchmark, a later rank) does not need the package.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start + 1)

    def record(self, step: int, values: dict[str, Any]) -> None:
        for key, value in _numbers(values).items():
            self._writer.add_scalar(key, value, step)

    def settings(self, values: dict[str, Any]) -> None:
        """For the table of runs, beside their loss and k-NN score."""
        from torch.utils.tensorboard.summary import hparams

        writer = self._writer._get_file_writer()
        for summary in hparams(_flat(values), {"loss": None, "knn_top1": None}):
            writer.add_summary(summary)

    def picture(self, name: str, step: int, pixels: np.ndarray) -> None:
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One W&B run for one run folder, which keeps its id: a continued run continues it.

    Numbers carry their own step, and curves are drawn over it. W&B's own counter only rises, and would drop the lines
    that a continued run computes again between its checkpoint and the end of the process before it; so these are there
    twice, with equal values wherever the run continues to the bit.

    Training never ends with the service, and waits for it only at its start and its end. Where it does not answer
    within `PATIENCE` seconds, or nobody is logged in, the numbers stay in RUN/wandb, as with WANDB_MODE=offline, and
    `wandb sync` uploads them; what else fails ends the tracking. Both are said once.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._wandb: Any = importlib.import_module("wandb")
        self._folder, self._say = folder, say
        self._run: Any = None
        try:
            self._run = self._begin(None)
        except Exception as error:  # whatever the service and its client raise, training goes on
            self._tell(f"Weights & Biases does not answer ({_first_line(error)}); training goes on")
            self._keep_here()
        if self._run is not None:
            self._do(_draw_over_steps)

    def record(self, step: int, values: dict[str, Any]) -> None:
        self._do(lambda run: run.log({"step": step, **_numbers(values)}))

    def settings(self, values: dict[str, Any]) -> None:
        self._do(lambda run: run.config.update(_flat(values), allow_val_change=True))

    def picture(self, name: str, step: int, pixels: np.ndarray) -> None:
        self._do(lambda run: run.log({"step": step, name: self._wandb.Image(pixels)}))

    def close(self) -> None:
        self._do(lambda run: run.finish())
        self._run = None

    def _begin(self, mode: str | None) -> Any:
        settings = self._wandb.Settings(
            init_timeout=PATIENCE, login_timeout=PATIENCE, finish_timeout=PATIENCE, console="off", silent=True
        )
        return self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=self._folder.name,
            id=_run_id(self._folder),
            resume="allow",
            dir=str(self._folder),
            mode=mode,
            settings=settings,
        )

    def _keep_here(self) -> None:
        try:
            self._wandb.teardown()  # its helper process still holds the run's id for the start that failed
            self._run = self._begin("offline")
        except Exception as error:
            self._tell(f"Weights & Biases cannot keep the numbers offline either ({_first_line(error)})")
        else:
            self._say(f"The numbers are kept in {self._folder / 'wandb'}; upload them with `wandb sync`.")

    def _do(self, act: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        try:
            act(self._run)
        except Exception as error:
            self._run = None
            self._tell(f"Weights & Biases failed ({_first_line(error)}) and gets no further numbers from this process")

    def _tell(self, what: str) -> None:
        self._say(f"{what}. metrics.jsonl of the run has everything.")


def _draw_over_steps(run: Any) -> None:
    run.define_metric("step")
    run.define_metric("*", step_metric="step")


def _run_id(folder: Path) -> str:
    """The id that the run's folder keeps, made at the first call."""
    file = folder / RUN_ID
    try:
        found = file.read_text().strip()[:65]
    except (OSError, UnicodeDecodeError):
        found = ""
    if re.fullmatch(r"[a-z0-9]{1,64}", found):
        return found
    made = secrets.token_hex(8)
    files.write_text(file, f"{made}\n")
    return made


def _numbers(values: dict[str, Any]) -> dict[str, int | float]:
    return {key: value for key, value in values.items() if isinstance(value, int | float)}


def _flat(values: dict[str, Any]) -> dict[str, bool | int | float | str]:
    """Sections of settings as section.name; what is no number and no text as text."""
    return {
        f"{section}.{key}": value if isinstance(value, bool | int | float | str) else str(value)
        for section, part in values.items()
        if isinstance(part, dict)
        for key, value in part.items()
    }


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
