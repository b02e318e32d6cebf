"""Words for a user's mistakes in settings."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any


def impossible(key: str, value: Any, why: str) -> str:
    """A value that a setting cannot take."""
    return f"{key}={value!r} is not possible: {why[:1].lower()}{why[1:]}"


def unknown(key: str, keys: Sequence[str]) -> str:
    """A setting that does not exist, with the nearest of the dotted `keys` that do."""
    leaves = {name.rpartition(".")[2]: name for name in keys}
    sections = list(dict.fromkeys(name.partition(".")[0] for name in keys))
    near: list[str] = []
    if "." not in key and key not in leaves:  # most likely a section: training for train, heads for head
        near = [name for name in sections if key.startswith(name)] or _near(key, sections, 0.6)
    near = near or _near(key, keys, 0.75)
    near = near or [leaves[name] for name in _near(key.rpartition(".")[2], list(leaves), 0.6)]
    return f"{key} is unknown ({f'did you mean {near[0]}?' if near else 'see `nearfar pretrain --help`'})"


def _near(word: str, words: Sequence[str], cutoff: float) -> list[str]:
    return difflib.get_close_matches(word, words, n=1, cutoff=cutoff)
