"""The loop: images -> views -> tokens -> loss -> step -> checkpoint. Start again with the same run to continue it."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from nearfar.ssl import checkpoint, device, distributed
from nearfar.ssl.announce import continued_otherwise, not_finite, start_lines
from nearfar.ssl.backbones import Backbone, create
from nearfar.ssl.config import Run
from nearfar.ssl.data.loaders.base import Batch
from nearfar.ssl.data.loaders.choose import open_loader
from nearfar.ssl.data.sources.files import Source
from nearfar.ssl.data.transforms.colors import color_views, normalize
from nearfar.ssl.defaults import Derived
from nearfar.ssl.distributed import ALONE, Ranks
from nearfar.ssl.errors import UserError
from nearfar.ssl.heads.dino import DINOHead
from nearfar.ssl.health import CollapseWatch, teacher_health
from nearfar.ssl.learner import Learner, Network, clip_gradients, parameter_groups, share_batch_norm
from nearfar.ssl.losses import DINOLoss
from nearfar.ssl.run_folder import TEACHER, RunFolder
from nearfar.ssl.run_log import Journal, Silence
from nearfar.ssl.schedule import Schedule


@dataclass(frozen=True)
class Observers:
    """What the floors above want to see of a run, on its first rank. None of it may change the run."""

    views: Callable[[Batch, list[Tensor], Path], None] | None = None  # first batch, colored views, run folder
    probe: Callable[[Backbone, Run], dict[str, float] | None] | None = None  # scores of the teacher; None: stopped


@dataclass(frozen=True)
class Outcome:
    folder: Path
    step: int
    steps: int
    seconds: float

    @property
    def finished(self) -> bool:
        return self.step >= self.steps


def build_learner(run: Run, weights: bool = True) -> Learner:
    """Student and teacher as the settings say, seeded: the same weights on every machine and every start.

    weights: read backbone.weights, if set; a run that continues from a checkpoint does not need that file any more.
    """
    torch.manual_seed(run.train.seed)
    backbone, head, loss = run.backbone, run.head, run.loss
    prototypes, batch_norm = head.prototypes, head.batch_norm
    assert prototypes is not None and batch_norm is not None
    switches = backbone.model_dump(exclude={"drop_path", "weights"})
    size = run.views.global_crops_size

    def network(drop_path: float, file: str | None = None) -> Network:
        body = create(img_size=size, drop_path=drop_path, weights=file, **switches)
        projection = DINOHead(body.embed_dim, prototypes, head.hidden_dim, head.bottleneck_dim, batch_norm)
        return Network(body, projection, head.pooling)

    student, teacher = network(backbone.drop_path, backbone.weights if weights else None), network(0.0)
    dino = DINOLoss(prototypes, loss.student_temp, loss.center_momentum, loss.centering == "sinkhorn_knopp")
    return Learner(student, teacher, dino, loss.koleo_weight).train()


def pretrain(
    run: Run,
    source: Source,
    observers: Observers = Observers(),
    should_stop: Callable[[], bool] = lambda: False,
    console: Console | None = None,
    world: Ranks = ALONE,
) -> Outcome:
    """Train `run` on `source` in its folder, from where it stands to its end, as one of the ranks of `world`.

    `should_stop` is asked in every step; True on any rank saves a checkpoint after that step and returns. Continuing is
    bit-exact on a CPU in float32 on as many ranks: weights, optimizer and center come from the checkpoint, everything
    else is a function of the step.

    Raises:
        UserError: settings, data, folder, disk or checkpoint are wrong, or the loss is no longer finite.
        PeerError: another rank ended.
    """
    console = console or Console(quiet=not world.first)
    run = _over(run, world)
    with distributed.joined(world), RunFolder(run.path, owns=world.first) as folder:
        answer = distributed.from_first(lambda: _as_json(*folder.settle(run, len(source), world.cores)))
        run, derived = Run.model_validate(answer[0]), [Derived(*each) for each in answer[1]]
        assert run.data.workers is not None and run.train.threads is not None
        torch.set_num_threads(run.train.threads)
        warnings: list[str] = []
        saved = _latest(folder, warnings, world)
        learner = build_learner(run, weights=saved is None)
        compute = device.choose(run.train.device, run.train.precision, learner.teacher.backbone.embed_dim)
        learner.to(compute.device)
        if compute.device.type == "cpu":
            device.keep_freed_memory()
        loader = open_loader(
            source,
            run.views,
            batch_size=run.train.batch_size // world.size,
            epochs=run.train.epochs,
            seed=run.train.seed,
            workers=run.data.workers,
            rank=world.rank,
            world_size=world.size,
            max_bad_fraction=run.data.max_bad_fraction,
            min_side=run.data.min_side,
            loader=run.data.loader,
            color=run.data.color_on,
            device=compute.device,
        )
        schedule = Schedule(run, loader.steps_per_epoch)
        if world.size > 1:
            share_batch_norm(learner)
        parameters = list(learner.student.parameters())
        names = {parameter: name for name, parameter in learner.student.named_parameters()}
        optimizer = torch.optim.AdamW(parameter_groups(learner.student), lr=0.0, fused=True)
        step = _restore(saved, learner, optimizer, names, source.fingerprint) if saved else 0
        if saved:
            warnings += continued_otherwise(saved.state, run, compute.precision)
        about = _about(run, learner, source.fingerprint, compute.precision)

        def export() -> None:
            checkpoint.export(folder.path / TEACHER, learner.teacher.backbone, about | {"step": step})

        if world.first:
            folder.record(run)
            folder.forget_metrics_after(step)
            if saved and folder.exported_step() != step:  # killed, or out of space, between the two files of a save
                export()

        def save() -> None:
            if not world.first:
                return
            tensors = {f"learner/{name}": tensor for name, tensor in learner.state_dict().items()}
            state = checkpoint.optimizer_tensors(optimizer, names)
            tensors |= {f"optimizer/{name}": tensor for name, tensor in state.items()}
            checkpoint.save(folder.checkpoints, step, tensors, about | {"step": step}, run.train.keep_last)
            export()

        def score() -> bool:
            """Score the teacher as it is, once; True where a stop came first and leaves that to the next start."""
            if observers.probe is None or folder.scored(step):
                return False
            learner.teacher.eval()
            scores = observers.probe(learner.teacher.backbone, run)
            learner.teacher.train()
            if scores:
                journal.record(step, {"epoch": step / loader.steps_per_epoch, **scores})
                journal.say(f"step {step}: " + ", ".join(f"{k} {v:.1f}" for k, v in scores.items()))
            return scores is None

        with Journal(folder.path, schedule.steps, step, console) if world.first else Silence() as journal:
            for line in [
                *warnings,
                *start_lines(run, derived, learner, schedule.steps, compute, step, source, loader.word),
            ]:
                journal.say(line)
            watch = CollapseWatch(grace=schedule.steps // 10)
            begun = saved_at = logged_at = time.monotonic()
            waited, logged_step = 0.0, step
            known_bad: set[str] = set()
            if step < schedule.steps:
                loader.seek(*divmod(step, loader.steps_per_epoch))
                batches = iter(loader)
            stop = bool(saved) and schedule.scores_due(step) and distributed.from_first(score)
            while step < schedule.steps and not stop:
                asked = time.monotonic()
                batch = next(batches)
                waited += time.monotonic() - asked
                colored = color_views(batch, run.views.solarize_threshold, compute.device)
                if step == 0 and observers.views and world.first:
                    observers.views(batch, colored, folder.path)

                values = schedule.at(step)
                torch.manual_seed(_step_seed(run.train.seed, step, world.rank))
                with compute.autocast():
                    out = learner([normalize(group) for group in colored], values["teacher_temp"])
                out.loss.backward()
                if schedule.prototypes_frozen(step):
                    learner.student.head.prototypes.grad = None
                distributed.average_gradients(parameters)
                grad_norm = float(clip_gradients(parameters, run.optim.clip_grad))
                bad = [item for item in loader.bad.items() if item[0] not in known_bad]
                mine = torch.tensor([float(out.loss.detach()), should_stop(), len(bad)], dtype=torch.float64)
                loss, stop, any_bad = distributed.all_mean_(mine).tolist()
                for text in distributed.gathered([json.dumps(item) for item in bad]) if any_bad else ():
                    name, why = json.loads(text)
                    journal.say(f"Bad image {name}: {why}. The next readable image takes its place.")
                    known_bad.add(name)
                if not math.isfinite(loss + grad_norm):  # before it reaches the weights
                    raise UserError(not_finite(step, loss, grad_norm, batch, source, folder.path))
                for group in optimizer.param_groups:
                    group["lr"] = values["lr"]
                    group["weight_decay"] = values["weight_decay"] if group["decays"] else 0.0
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                learner.loss.update_center(out.teacher_logits)
                learner.update_teacher(values["teacher_momentum"])
                step += 1

                now = time.monotonic()
                if step % run.train.log_every_steps == 0 or step == schedule.steps:
                    health = teacher_health(out.teacher_probabilities, out.teacher_features)
                    health = distributed.mean_of(health | {name: float(part) for name, part in out.parts.items()})
                    seconds = max(1e-9, now - logged_at)
                    speed = {
                        "img_per_s": (step - logged_step) * run.train.batch_size / seconds,
                        "data_wait": waited / seconds,
                        "time": time.time(),
                    }
                    measured = {"loss": loss, "grad_norm": grad_norm, **values, **health}
                    journal.record(step, {"epoch": step / loader.steps_per_epoch, **measured, **speed})
                    journal.progress(
                        step,
                        f"loss {measured['loss']:.3f}  {speed['img_per_s']:.0f} img/s  "
                        f"waits {100 * speed['data_wait']:.0f} %  entropy {health['entropy']:.2f}",
                    )
                    if message := watch.look(step, health):
                        journal.say(message)
                    waited, logged_at, logged_step = 0.0, time.monotonic(), step

                if schedule.scores_due(step) and not stop:
                    stop = distributed.from_first(score)
                    logged_at, logged_step, waited = time.monotonic(), step, 0.0

                steps_due = run.train.save_every_steps is not None and step % run.train.save_every_steps == 0
                minutes_due = time.monotonic() - saved_at > 60 * run.train.save_every_minutes
                if stop or steps_due or minutes_due or step == schedule.steps:
                    save()
                    saved_at = time.monotonic()
            if stop and step < schedule.steps:
                journal.say(f"Stopped after step {step} of {schedule.steps}. The same command continues from here.")
            return Outcome(folder.path, step, schedule.steps, time.monotonic() - begun)


def _as_json(run: Run, derived: list[Derived]) -> list[Any]:
    return [run.model_dump(mode="json"), [list(each) for each in derived]]


def _over(run: Run, world: Ranks) -> Run:
    """The run on as many ranks as there are."""
    if run.train.batch_size % world.size:
        raise UserError(f"train.batch_size={run.train.batch_size} does not divide into {world.size} ranks.")
    if run.train.world_size not in (None, world.size):
        raise UserError(
            f"train.world_size={run.train.world_size}, but {world.size} processes were started. `nearfar pretrain` "
            "starts them on this machine; under torchrun or SLURM, and from Python, leave train.world_size out."
        )
    return run.model_copy(update={"train": run.train.model_copy(update={"world_size": world.size})})


def _step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Seed of a step's drop-path: no generator state is carried from step to step."""
    return (seed % 2**20 << 43) + (rank % 2**12 << 31) + step % 2**31


def _latest(folder: RunFolder, warnings: list[str], world: Ranks) -> checkpoint.Checkpoint | None:
    """The checkpoint to continue from: the first rank chooses it, and all read it."""
    saved = checkpoint.latest(folder.checkpoints, warnings.append) if world.first else None
    path = distributed.from_first(lambda: str(saved.path) if saved else None)
    return saved or (checkpoint.read(Path(path)) if path else None)


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


def _about(run: Run, learner: Learner, fingerprint: str, precision: str) -> dict[str, Any]:
    return {
        "world_size": run.train.world_size,
        "precision": precision,
        "arch": learner.teacher.backbone.arch,
        "run": run.model_dump(mode="json"),
        "data": fingerprint,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
