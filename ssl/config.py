"""A run from a recipe and `key.sub=value` overrides: read, validated, written. All mistakes are reported together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from nearfar.ssl.disk import bounded_files
from nearfar.ssl.errors import UserError
from nearfar.ssl.settings.contradictions import of_pretraining
from nearfar.ssl.settings.listing import all_settings
from nearfar.ssl.settings.messages import PRETRAIN, in_words, unknown
from nearfar.ssl.settings.run import AnyRun, Run

MAX_REPORTED = 20  # mistakes

R = TypeVar("R", bound=AnyRun)


def load(recipe: Path | None, overrides: list[str] | tuple[str, ...] = ()) -> Run:
    """A pretraining run from a YAML recipe and `key.sub=value` overrides. Raises UserError as `read`."""
    return read(Run, recipe, overrides, of_pretraining)


def read(
    kind: type[R],
    recipe: Path | None,
    overrides: Sequence[str],
    contradictions: Callable[[R], list[str]],
    command: str = PRETRAIN,
) -> R:
    """Read a YAML recipe of settings of this kind, apply the `key.sub=value` overrides, validate.

    Args:
        contradictions: what is wrong with settings that are each valid alone, in words.
        command: whose help lists the settings.

    Raises:
        UserError: one paragraph with every unknown key (and the nearest right one), every bad value and every
            impossible combination.
    """
    tree: dict[str, Any] = {}
    problems: list[str] = []
    texts = {setting.key: setting.default for setting in all_settings(kind) if setting.is_text}
    if recipe is not None:
        written = bounded_files.read_yaml(recipe, "recipe")
        tree = {
            key: value for key, value in written.items() if value is not None
        }  # all of a section may be commented out
    for item in overrides:
        key, sign, text = item.partition("=")
        if not sign:
            problems.append(f"'{item[:200]}' is not a setting: write key=value, for example train.epochs=20")
            continue
        *sections, leaf = key.strip().split(".")
        node: Any = tree
        if len(sections) == 1:
            node = tree.setdefault(sections[0], {})
        if isinstance(node, dict) and len(sections) < 2:
            node[leaf] = _typed(key.strip(), text, texts)
        else:
            problems.append(unknown(key, [setting.key for setting in all_settings(kind)], command))
    if recipe is not None and not tree.get("name"):
        tree["name"] = recipe.stem
    return validated(kind, tree, contradictions, problems, command)


def require_images(run: AnyRun) -> None:
    """Raises UserError where `run` names no training images, or not the weights it needs; nothing is looked up."""
    if not run.data.path:
        raise UserError("data.path is not set: name the training images, for example data.path=~/pictures.")
    if isinstance(run, Run) and not (run.train.start_from or run.backbone.weights or run.backbone.pretrained):
        _require_no_weights(run)


def _require_no_weights(run: Run) -> None:
    for key, value in (
        ("optim.freeze_backbone_epochs", run.optim.freeze_backbone_epochs),
        ("optim.freeze_batch_norm", run.optim.freeze_batch_norm),
        ("loss.anchor_weight", run.loss.anchor_weight),
    ):
        if value:
            shown = "true" if value is True else f"{value:g}"
            raise UserError(
                f"{key}={shown} is for a run that begins with trained weights, and none are named: set "
                "backbone.weights (`nearfar adapt WEIGHTS IMAGES` does), or leave it out."
            )


def _typed(key: str, text: str, texts: Mapping[str, Any]) -> Any:
    """The value of `key=text`: as YAML reads it, but text is kept as it is unless quoted; empty is the default.

    texts: the settings that are text, with their defaults.
    """
    if key in texts:
        if not text.strip():
            return texts[key]
        if text.strip() != "null" and text.strip()[0] not in ("'", '"'):
            return text
    try:
        return bounded_files.parse_yaml(text)
    except yaml.YAMLError:
        return text


def validate(tree: dict[str, Any], problems: list[str] | None = None) -> Run:
    """A `Run` from nested dicts, or one `UserError` with all that is wrong."""
    return validated(Run, tree, of_pretraining, problems)


def validated(
    kind: type[R],
    tree: dict[str, Any],
    contradictions: Callable[[R], list[str]],
    problems: list[str] | None = None,
    command: str = PRETRAIN,
) -> R:
    """Settings of this kind from nested dicts, or one `UserError` with all that is wrong."""
    tree, problems = _string_keys(tree), list(problems or [])
    try:
        run = kind.model_validate(tree)
    except ValidationError as error:
        for mistake in in_words(error, [setting.key for setting in all_settings(kind)], command):
            problems.append(mistake.message)
            _drop(tree, mistake.path)
        run = kind.model_validate(tree)  # the rest is valid: how its settings fit each other is checked as well
    refuse([*problems, *contradictions(run)])
    return run


def refuse(problems: list[str]) -> None:
    """Raises one UserError with all of these mistakes, if there are any."""
    if problems:
        count = f"{len(problems)} mistakes" if len(problems) > 1 else "A mistake"
        more = [f"and {len(problems) - MAX_REPORTED} more"] if len(problems) > MAX_REPORTED else []
        message = "; ".join(problems[:MAX_REPORTED] + more)
        raise UserError(f"{count} in the settings: {message}{'' if message.endswith('?') else '.'}")


def to_yaml(run: AnyRun) -> str:
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=110)


def _string_keys(node: Any) -> Any:
    return {str(key): _string_keys(value) for key, value in node.items()} if isinstance(node, dict) else node


def _drop(tree: dict[str, Any], path: tuple[str, ...]) -> None:
    for section in path[:-1]:
        tree = tree[section] if isinstance(tree.get(section), dict) else {}
    tree.pop(path[-1], None)
