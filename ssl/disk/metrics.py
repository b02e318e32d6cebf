"""metrics.jsonl: the numbers of a run, a line for each step that is logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a `metrics.jsonl`; a last line that a crash cut off is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if step_of_line(line) != float("inf")]


def step_of_line(line: str) -> float:
    """The step of a line of metrics; infinite where it has none, as one that a crash cut off."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
