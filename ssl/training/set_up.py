"""From settings to a run, ready at the step that it continues from."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from nearfar.ssl import checkpoint
from nearfar.ssl.data import open_loader
from nearfar.ssl.data.loaders.base import Loader, LoaderOptions
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.disk import checkpoint_names
from nearfar.ssl.learning import compiled, memory, pace
from nearfar.ssl.learning.learner import share_batch_norm
from nearfar.ssl.learning.loss_scale import LossScale
from nearfar.ssl.learning.student_teacher import StudentTeacher
from nearfar.ssl.parallel import device, distributed, gpus
from nearfar.ssl.parallel.device import Compute
from nearfar.ssl.parallel.distributed import Ranks
from nearfar.ssl.parallel.sharding import shard
from nearfar.ssl.run import announce, fork, resume, tracking
from nearfar.ssl.run.run_folder import START, RunFolder
from nearfar.ssl.settings.defaults import Derived, ResolvedRun
from nearfar.ssl.settings.finetune_settings import ResolvedFinetune
from nearfar.ssl.settings.optimization import TrainSettings
from nearfar.ssl.settings.run import AnyRun, Run
from nearfar.ssl.training.base import Observers, Training

T = TypeVar("T", bound=Training[Any, Any])


def set_up(kind: type[T], run: AnyRun, source: Source, observers: Observers, folder: RunFolder, world: Ranks) -> T:
    """Everything as it stands at the step that the run continues from, and its folder made ready for it.

    kind: what is learned, `Pretraining` or another.

    Raises:
        UserError: settings, data, folder or checkpoint are wrong. Then nothing in the folder was changed.
    """
    tracking.check(run.track)
    resolved, derived = _settings(kind, run, folder, len(source), world)
    torch.set_num_threads(resolved.train.threads)
    warnings: list[str] = []
    saved = resume.to_continue_from(folder, world, warnings)
    origin = fork.read(resolved.train.start_from) if saved is None and resolved.train.start_from else None
    learner, compute = learner_on_device(kind, resolved, source, weights=saved is None)
    loader = loader_of(resolved, source, world, compute.device)
    steps = resolved.train.epochs * loader.steps_per_epoch
    left = steps - (saved.state["step"] if saved else 0)
    # Tried before the networks are sharded, told with the other warnings.
    costs = costs_of(kind, resolved, learner, compute, left) if left > 0 else None
    if world.size > 1:
        _spread(learner, resolved.train.shard)
    optimizer = kind.optimizer_for(resolved, learner)
    if origin:
        step, notes = fork.begin(origin, learner, optimizer, resolved, source.fingerprint, loader.steps_per_epoch)
        warnings += notes
    else:
        step = resume.restore(saved, learner, optimizer, source.fingerprint) if saved else 0
    compute = compile_learner(learner, resolved.train, compute, warnings)
    if costs:
        warnings += announce.cost_lines(resolved, costs, steps - step, compute.compiled)
    description = kind.description_of(resolved, learner, source, compute.rounding)
    description["lineage"] = (saved.state.get("lineage") or []) if saved else fork.lineage(origin, resolved)
    if before := saved or origin:
        warnings += announce.continuation_changes(before.state, resolved, compute.rounding)
        warnings += announce.changed_versions(before.state, description["versions"])
    if world.first:
        folder.record(resolved)
        folder.forget_metrics_after(step)
    if saved:
        _export_missing_weights(kind, folder, step, learner, optimizer, description, world)
    else:
        _export_start(resolved, folder, step, learner, description, world)
    return kind(
        run=resolved,
        source=source,
        observers=observers,
        folder=folder,
        world=world,
        compute=compute,
        learner=learner,
        optimizer=optimizer,
        loader=loader,
        schedule=kind.schedule_for(resolved, loader.steps_per_epoch),
        step=step,
        resumed=saved is not None,
        description=description,
        derived=derived,
        warnings=warnings,
    )


def costs_of(
    kind: type[Training[Any, Any]],
    run: ResolvedRun | ResolvedFinetune,
    learner: StudentTeacher,
    compute: Compute,
    left: int,
) -> announce.Costs:
    """What a step will need; all ranks ask. The time only where half of the free memory is enough to try one image."""
    need, free = kind.needed(run, learner, compute), memory.free(compute.device)
    parts = run.train.accumulate_steps
    images = run.train.batch_size // run.train.world_size // parts
    ranks = run.train.world_size if compute.device.type == "cpu" else 1  # that share this memory, at most
    room = float("inf") if free is None else free / 2 / ranks - _size(learner.student)
    each = (need.activations + need.logits) / images
    most = distributed.from_first(lambda: int(min(images, max(0.0, room / each))))
    if not most:
        return announce.Costs(need, free, None)

    def loss_of(count: int) -> torch.Tensor:
        return kind.trial_loss(run, learner, count)

    seconds = pace.step_seconds(learner, loss_of, images, most, left * parts, compute.autocast)
    return announce.Costs(need, free, None if seconds is None else parts * seconds)


def learner_on_device(
    kind: type[Training[Any, Any]], run: AnyRun, source: Source, weights: bool
) -> tuple[Any, device.Compute]:
    """What a resolved run trains, on the device and in the precision that its settings choose.

    weights: read those that it begins with.

    Raises:
        UserError: the device is not there, or others have filled it.
    """
    learner = kind.built(run, source, weights)
    compute = device.choose(run.train.device, run.train.precision, learner.teacher.backbone.embed_dim)
    # Student, its gradients and (at most) two moments; the teacher; what stays as it is.
    needed = 4 * _size(learner.student) + _size(learner.teacher) + sum(map(_size, learner.frozen))
    gpus.require_room(compute.device, needed, "the weights and the optimizer's state")
    prepare_learner(learner, compute, run.train.checkpoint_activations)
    if compute.device.type == "cpu":
        device.keep_freed_memory()
    return learner, compute


def _spread(learner: StudentTeacher, sharded: bool) -> None:
    """Prepare a learner for several ranks: batch norm over all ranks' images, and its tensors in shards where set."""
    share_batch_norm(learner)
    if sharded:
        shard(learner.student, learns=True)
        shard(learner.teacher, learns=False)


def _export_missing_weights(
    kind: type[Training[Any, Any]],
    folder: RunFolder,
    step: int,
    learner: StudentTeacher,
    optimizer: torch.optim.Optimizer,
    description: dict[str, Any],
    world: Ranks,
) -> None:
    """Export again where a run that continues was killed, or out of space, between the two files of a save."""
    if distributed.from_first(lambda: folder.exported_step(kind.exported) != step):
        contents = resume.contents(learner, optimizer)  # all ranks go through it, to make sharded ones whole
        teacher = {name: tensor for name, tensor in contents if name.startswith("learner/teacher.")}
        if world.first:
            kind.export(folder, step, teacher, description)


def _export_start(
    run: AnyRun, folder: RunFolder, step: int, learner: StudentTeacher, description: dict[str, Any], world: Ranks
) -> None:
    """The backbone that a pretraining run begins with, if it was trained before: for later comparison."""
    if isinstance(run, Run) and fork.begins_with_weights(run):
        backbone = resume.teacher_backbone(learner)
        if world.first:
            checkpoint.export_tensors(folder.path / START, backbone, description | {"step": step})


def _size(module: torch.nn.Module) -> int:
    """Bytes of the parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def prepare_learner(learner: StudentTeacher, compute: Compute, recompute: bool) -> None:
    """To the device, with a scaled loss under fp16, and with activations computed a second time where asked."""
    if compute.fp16:
        learner.loss_scale = LossScale()
    if recompute:
        memory.recompute_activations(learner.student.backbone)
    learner.to(compute.device)


def compile_learner(learner: StudentTeacher, train: TrainSettings, compute: Compute, warnings: list[str]) -> Compute:
    """Compile what student and teacher do in training, as `train.compile` says. Returns how the run computes now."""
    backbones, mode = (learner.student.backbone, learner.teacher.backbone), train.compile
    if train.shard and mode == "auto":
        mode = False  # compiled blocks of sharded networks were never tried
    return compute._replace(compiled=compiled.switch_on(backbones, mode, compute.device, warnings))


def _settings(
    kind: type[Training[Any, Any]], run: AnyRun, folder: RunFolder, images: int, world: Ranks
) -> tuple[Any, list[Derived]]:
    """Resolved on the first rank, so that all have the same."""

    def resolved() -> list[Any]:
        saved = folder.saved(run.as_asked())
        done = checkpoint_names.newest_step(folder.checkpoints)
        cores = world.cores or distributed.available_cores()
        settings, derived = kind.resolved(run, images, cores, world.size, saved, done)
        return [settings.model_dump(mode="json"), [list(each) for each in derived]]

    settings, derived = distributed.from_first(resolved)
    return kind.settings.model_validate(settings), [Derived(*each) for each in derived]


def loader_of(run: ResolvedRun | ResolvedFinetune, source: Source, world: Ranks, target: torch.device) -> Loader:
    """The loader of one rank of the run, which makes views for the device `target`."""
    options = LoaderOptions(
        batch_size=run.train.batch_size // world.size,
        epochs=run.train.epochs,
        seed=run.train.seed,
        workers=run.data.workers,
        rank=world.rank,
        world_size=world.size,
        max_bad_fraction=run.data.max_bad_fraction,
        min_side=run.data.min_side,
    )
    return open_loader(source, run.views, options, loader=run.data.loader, color=run.data.color_on, device=target)
