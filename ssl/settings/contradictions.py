"""Settings that are each valid alone and contradict each other, in words."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from nearfar.ssl.patches import whole_patches
from nearfar.ssl.settings.run import AnyRun, BackboneSettings, Run, ViewSettings
from nearfar.ssl.settings.section import Section

MAX_NAME_BYTES = 200  # of a run; file systems take 255, and the rest is left for prefixes and suffixes


def of_pretraining(run: Run) -> list[str]:
    """Every contradiction between the settings of a pretraining run."""
    files = {
        "train.start_from": run.train.start_from,
        "loss.gram_teacher": run.loss.gram_teacher,
        "distill.teacher": run.distill.teacher,
        "distill.teacher_weights": run.distill.teacher_weights,
    }
    found = [*wrong_names(run, **files), *_wrong_views(run.views), *_wrong_sizes(run), *wrong_backbone(run.backbone)]
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
    """Batch sizes that do not divide evenly among processes and their parts."""
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


def wrong_ranges(section: str, values: Section, names: Sequence[str], areas: Sequence[str]) -> Iterator[str]:
    """Pairs of numbers that do not rise from above 0. areas: those that are shares of an image's area too."""
    for name in names:
        low, high = getattr(values, name)
        if not 0 < low <= high:
            yield f"{section}.{name} must be two rising numbers above 0, not [{low:g}, {high:g}]"
    for name in areas:
        if getattr(values, name)[1] > 1:
            yield f"{section}.{name} is a share of the image's area and cannot exceed 1"


def wrong_side(key: str, size: int, backbone: BackboneSettings) -> Iterator[str]:
    """A side in pixels that is not made of whole patches, as far as the backbone's name tells their size."""
    patch = backbone.patch_size or patch_in(backbone.name)
    if patch and size % patch:
        less = ", and smaller than one patch" if size < patch else ""
        yield f"{key}={size} is not a multiple of the patch size {patch}{less} (nearest: {whole_patches(size, patch)})"


def wrong_resize(resize: int | None, size: int) -> Iterator[str]:
    """An image of an evaluation that is made smaller than what is cut out of it."""
    if resize and resize < size:
        yield f"eval.resize={resize} is smaller than the crop eval.size={size}"


def _wrong_views(views: ViewSettings) -> Iterator[str]:
    areas = ("global_crops_scale", "local_crops_scale")
    yield from wrong_ranges("views", views, (*areas, "ratio", "blur_sigma"), areas)
    for name in ("blur_prob", "solarize_prob"):
        if not all(0 <= p <= 1 for p in getattr(views, name)):
            yield f"views.{name} must be probabilities between 0 and 1"


def _wrong_sizes(run: Run) -> Iterator[str]:
    """Sides in pixels that do not fit each other or the patches."""
    views, patch = run.views, run.backbone.patch_size or patch_in(run.backbone.name)
    yield from wrong_side("views.global_crops_size", views.global_crops_size, run.backbone)
    if views.local_crops_number:
        yield from wrong_side("views.local_crops_size", views.local_crops_size, run.backbone)
        if views.local_crops_size > views.global_crops_size:
            sizes = f"({views.local_crops_size} px) are larger than global ones ({views.global_crops_size} px)"
            yield f"local views {sizes}"
    if patch and run.eval.size and run.eval.size < patch:
        yield f"eval.size={run.eval.size} is smaller than one patch of the backbone ({patch} pixels)"
    yield from wrong_resize(run.eval.resize, run.eval.size or views.global_crops_size)


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
        yield "head.ibot_prototypes needs a separate head for patches (head.ibot_separate=true); they share that of CLS"
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
    for key, weight in loss:
        if key.endswith("_weight") and weight:
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
    if optim.schedule != "cosine" and optim.teacher_momentum_end not in (None, optim.teacher_momentum):
        yield (
            f"optim.teacher_momentum_end={optim.teacher_momentum_end:g} needs optim.schedule=cosine: with "
            f"{optim.schedule} the momentum stays what it is (optim.teacher_momentum_end=null)"
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


def patch_in(name: str) -> int | None:
    """The patch size in one of our names; that of a timm model is known once it is built."""
    if name.startswith("timm/"):
        return None
    tail = name.partition("_patch")[2].partition("_")[0]
    return int(tail) if tail.isdigit() else None
