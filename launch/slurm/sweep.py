"""Sweeps: one run for each combination of some settings, in one folder."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from nearfar.ssl.errors import UserError
from nearfar.ssl.settings.run import AnyRun

R = TypeVar("R", bound=AnyRun)


def runs(load: Callable[[list[str]], R], sweep: Sequence[str]) -> tuple[Path, list[R]]:
    """The folder of a sweep and its runs.

    load: the run of the recipe with these settings besides. sweep: `key=a,b` each. All combinations are run, in
    FOLDER/NAME/ of the recipe, each in a folder named by what differs: `lr=1e-4_lgp=true`. What has one value is a
    setting of all of them.

    Raises:
        UserError: as `load`; a key without values, or one that is given twice; nothing that differs.
    """
    fixed, varied = [], {}
    for item in sweep:
        key, sign, text = item.partition("=")
        values = split(text)
        if not sign or not all(values):
            raise UserError(f"--sweep {item} is not key=value,value ... such as optim.lr=1e-4,5e-4.")
        if len(values) == 1:  # a setting that was written behind --sweep
            fixed.append(item)
            continue
        if key in ("name", "folder") or key in varied or len(set(values)) < len(values):
            raise UserError(f"--sweep {item}: each setting and value once, and neither name nor folder.")
        varied[key] = values
    if not varied:
        raise UserError(f"--sweep {' '.join(sweep)}: no setting has two values, such as optim.lr=1e-4,5e-4.")
    base, keys = load(fixed), list(varied)
    leaves = [key.rpartition(".")[2] for key in keys]
    short = leaves if len(set(leaves)) == len(leaves) else keys
    made = []
    for combination in itertools.product(*varied.values()):
        name = "_".join(f"{key}={_plain(value)}" for key, value in zip(short, combination, strict=True))
        chosen = [f"{key}={value}" for key, value in zip(keys, combination, strict=True)]
        # JSON is YAML, so a name such as lr=1 stays a name.
        location = [f"folder={json.dumps(str(base.path))}", f"name={json.dumps(name)}"]
        made.append(load([*fixed, *chosen, *location]))
    return base.path, made


def split(text: str) -> list[str]:
    """`1e-4,5e-4` -> two values; commas in brackets belong to a value: `[0.3, 1],[0.4, 1]` -> two."""
    found, depth = [""], 0
    for letter in text:
        depth += {"[": 1, "{": 1, "(": 1, "]": -1, "}": -1, ")": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return [value.strip() for value in found]


def _plain(value: str) -> str:
    return "".join(letter if letter.isalnum() or letter in ".-+" else "-" for letter in value).strip("-")
