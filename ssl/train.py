"""The loop: images -> views -> tokens -> loss -> step -> checkpoint. Start again with the same run to continue it."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from nearfar.ssl import checkpoint, config, device
from nearfar.ssl.augment import colour, colour_of, normalise
from nearfar.ssl.backbones import Backbone, UserError, create
from nearfar.ssl.config import Run
from nearfar.ssl.data import Batch, Loader
from nearfar.ssl.heads.dino import DINOHead
from nearfar.ssl.health import CollapseWatch, teacher_health
from nearfar.ssl.journal import Journal
from nearfar.ssl.learner import Learner, Network, clip_gradients, parameter_groups
from nearfar.ssl.losses import DINOLoss
from nearfar.ssl.run_folder import RunFolder
from nearfar.ssl.schedule import Schedule
from nearfar.ssl.sources import Source


@dataclass(frozen=True)
class Observers:
    """What the floors above want to see of a run. None of it may change the run."""

    views: Callable[[Batch, list[Tensor], Path], None] | None = None  # first batch, coloured views, run folder
    probe: Callable[[Backbone, Run], dict[str, float]] | None = None  # scores of the teacher, every so often


@dataclass(frozen=True)
class Outcome:
    folder: Path
    step: int
    steps: int
    seconds: float

    @property
    def finished(self) -> bool:
        return self.step >= self.steps


def build_learner(run: Run) -> Learner:
    """Student and teacher as the settings say, seeded: the same weights on every machine and every start."""
    torch.manual_seed(run.train.seed)
    backbone, head, loss = run.backbone, run.head, run.loss
    prototypes, batch_norm = head.prototypes, head.batch_norm
    assert prototypes is not None and batch_norm is not None
    switches = backbone.model_dump(exclude={"drop_path"})
    size = run.views.global_size

    def network(drop_path: float) -> Network:
        body = create(img_size=size, drop_path=drop_path, **switches)
        return Network(body, DINOHead(body.embed_dim, prototypes, head.hidden, head.bottleneck, batch_norm))

    student, teacher = network(backbone.drop_path), network(0.0)
    learner = Learner(
        student, teacher, DINOLoss(prototypes, loss.student_temp, loss.center_momentum, loss.balance == "sinkhorn")
    )
    return learner.train()


def pretrain(
    run: Run,
    source: Source,
    observers: Observers = Observers(),
    should_stop: Callable[[], bool] = lambda: False,
    console: Console | None = None,
) -> Outcome:
    """Train `run` on `source` in its folder, from where it stands to its end.

    `should_stop` is asked after every step; True saves a checkpoint and returns. Continuing is bit-exact on a CPU in
    float32: weights, optimiser and centre come from the checkpoint, everything else is a function of the step.

    Raises:
        UserError: settings, data, folder, disk or checkpoint are wrong, or the loss is no longer finite.
    """
    console = console or Console()
    with RunFolder(Path(run.folder) / run.name) as folder:
        run, derived = folder.settle(run, len(source))
        assert run.data.workers is not None and run.train.threads is not None
        torch.set_num_threads(run.train.threads)
        loader = Loader(
            source,
            run.views,
            batch_size=run.train.batch_size,
            epochs=run.train.epochs,
            seed=run.train.seed,
            workers=run.data.workers,
            bad_share=run.data.bad_share,
            min_side=run.data.min_side,
        )
        schedule = Schedule(run, loader.steps_per_epoch)
        learner = build_learner(run)
        width = learner.teacher.backbone.embed_dim
        compute = device.choose(run.train.device, run.train.precision, width)
        learner.to(compute.device)
        names = {parameter: name for name, parameter in learner.student.named_parameters()}
        optimizer = torch.optim.AdamW(parameter_groups(learner.student), lr=0.0, fused=True)
        warnings: list[str] = []
        saved = checkpoint.latest(folder.checkpoints, warnings.append)
        step = _restore(saved, learner, optimizer, names, source.fingerprint) if saved else 0
        folder.forget_metrics_after(step)

        def save() -> None:
            tensors = {f"learner/{name}": tensor for name, tensor in learner.state_dict().items()}
            tensors |= {
                f"optimizer/{name}": tensor for name, tensor in checkpoint.optimizer_tensors(optimizer, names).items()
            }
            about = _about(run, learner, step, source.fingerprint)
            checkpoint.save(folder.checkpoints, step, tensors, about, run.train.keep)
            checkpoint.export(folder.path / "teacher.safetensors", learner.teacher.backbone, about)

        with Journal(folder.path, schedule.steps, step, console) as journal:
            for line in [*warnings, *_start_lines(run, derived, learner, schedule, compute, step, source)]:
                journal.say(line)
            watch = CollapseWatch(grace=schedule.steps // 10)
            begun = saved_at = logged_at = time.monotonic()
            waited, logged_step = 0.0, step
            known_bad = 0
            if step < schedule.steps:
                loader.seek(*divmod(step, loader.steps_per_epoch))
                batches = iter(loader)
            while step < schedule.steps:
                asked = time.monotonic()
                batch = next(batches)
                waited += time.monotonic() - asked
                if len(loader.bad) > known_bad:
                    for name, why in list(loader.bad.items())[known_bad:]:
                        journal.say(f"Bad image {name}: {why}. The next readable image takes its place.")
                    known_bad = len(loader.bad)
                coloured = colour_views(batch, run.views.solarise_threshold, compute.device)
                if step == 0 and observers.views:
                    observers.views(batch, coloured, folder.path)

                values = schedule.at(step)
                torch.manual_seed(_step_seed(run.train.seed, step))
                with compute.autocast():
                    out = learner([normalise(group) for group in coloured], values["teacher_temp"])
                out.loss.backward()
                if schedule.prototypes_frozen(step):
                    learner.student.head.prototypes.grad = None
                grad_norm = clip_gradients(list(learner.student.parameters()), run.optim.clip)
                if not bool(torch.isfinite(out.loss.detach() + grad_norm)):  # before it reaches the weights
                    raise UserError(
                        _not_finite(step, float(out.loss.detach()), float(grad_norm), batch, source, folder.path)
                    )
                for group in optimizer.param_groups:
                    group["lr"] = values["lr"]
                    group["weight_decay"] = values["wd"] if group["decays"] else 0.0
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                learner.loss.update_center(out.teacher_logits)
                learner.update_teacher(values["ema"])
                step += 1

                now = time.monotonic()
                if step % run.train.log_every == 0 or step == schedule.steps:
                    health = teacher_health(out.teacher_probabilities, out.teacher_features)
                    seconds = max(1e-9, now - logged_at)
                    speed = {
                        "img_per_s": (step - logged_step) * run.train.batch_size / seconds,
                        "data_wait": waited / seconds,
                        "time": time.time(),
                    }
                    measured = {"loss": float(out.loss.detach()), "grad_norm": float(grad_norm), **values, **health}
                    journal.record(step, {"epoch": step / loader.steps_per_epoch, **measured, **speed})
                    journal.progress(
                        step,
                        f"loss {measured['loss']:.3f}  {speed['img_per_s']:.0f} img/s  "
                        f"waits {100 * speed['data_wait']:.0f} %  entropy {health['entropy']:.2f}",
                    )
                    if message := watch.look(step, health):
                        journal.say(message)
                    waited, logged_at, logged_step = 0.0, time.monotonic(), step

                if observers.probe and _probe_due(run, step, loader.steps_per_epoch, schedule.steps):
                    learner.teacher.eval()
                    scores = observers.probe(learner.teacher.backbone, run)
                    learner.teacher.train()
                    if scores:
                        journal.record(step, {"epoch": step / loader.steps_per_epoch, **scores})
                        journal.say(f"step {step}: " + ", ".join(f"{k} {v:.1f}" for k, v in scores.items()))
                    logged_at, logged_step, waited = time.monotonic(), step, 0.0

                stop = should_stop()
                steps_due = run.train.save_steps is not None and step % run.train.save_steps == 0
                minutes_due = time.monotonic() - saved_at > 60 * run.train.save_minutes
                if stop or steps_due or minutes_due or step == schedule.steps:
                    save()
                    saved_at = time.monotonic()
                if stop and step < schedule.steps:
                    journal.say(f"Stopped after step {step} of {schedule.steps}. The same command continues from here.")
                    break
            return Outcome(folder.path, step, schedule.steps, time.monotonic() - begun)


def colour_views(batch: Batch, solarise_threshold: int, place: torch.device) -> list[Tensor]:
    """The colour half of every view, on `place`: uint8 groups -> float (G, B, 3, s, s) within [0, 1]."""
    coloured, first = [], 0
    for group in batch.groups:
        count = group.shape[0]
        plan = colour_of(batch.plan, slice(first, first + count))
        images = group.to(place, non_blocking=True).flatten(0, 1)
        coloured.append(colour(images, plan, solarise_threshold).unflatten(0, group.shape[:2]))
        first += count
    return coloured


def _step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Seed of a step's drop-path: no generator state is carried from step to step."""
    return (seed % 2**20 << 43) + (rank % 2**12 << 31) + step % 2**31


def _restore(
    saved: checkpoint.Checkpoint,
    learner: Learner,
    optimizer: torch.optim.Optimizer,
    names: dict[nn.Parameter, str],
    fingerprint: str,
) -> int:
    if saved.state["data"] != fingerprint:
        raise UserError(
            f"The run was begun on other images than data.path holds now (fingerprint {saved.state['data']}, now "
            f"{fingerprint}). Continue it on the same images, or choose another name=."
        )
    parts: dict[str, dict[str, Tensor]] = {"learner": {}, "optimizer": {}}
    for full, tensor in saved.tensors.items():
        part, _, name = full.partition("/")
        parts[part][name] = tensor
    checkpoint.load_strict(learner, parts["learner"], str(saved.path))
    checkpoint.load_optimizer(optimizer, names, parts["optimizer"])
    return int(saved.state["step"])


def _about(run: Run, learner: Learner, step: int, fingerprint: str) -> dict[str, Any]:
    return {
        "step": step,
        "arch": learner.teacher.backbone.arch,
        "run": run.model_dump(mode="json"),
        "data": fingerprint,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }


def _probe_due(run: Run, step: int, steps_per_epoch: int, steps: int) -> bool:
    every = run.eval.knn_every or 0.0
    return every > 0 and (step == steps or step % max(1, round(every * steps_per_epoch)) == 0)


def _start_lines(
    run: Run,
    derived: list[config.Derived],
    learner: Learner,
    schedule: Schedule,
    compute: device.Compute,
    step: int,
    source: Source,
) -> list[str]:
    lines = [f"derived {key} = {value}  ({why})" for key, value, why in derived]
    parameters = sum(p.numel() for p in learner.student.backbone.parameters())
    lines.append(
        f"{run.name}: {run.backbone.name}, {parameters / 1e6:.2f} M parameters, on {len(source):,} images; "
        f"{run.train.epochs} epochs = {schedule.steps:,} steps; {compute.device.type}, {compute.precision}, "
        f"{run.data.workers} workers, folder loader"
    )
    if step >= schedule.steps:
        lines.append(f"This run is already finished (step {step}): nothing to train.")
    elif step:
        lines.append(f"Continuing from step {step} of {schedule.steps}.")
    return lines


def _not_finite(step: int, loss: float, grad_norm: float, batch: Batch, source: Source, folder: Path) -> str:
    files = ", ".join(source.name(int(index)) for index in batch.index[:4])
    return (
        f"At step {step} the loss is {loss} and the gradient's norm {grad_norm}: not finite, so the weights were left "
        f"as they were and the run stopped. The last checkpoint in {folder} is from before. The batch began with "
        f"{files}. Try a lower optim.lr, a longer optim.warmup_epochs, optim.clip=1, or train.precision=fp32."
    )
