"""Every setting by itself, for `--help`, recipes and the comparison of runs."""

from __future__ import annotations

from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, get_args, get_origin

from nearfar.ssl.settings.run import AnyRun, Run
from nearfar.ssl.settings.section import MAY_CHANGE, Section


class Setting(NamedTuple):
    """A leaf of `Run`, as `--help` and the comparison of two runs see it."""

    key: str
    type: str  # in words
    default: Any
    description: str
    free: bool
    is_text: bool  # what the user types is kept as it is, and not parsed as YAML

    @property
    def typed(self) -> str:
        """The default as it may be typed behind `key=`; `(derived)` or `(not set)` where there is none."""
        if self.default is None:
            return "(not set)" if self.key in NEVER_DERIVED else "(derived)"
        if isinstance(self.default, tuple):
            return ",".join(f"{x:g}" if float(f"{x:g}") == x else repr(x) for x in self.default)
        return str(self.default).lower() if isinstance(self.default, bool) else str(self.default)


# Settings without a default that stay so: nothing about the run says what they should be, or they belong to a part
# (iBOT, Gram anchoring, a cooldown) that is off.
NEVER_DERIVED = frozenset(
    ["data.val", "train.save_every_steps", "head.ibot_prototypes", "optim.cooldown_epochs"]
    + ["train.keep_every", "train.start_from", "backbone.img_size"]
    + [f"loss.gram_{name}" for name in ("start_epoch", "teacher_epoch", "teacher")]
    + [f"backbone.{name}" for name in ("patch_size", "embed_dim", "depth", "num_heads", "pos_size", "weights")]
    + ["backbone.layer_scale"]
    + [f"distill.teacher{part}" for part in ("", "_weights", "_size")]
)


def all_settings(kind: type[AnyRun] = Run) -> Iterator[Setting]:
    """Every setting of a kind of run with its dotted key, in the order of the recipe."""
    for section, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            leaves = [(f"{section}.{name}", leaf) for name, leaf in field.annotation.model_fields.items()]
        else:
            leaves = [(section, field)]
        for key, leaf in leaves:
            free = bool(leaf.json_schema_extra == MAY_CHANGE)
            is_text = str in (leaf.annotation, *get_args(leaf.annotation))
            yield Setting(key, _in_words(leaf.annotation), leaf.default, leaf.description or "", free, is_text)


def _in_words(kind: Any) -> str:
    """The type of a setting, in words."""
    if get_origin(kind) is Literal:
        *first, last = map(str, get_args(kind))
        return f"{', '.join(first)} or {last}" if first else last
    if get_origin(kind) is tuple:
        return f"{len(get_args(kind))} numbers"
    if isinstance(kind, UnionType) or get_args(kind):
        return " or ".join(_in_words(one) for one in get_args(kind) if one is not NoneType)
    return {int: "whole number", float: "number", str: "text", bool: "true or false"}[kind]


KEYS = [setting.key for setting in all_settings()]
