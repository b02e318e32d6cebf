"""A run from a recipe and `key.sub=value` overrides: read, validated, written. All mistakes are reported together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from nearfar.ssl import bounded_files
from nearfar.ssl.errors import UserError
from nearfar.ssl.setting_errors import PRETRAIN, in_words, unknown
from nearfar.ssl.setting_list import all_settings
from nearfar.ssl.settings import AnyRun, BackboneSettings, Run, ViewSettings

MAX_REPORTED = 20  # mistakes
MAX_NAME_BYTES = 200  # file systems take 255; the rest is left for prefixes and suffixes


R = TypeVar("R", bound=AnyRun)


def load(recipe: Path | None, overrides: list[str] | tuple[str, ...] = ()) -> Run:
    """A pretraining run from a YAML recipe and `key.sub=value` overrides. Raises UserError as `read`."""
    return read(Run, recipe, overrides, combinations)


def read(
    kind: type[R],
    recipe: Path | None,
    overrides: Sequence[str],
    combinations: Callable[[R], list[str]],
    command: str = PRETRAIN,
) -> R:
    """Read a YAML recipe of settings of this kind, apply the `key.sub=value` overrides, validate.

    Args:
        combinations: what is wrong with settings that are each valid alone, in words.
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
    return validated(kind, tree, combinations, problems, command)


def require_images(run: AnyRun) -> None:
    """Raises UserError where `run` names no training images, or not the weights it needs; nothing is looked up."""
    if not run.data.path:
        raise UserError("data.path is not set: name the training images, for example data.path=~/pictures.")
    if isinstance(run, Run) and not (run.train.start_from or run.backbone.weights or run.backbone.pretrained):
        _require_no_weights(run)


def _require_no_weights(run: Run) -> None:
    for key, value in (
        ("optim.freeze_backbone_epochs", run.optim.freeze_backbone_epochs),
        ("loss.anchor_weight", run.loss.anchor_weight),
    ):
        if value:
            raise UserError(
                f"{key}={value:g} is for a run that begins with trained weights, and none are named: set "
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
    return validated(Run, tree, combinations, problems)


def validated(
    kind: type[R],
    tree: dict[str, Any],
    combinations: Callable[[R], list[str]],
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
        run = kind.model_validate(tree)  # the rest is valid: its combinations are checked as well
    refuse([*problems, *combinations(run)])
    return run


def refuse(problems: list[str]) -> None:
    """Raises one UserError with all of these mistakes, if there are any."""
    if problems:
        count = f"{len(problems)} mistakes" if len(problems) > 1 else "A mistake"
        more = [f"and {len(problems) - MAX_REPORTED} more"] if len(problems) > MAX_REPORTED else []
        told = "; ".join(problems[:MAX_REPORTED] + more)
        raise UserError(f"{count} in the settings: {told}{'' if told.endswith('?') else '.'}")


def combinations(run: Run) -> list[str]:
    """Contradictions between settings that are each valid alone, in words."""
    files = {
        "train.start_from": run.train.start_from,
        "loss.gram_teacher": run.loss.gram_teacher,
        "distill.teacher": run.distill.teacher,
        "distill.teacher_weights": run.distill.teacher_weights,
    }
    found = [*wrong_names(run, **files), *_wrong_ranges(run.views), *_wrong_sizes(run), *wrong_backbone(run.backbone)]
    found += [*_wrong_loss(run), *_wrong_schedule(run), *_wrong_start(run)]
    found += [*_wrong_distilling(run), *wrong_slices(run)]
    for key, epochs in (
        ("optim.cooldown_epochs", run.optim.cooldown_epochs),
        ("optim.warmup_epochs", run.optim.warmup_epochs),
        ("loss.warmup_teacher_temp_epochs", run.loss.warmup_teacher_temp_epochs),
        ("optim.freeze_last_layer_epochs", run.optim.freeze_last_layer_epochs),
        ("optim.freeze_backbone_epochs", run.optim.freeze_backbone_epochs),
    ):
        if epochs is not None and epochs > run.train.epochs:
            found.append(f"{key}={epochs:g} is longer than the run (train.epochs={run.train.epochs})")
    return found


def wrong_slices(run: AnyRun) -> Iterator[str]:
    """Steps that do not divide into processes and parts."""
    if run.train.batch_size % (run.train.world_size or 1):
        yield f"train.batch_size={run.train.batch_size} is not divisible by train.world_size={run.train.world_size}"
    elif run.train.batch_size // (run.train.world_size or 1) % run.train.accumulate_steps:
        yield (
            f"the {run.train.batch_size // (run.train.world_size or 1)} images of a step in each process do not divide "
            f"into train.accumulate_steps={run.train.accumulate_steps}"
        )


def wrong_names(run: AnyRun, **more: str | None) -> Iterator[str]:
    """Names and paths that no file system accepts. more: the paths that only this kind of run has, by their keys."""
    if "/" in run.name or run.name in (".", "..") or not run.name.isprintable():
        yield f"name={run.name!r} must be a plain folder name (folder= says where it is)"
    if (length := len(os.fsencode(run.name))) > MAX_NAME_BYTES:
        yield f"name is {length} bytes long, and the name of a run's folder has at most {MAX_NAME_BYTES}"
    paths: dict[str, str | None] = {"folder": run.folder, "data.path": run.data.path, "data.val": run.data.val}
    for key, path in (paths | {"backbone.weights": run.backbone.weights} | more).items():
        if path and "\0" in path:
            yield f"{key}={path!r} contains a null character, which no path can"
        if path and max(len(os.fsencode(part)) for part in path.split("/")) > 255:
            yield f"{key} has a part of more than 255 bytes, which no file system accepts"


def _wrong_ranges(views: ViewSettings) -> Iterator[str]:
    for name in ("global_crops_scale", "local_crops_scale", "ratio", "blur_sigma"):
        low, high = getattr(views, name)
        if not 0 < low <= high:
            yield f"views.{name} must be two rising numbers above 0, not [{low:g}, {high:g}]"
    for name in ("global_crops_scale", "local_crops_scale"):
        if getattr(views, name)[1] > 1:
            yield f"views.{name} is a share of the image's area and cannot exceed 1"
    for name in ("blur_prob", "solarize_prob"):
        if not all(0 <= p <= 1 for p in getattr(views, name)):
            yield f"views.{name} must be probabilities between 0 and 1"


def _wrong_sizes(run: Run) -> Iterator[str]:
    """Sides in pixels that do not fit each other or the patches."""
    views, patch = run.views, run.backbone.patch_size or patch_in(run.backbone.name)
    if patch:
        for name in ("global_crops_size", "local_crops_size") if views.local_crops_number else ("global_crops_size",):
            size = getattr(views, name)
            if size % patch:
                near = max(patch, round(size / patch) * patch)
                less = ", and smaller than one patch" if size < patch else ""
                yield f"views.{name}={size} is not a multiple of the patch size {patch}{less} (nearest: {near})"
    if views.local_crops_number and views.local_crops_size > views.global_crops_size:
        yield f"local views ({views.local_crops_size} px) are larger than global ones ({views.global_crops_size} px)"
    size = run.eval.size or views.global_crops_size
    if patch and run.eval.size and run.eval.size < patch:
        yield f"eval.size={run.eval.size} is smaller than one patch of the backbone ({patch} pixels)"
    if run.eval.resize and run.eval.resize < size:
        yield f"eval.resize={run.eval.resize} is smaller than the crop eval.size={size}"


def wrong_backbone(backbone: BackboneSettings) -> Iterator[str]:
    """Settings that a backbone does not support, as far as its name tells."""
    if backbone.embed_dim and backbone.num_heads and backbone.embed_dim % backbone.num_heads:
        yield f"backbone.embed_dim={backbone.embed_dim} is not divisible by num_heads={backbone.num_heads}"
    if (backbone.levels, backbone.wavelet) != ("auto", "haar") and not (backbone.lgp or "_lgp" in backbone.name):
        yield "backbone.levels and backbone.wavelet are settings of LGP, and backbone.lgp is off"
    if backbone.pretrained and backbone.weights:
        yield "backbone.pretrained and backbone.weights both set the starting weights; leave one out"
    if backbone.img_size and backbone.patch_size and backbone.img_size < backbone.patch_size:
        yield f"backbone.img_size={backbone.img_size} is smaller than a patch ({backbone.patch_size})"
    if backbone.pretrained and not backbone.name.startswith("timm/"):
        yield f"backbone.pretrained needs a timm/NAME backbone, not {backbone.name}"
    is_vim = backbone.name.startswith("vim_")
    if is_vim and (backbone.gaug or backbone.registers):
        yield f"{backbone.name} has no attention, so backbone.gaug and backbone.registers cannot be set"
    if not is_vim and backbone.scan != "auto":
        yield f"backbone.scan={backbone.scan} is for Vision Mamba (vim_...), not {backbone.name}"


def _wrong_loss(run: Run) -> Iterator[str]:
    """Parts of iBOT and of Gram anchoring that contradict each other, or belong to what is off."""
    loss, head = run.loss, run.head
    low, high = loss.mask_ratio_min_max
    if not 0 < low <= high <= 1:
        yield f"loss.mask_ratio_min_max must be two rising shares above 0, at most 1, not [{low:g}, {high:g}]"
    if not loss.ibot_weight and (head.ibot_separate or head.ibot_prototypes):
        yield "head.ibot_separate and head.ibot_prototypes are settings of iBOT, which loss.ibot_weight=0 turns off"
    elif head.ibot_prototypes and not head.ibot_separate:
        yield "head.ibot_prototypes is for a head of the patches' own (head.ibot_separate=true); they share that of CLS"
    if not loss.gram_weight and (loss.gram_start_epoch, loss.gram_teacher_epoch, loss.gram_teacher) != (None,) * 3:
        yield (
            "loss.gram_start_epoch, loss.gram_teacher_epoch and loss.gram_teacher are settings of Gram anchoring, "
            "which loss.gram_weight=0 turns off"
        )
    if loss.gram_teacher and loss.gram_teacher_epoch is not None:
        yield "loss.gram_teacher and loss.gram_teacher_epoch both say which teacher is the anchor; leave one out"
    if loss.anchor_weight and (loss.gram_teacher or loss.gram_teacher_epoch):
        yield (
            "loss.anchor_weight keeps the weights that the run begins with, for Gram anchoring too, so "
            "loss.gram_teacher and loss.gram_teacher_epoch contradict it; leave them or loss.anchor_weight out"
        )
    start = 0.8 * run.train.epochs if loss.gram_start_epoch is None else loss.gram_start_epoch
    if loss.gram_weight and start >= run.train.epochs:
        yield f"loss.gram_start_epoch={start:g} is not within the run (train.epochs={run.train.epochs})"
    if loss.gram_weight and (loss.gram_teacher_epoch or 0) > start:
        yield f"loss.gram_teacher_epoch={loss.gram_teacher_epoch:g} is later than loss.gram_start_epoch={start:g}"


def _wrong_distilling(run: Run) -> Iterator[str]:
    """Parts of other losses beside a teacher to distill, and settings of a teacher where there is none."""
    distill, loss = run.distill, run.loss
    if not distill.teacher:
        if (distill.teacher_weights, distill.teacher_size) != (None, None):
            yield "distill.teacher_weights and distill.teacher_size belong to distill.teacher, which is not set"
        return
    for key in ("koleo_weight", "ibot_weight", "gram_weight", "anchor_weight"):
        if weight := getattr(loss, key):
            yield (
                f"loss.{key}={weight:g} and distill.teacher={distill.teacher} contradict each other: a student learns "
                f"from a frozen teacher alone (loss.{key}=0), or without one"
            )


def _wrong_schedule(run: Run) -> Iterator[str]:
    optim = run.optim
    if optim.schedule != "cosine" and optim.weight_decay_end not in (None, optim.weight_decay):
        yield (
            f"optim.weight_decay_end={optim.weight_decay_end:g} needs optim.schedule=cosine: with {optim.schedule} the "
            f"weight decay stays at optim.weight_decay={optim.weight_decay:g}"
        )
    if optim.schedule != "wsd" and optim.cooldown_epochs is not None:
        yield f"optim.cooldown_epochs is a setting of optim.schedule=wsd, not of {optim.schedule}"
    cooldown, warmup, epochs = optim.cooldown_epochs or 0, optim.warmup_epochs or 0, run.train.epochs
    if max(cooldown, warmup) <= epochs < cooldown + warmup:
        yield (
            f"optim.warmup_epochs={warmup:g} and optim.cooldown_epochs={cooldown:g} together are longer than the run "
            f"(train.epochs={epochs})"
        )


def _wrong_start(run: Run) -> Iterator[str]:
    """More than one place to start from, or a setting of a fork without one."""
    if run.train.start_from and (run.backbone.weights or run.backbone.pretrained):
        which = "backbone.weights" if run.backbone.weights else "backbone.pretrained"
        yield f"train.start_from (--from) and {which} both set the starting weights; leave one out"
    if run.train.restart_schedule and not run.train.start_from:
        yield "train.restart_schedule is a setting of a fork, and train.start_from (--from) names no run"


def to_yaml(run: AnyRun) -> str:
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=110)


def patch_in(name: str) -> int | None:
    """The patch size in one of our names; that of a timm model is known once it is built."""
    if name.startswith("timm/"):
        return None
    tail = name.partition("_patch")[2].partition("_")[0]
    return int(tail) if tail.isdigit() else None


def _string_keys(node: Any) -> Any:
    return {str(key): _string_keys(value) for key, value in node.items()} if isinstance(node, dict) else node


def _drop(tree: dict[str, Any], path: tuple[str, ...]) -> None:
    for section in path[:-1]:
        tree = tree[section] if isinstance(tree.get(section), dict) else {}
    tree.pop(path[-1], None)
