"""The names of checkpoint folders: `step-000001200`. No other folder is ever read, counted or removed."""

from __future__ import annotations

import re
from pathlib import Path

WHAT_TO_GIVE = (
    "Give a run folder, a checkpoint folder (step-XXXXXXXXX) or a file of weights: an exported .safetensors, or a "
    "public one of DINO, DINOv2, DINOv3 or timm."
)

_NAME = re.compile(r"step-([0-9]{9})", re.ASCII)


def name_of(step: int) -> str:
    return f"step-{step:09d}"


def step_of(path: Path) -> int | None:
    """The step in a folder's name; None where it is not the name of a finished checkpoint."""
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found else None


def finished(folder: Path) -> list[Path]:
    """The finished checkpoints of a folder, oldest first; empty where there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if step_of(path) is not None and path.is_dir())


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint, by name; 0 without one."""
    return max((step for path in finished(folder) if (step := step_of(path)) is not None), default=0)
