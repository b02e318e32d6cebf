"""Error messages for mistakes in settings."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # a wrong verb is answered without loading pydantic
    from pydantic import ValidationError

PRETRAIN = "nearfar pretrain"
SHOWN = 80  # characters of a wrong value that a message repeats


class Mistake(NamedTuple):
    path: tuple[str, ...]  # keys that lead to the value within the nested settings
    message: str


def in_words(error: ValidationError, keys: Sequence[str], command: str = PRETRAIN) -> list[Mistake]:
    """What pydantic found wrong with settings, one mistake for each value, however many kinds it could have had.

    keys: the dotted settings that exist. command: whose help lists them.
    """
    reasons: dict[tuple[str, ...], list[str]] = {}
    values: dict[tuple[str, ...], Any] = {}
    unknowns = set()
    for found in error.errors(include_url=False):
        path = _path(found["loc"], keys)
        if found["type"] == "extra_forbidden":
            unknowns.add(path)
        bounds = {key: f"{v:g}" if isinstance(v, float) else v for key, v in found.get("ctx", {}).items()}
        reason = _PLAIN_WORDS[found["type"]].format_map(bounds) if found["type"] in _PLAIN_WORDS else found["msg"]
        if found["type"] == "literal_error":
            reason += _did_you_mean(found["input"], re.findall(r"'([^']*)'", str(bounds["expected"])))
        reasons.setdefault(path, []).append(f"{reason[:1].lower()}{reason[1:]}")
        values.setdefault(path, found["input"])
    return [
        Mistake(
            path,
            unknown(".".join(path), keys, command)
            if path in unknowns
            else impossible(".".join(path), values[path], ", or ".join(dict.fromkeys(why))),
        )
        for path, why in reasons.items()
    ]


def impossible(key: str, value: Any, why: str) -> str:
    """A value that a setting cannot take."""
    shown = repr(value)
    shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]} ..."
    return f"{key}={shown} is not possible: {why}"


def unknown(key: str, keys: Sequence[str], command: str = PRETRAIN) -> str:
    """A setting that does not exist, with the nearest of the dotted `keys` that do."""
    near = nearest_setting(key, keys)
    shown = key if len(key) <= SHOWN else f"{key[:SHOWN]} ..."
    return f"{shown} is unknown ({f'did you mean {near}?' if near else f'see `{command} --help`'})"


def nearest_setting(key: str, keys: Sequence[str]) -> str | None:
    """The section or dotted setting that `key` was probably meant to be."""
    key = key[:SHOWN]
    leaves = {name.rpartition(".")[2]: name for name in keys}
    sections = list(dict.fromkeys(name.partition(".")[0] for name in keys if "." in name))
    if "." not in key and key not in leaves:  # most likely a section: training for train, heads for head
        section = next((name for name in sections if key.startswith(name)), None) or nearest(key, sections, 0.6)
        if section:
            return section
    if near := nearest(key, keys, 0.75):
        return near
    leaf = nearest(key.rpartition(".")[2], list(leaves), 0.6)
    return leaves[leaf] if leaf else None


# what other libraries call it
_SYNONYMS = {
    "gpu": "cuda", "nvidia": "cuda", "cpus": "cpu", "float32": "fp32", "float": "fp32", "32": "fp32", "f32": "fp32",
    "bfloat16": "bf16", "amp": "auto", "mixed": "auto", "half": "fp16", "float16": "fp16", "f16": "fp16",
}  # fmt: skip


def meant(name: str, choices: Sequence[str]) -> str | None:
    """The choice that `name` was probably meant to be, by another name or misspelled; None where none is."""
    same = _SYNONYMS.get(name.lower(), name.partition(":")[0].lower())
    if same in choices:
        return same
    return None if name.lower() in _SYNONYMS else nearest(name, choices)


def _did_you_mean(value: Any, choices: Sequence[str]) -> str:
    if not isinstance(value, str) or (near := meant(value, choices)) is None:
        return ""
    number = value.partition(":")[2]
    chosen = f", and CUDA_VISIBLE_DEVICES={number} to choose the GPU" if near == "cuda" and number.isdigit() else ""
    return f"; did you mean {near}{chosen}?"


def nearest(name: str, names: Sequence[str], cutoff: float = 0.6) -> str | None:
    """The one of `names` that is most like `name`; None where none is."""
    return next(iter(difflib.get_close_matches(name[:SHOWN], names, n=1, cutoff=cutoff)), None)


# in place of those messages of pydantic that speak to programmers
_PLAIN_WORDS = {
    "bool_parsing": "it should be true or false",
    "bool_type": "it should be true or false",
    "int_parsing": "it should be a whole number",
    "int_type": "it should be a whole number",
    "int_from_float": "it should be a whole number",
    "float_parsing": "it should be a number",
    "float_type": "it should be a number",
    "finite_number": "it should be a finite number",
    "string_type": "it should be text",
    "string_unicode": "it should be text in UTF-8",
    "model_type": "it should be a section with settings in it",
    "tuple_type": "it should be numbers separated by commas",
    "literal_error": "it should be {expected}",
    "greater_than": "it should be greater than {gt}",
    "greater_than_equal": "it should be {ge} or more",
    "less_than": "it should be less than {lt}",
    "less_than_equal": "it should be {le} or less",
}


def _path(loc: tuple[str | int, ...], keys: Sequence[str]) -> tuple[str, ...]:
    """Keys that lead to a mistake, without pydantic's names of union members and positions within a list."""
    parts: list[str] = []
    for part in loc:
        if not isinstance(part, str):
            break
        parts.append(part)
        if ".".join(parts) in keys:
            break
    return tuple(parts)
