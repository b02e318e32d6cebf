"""A fork: a new run that begins with a checkpoint of another one, and with other settings.

Student, teacher, heads and center are taken over. By default the run goes on at the checkpoint's step, with its
moments: nothing changed, it ends with the bits of the run that it left. With train.restart_schedule it begins at step 0
of a schedule of its own, and the moments, which belong to another rate and other gradients, begin at zero.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nearfar.ssl import checkpoint, config
from nearfar.ssl.backbones.weights import misfits, weights_in
from nearfar.ssl.checkpoint import Checkpoint
from nearfar.ssl.disk import digests
from nearfar.ssl.disk.checkpoint_names import step_of
from nearfar.ssl.errors import UserError
from nearfar.ssl.learning.learner import Learner
from nearfar.ssl.learning.loss_scale import fitted
from nearfar.ssl.parallel.sharding import whole
from nearfar.ssl.run import kept
from nearfar.ssl.settings.defaults import Derived, ResolvedRun
from nearfar.ssl.settings.listing import all_settings
from nearfar.ssl.settings.run import AnyRun, Run

# Parts that one of the two runs may have alone: they begin afresh, or are left out.
_PARTS = re.compile(r"(^|\.)(mask_token$|patch_head\.|ibot\.|anchor\.)")
# Settings of backbone and head that do not change a shape.
_ANY_VALUE = {"backbone.drop_path", "backbone.weights", "backbone.pretrained", "backbone.scan", "head.pooling"}


class ForkStart(NamedTuple):
    """step: at which the fork begins. notes: what the user should know."""

    step: int
    notes: list[str]


def located(run: Run) -> tuple[Run, list[Derived]]:
    """`run` with train.start_from as RUN@STEP, and what it leaves open about heads and sizes taken from there.

    Raises:
        UserError: no such checkpoint, or it is the run's own.
    """
    if not run.train.start_from:
        return run, []
    path = kept.named(run.train.start_from)
    if path.parent.parent.resolve() == run.path.resolve():
        raise UserError(
            f"train.start_from={run.train.start_from} is a checkpoint of {run.path} itself, and a fork needs a folder "
            "of its own: choose another name=."
        )
    where = f"{path.parent.parent}@{step_of(path)}"
    source = config.validate(read(where).state["run"])
    derived = []
    for key, value in source.head.model_dump().items():
        of_a_part_that_is_off = key == "ibot_prototypes" and not run.head.ibot_separate
        if value is not None and getattr(run.head, key) is None and not of_a_part_that_is_off:
            derived.append(Derived(f"head.{key}", value, f"as in {where}"))
    made_for = source.backbone.img_size or source.views.global_crops_size
    if run.backbone.img_size is None and made_for != run.views.global_crops_size:
        derived.append(Derived("backbone.img_size", made_for, f"positions as in {where}, resampled for every view"))
    tree = run.model_dump()
    tree["train"]["start_from"] = where
    for key, value, _ in derived:
        section, _, field = key.partition(".")
        tree[section][field] = value
    return config.validate(tree), derived


def read(where: str) -> Checkpoint:
    """The checkpoint of RUN@STEP, whole. Raises UserError where it is missing or damaged, or holds no run."""
    path = kept.named(where)
    try:
        saved = checkpoint.read(path)
    except checkpoint.DamagedError as error:
        raise UserError(
            f"The checkpoint {path} is damaged: {error}. Start from another one of that run (RUN@STEP)."
        ) from None
    if not isinstance(saved.state.get("run"), dict):
        raise UserError(f"The checkpoint {path} does not say which settings it was trained with.")
    check_pretraining(saved.state["run"], path.parent.parent)
    return saved


def check_pretraining(settings: Mapping[str, Any], run: Path) -> None:
    """Raises UserError where `settings`, those of a run's folder, are not of pretraining."""
    if "classifier" in settings:
        raise UserError(
            f"{run} is a supervised run, and a fork goes on with pretraining: to begin with its backbone, set "
            f"backbone.weights={run} in place of train.start_from (--from)."
        )


def begins_with_weights(run: Run) -> bool:
    """Does a run start its schedule with weights that were trained before?"""
    return bool(run.backbone.weights or run.backbone.pretrained or run.train.restart_schedule)


def lineage(saved: Checkpoint | None, run: AnyRun) -> list[dict[str, Any]]:
    """What a run that begins records: where its weights come from, the oldest first. saved: what it is a fork of."""
    if saved is None:
        if not run.backbone.weights:
            return []
        file = weights_in(Path(run.backbone.weights))
        return [{"from": str(file), "step": None, "data": None, "sha256": digests.of_file(file)}]
    digest = json.loads((saved.path / checkpoint.MANIFEST).read_text())["files"][checkpoint.TENSORS]["sha256"]
    before: list[dict[str, Any]] = saved.state.get("lineage") or []
    here = {"from": str(saved.path.parent.parent), "step": saved.state["step"], "data": saved.state.get("data")}
    return [*before, here | {"sha256": digest}]


def begin(
    saved: Checkpoint,
    learner: Learner,
    optimizer: torch.optim.Optimizer,
    run: ResolvedRun,
    fingerprint: str,
    steps_per_epoch: int,
) -> ForkStart:
    """Put the checkpoint's weights (and moments) into a learner that was just built.

    Args:
        fingerprint: of the run's images.
        steps_per_epoch: of the run.

    Raises:
        UserError: weights of other shapes, or a step of the checkpoint that is none of this run.
    """
    step = 0 if run.train.restart_schedule else _step_to_go_on(saved, run, fingerprint, steps_per_epoch)
    parts: dict[str, dict[str, Tensor]] = {"learner": {}, "optimizer": {}}
    for full, tensor in saved.tensors.items():
        part, _, name = full.partition("/")
        parts[part][name] = tensor
    given = fitted(parts["learner"], learner.loss_scale)
    new_anchor = bool(run.loss.gram_teacher) or run.train.restart_schedule  # just read; or what the run begins with
    if new_anchor:
        given = {name: tensor for name, tensor in given.items() if not name.startswith("anchor.")}
    own = learner.state_dict()
    fresh = [name for name in own if name not in given and _PARTS.search(name)]
    dropped = [name for name in given if name not in own and _PARTS.search(name)]
    given = {name: tensor for name, tensor in given.items() if name not in dropped}
    if problems := misfits(own, given, fresh):
        raise UserError(_other_network(saved, run, problems))
    checkpoint.load_strict(learner, given | {name: whole(own[name]) for name in fresh}, str(saved.path))
    if any(n.startswith("anchor.") for n in fresh) and not run.loss.gram_teacher:
        learner.take_anchor()
    if not run.train.restart_schedule:
        names = {parameter: name for name, parameter in learner.student.named_parameters()}
        known = set(names.values())
        moments = {n: t for n, t in parts["optimizer"].items() if n.partition("/")[2] in known}
        checkpoint.load_optimizer(optimizer, names, moments)
    return ForkStart(step, _differences(saved, run, fresh, dropped))


def _differences(saved: Checkpoint, run: ResolvedRun, fresh: list[str], dropped: list[str]) -> list[str]:
    how = "at step 0 of its own schedule, with a fresh optimizer state"
    if not run.train.restart_schedule:
        how = f"at step {saved.state['step']}, with its optimizer state"
    lines = [f"A fork of {run.train.start_from}, which begins {how}."]
    for names, what in (
        (fresh, "start from scratch, since that run had none"),
        (dropped, "are left out: this run has none"),
    ):
        kinds = dict.fromkeys(found[2].strip(".") for name in names if (found := _PARTS.search(name)))
        lines += [f"Of the fork, {', '.join(kinds)} {what}."] if kinds else []
    return lines


def _step_to_go_on(saved: Checkpoint, run: ResolvedRun, fingerprint: str, steps_per_epoch: int) -> int:
    step, source = int(saved.state["step"]), saved.state["run"]
    other = []
    if saved.state.get("data") != fingerprint:
        other.append(f"other images (fingerprint {saved.state.get('data')}, now {fingerprint})")
    if (before := source.get("train", {}).get("batch_size")) != run.train.batch_size:
        other.append(f"train.batch_size {before} -> {run.train.batch_size}")
    if other:
        raise UserError(
            f"A fork of {run.train.start_from} cannot go on at step {step} with {' and '.join(other)}, since its steps "
            "see other images. Add train.restart_schedule=true to begin at step 0 with these weights."
        )
    if (before := source.get("optim", {}).get("name", "adamw")) != run.optim.name:
        raise UserError(
            f"A fork of {run.train.start_from} cannot go on at step {step} with optim.name={run.optim.name}: the "
            f"checkpoint has the moments of {before}. Add train.restart_schedule=true to begin at step 0 with these "
            "weights."
        )
    if step >= run.train.epochs * steps_per_epoch:
        longer = step // steps_per_epoch + 1
        raise UserError(
            f"{run.train.start_from} is at step {step}, and train.epochs={run.train.epochs} ends at "
            f"{run.train.epochs * steps_per_epoch}: nothing is left to train. Set train.epochs={longer} or more, or "
            "train.restart_schedule=true to begin at step 0 with these weights."
        )
    return step


def _other_network(saved: Checkpoint, run: ResolvedRun, problems: list[str]) -> str:
    source = config.validate(saved.state["run"])
    changed = []
    for setting in all_settings():
        section, _, field = setting.key.partition(".")
        if section in ("backbone", "head") and setting.key not in _ANY_VALUE:
            before, after = (getattr(getattr(each, section), field) for each in (source, run))
            changed += [f"{setting.key}: {before} -> {after}"] if before != after else []
    what = f"other settings of its networks ({'; '.join(changed)})" if changed else "networks of other shapes"
    return (
        f"A fork of {run.train.start_from} cannot have {what}: {'; '.join(problems)}. Leave them as they were; to take "
        "over the backbone alone, with new heads, set backbone.weights in place of train.start_from (--from)."
    )
