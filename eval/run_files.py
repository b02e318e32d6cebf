"""The files of a run folder, read as untrusted input: within bounds, and checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nearfar.ssl.disk import bounded_files
from nearfar.ssl.errors import UserError

_LONGEST_METRICS = 2 * 2**30


def require_run(run: Path) -> None:
    """Raises UserError where a run's folder is not there."""
    if not run.is_dir():
        raise UserError(f"There is no run folder {run}, so there is nothing to report on.")


def read_settings(run: Path) -> dict[str, Any]:
    """What a run's config.yaml holds; {} where there is none. Raises UserError for anything else than such a file."""
    file = run / "config.yaml"
    return bounded_files.read_yaml(file, "file of settings") if file.exists() else {}


def read_numbers(file: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl with what is a number in them, NaN included; lines without a finite step are left
    out, such as one that a crash cut off. [] where there is no such file. Raises UserError where it cannot be read."""
    if not file.exists():
        return []
    found = []
    try:
        if file.stat().st_size > _LONGEST_METRICS:
            raise ValueError("it is too long to be metrics")
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                numbers = _numbers(line)
                if math.isfinite(numbers.get("step", math.nan)):
                    found.append(numbers)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())[:300]}.") from None
    return found


def flat(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"views.local_crops_size": 24}."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _numbers(line: str) -> dict[str, float]:
    try:
        content = json.loads(line)
        if not isinstance(content, dict):
            return {}
        return {
            key: float(value)
            for key, value in content.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
    except (ValueError, RecursionError, OverflowError):
        return {}
