"""Size-aware defaults: what a setting is when its recipe does not say, and why."""

from __future__ import annotations

import math
import shlex
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError

from nearfar.ssl.errors import UserError
from nearfar.ssl.settings.listing import all_settings
from nearfar.ssl.settings.messages import in_words
from nearfar.ssl.settings.optimization import LossSettings, OptimSettings, TrainSettings
from nearfar.ssl.settings.run import AnyRun, DataSettings, EvalSettings, HeadSettings, Run
from nearfar.ssl.wording import counted

R = TypeVar("R", bound=AnyRun)
PUBLISHED_STEPS = 50_000  # DINO's shortest runs: 100 epochs of ImageNet in steps of 1,024 to 2,048 images


class Derived(NamedTuple):
    key: str
    value: Any
    reason: str


class ResolvedData(DataSettings):
    workers: int


class ResolvedHead(HeadSettings):
    prototypes: int
    batch_norm: bool


class ResolvedLoss(LossSettings):
    teacher_temp: float
    warmup_teacher_temp_epochs: float


class ResolvedOptim(OptimSettings):
    lr: float
    warmup_epochs: float
    weight_decay_end: float
    teacher_momentum: float
    teacher_momentum_end: float
    freeze_last_layer_epochs: float


class ResolvedTrain(TrainSettings):
    world_size: int
    threads: int


class ResolvedEval(EvalSettings):
    size: int
    resize: int
    knn_every_epochs: float


class ResolvedRun(Run):
    """A run with every derived value filled in: what `config.yaml` and every checkpoint hold."""

    data: ResolvedData
    head: ResolvedHead
    loss: ResolvedLoss
    optim: ResolvedOptim
    train: ResolvedTrain
    eval: ResolvedEval


def as_resolved(kind: type[R], run: AnyRun) -> R:
    """`run` as the resolved `kind` of it, which it was when it was written down. Raises UserError where it is not."""
    try:
        return kind.model_validate(run.model_dump())
    except ValidationError as error:
        mistakes = in_words(error, [setting.key for setting in all_settings(kind)])
        listed = "; ".join(mistake.message for mistake in mistakes)
        raise UserError(f"The settings of {run.name} are incomplete: {listed}.") from None


def resolve(
    run: Run,
    images: int,
    cores: int = 1,
    *,
    world_size: int | None = None,
    saved: Run | None = None,
    done: int = 0,
) -> tuple[ResolvedRun, list[Derived]]:
    """The settings that a run trains with, and which of them were derived: every one is decided here.

    Args:
        run: as requested; what it sets wins.
        images: number of training images.
        cores: CPU cores of each rank.
        world_size: number of ranks that were started.
        saved: the resolved settings of the run that this one continues.
        done: the steps of its newest checkpoint.

    Raises:
        UserError: they contradict the ranks, or the run that is continued.
    """
    if world_size is not None:
        run = on_ranks(run, world_size)
    if saved is not None:
        run = continued_or_longer(run, as_begun(saved), done / max(1, images // run.train.batch_size))
    run, derived = filled(run, [*_of_every_run(run, images, cores), *_of_parts(run, images)])
    return as_resolved(ResolvedRun, run), derived


def as_begun(saved: Run) -> Run:
    """The settings of a run, which may have begun before there was `optim.teacher_momentum_end`: its steps stay what
    they would have been."""
    optim = saved.optim
    if optim.teacher_momentum_end is not None:
        return saved
    end = 1.0 if optim.schedule == "cosine" else optim.teacher_momentum
    return saved.model_copy(update={"optim": optim.model_copy(update={"teacher_momentum_end": end})})


def on_ranks(run: R, world_size: int) -> R:
    """The run on `world_size` ranks. Raises UserError where that contradicts its settings."""
    if run.train.batch_size % world_size:
        sizes = " and ".join(map(str, dividing(run.train.batch_size, run.train.accumulate_steps, world_size)))
        raise UserError(
            f"train.batch_size={run.train.batch_size} cannot be split evenly over {world_size} ranks; {sizes} could."
        )
    if run.train.batch_size // world_size % run.train.accumulate_steps:
        raise UserError(
            f"The {run.train.batch_size // world_size} images of a step in each of {world_size} ranks do not divide "
            f"into train.accumulate_steps={run.train.accumulate_steps}."
        )
    if run.train.world_size not in (None, world_size):
        raise UserError(
            f"train.world_size={run.train.world_size}, but {world_size} processes were started. `nearfar pretrain` "
            "starts them on this machine; under torchrun or SLURM, and from Python, leave train.world_size out."
        )
    return run.model_copy(update={"train": run.train.model_copy(update={"world_size": world_size})})


def continued(run: R, saved: R, longer: bool = False) -> R:
    """`run` as the continuation of `saved`: what it leaves unset is taken from there.

    longer: may it have more epochs?

    Raises:
        UserError: naming each setting that would change the weights.
    """
    run = inherit(run, saved)
    train = run.train.model_copy(update={"start_from": saved.train.start_from})  # where it began stays what it was
    run = run.model_copy(update={"train": train})
    if not (longer and only_longer(saved, run)) and (changed := differences(saved, run)):
        raise UserError(
            f"{run.path} holds a run with other settings ({'; '.join(changed)}). Continue it with its own "
            "settings, or choose another name=."
        )
    return run


def only_longer(saved: AnyRun, run: AnyRun) -> bool:
    """Does `run` differ from `saved` by more epochs, and by nothing else?"""
    longer = run.train.epochs > saved.train.epochs
    return longer and all(each.startswith("train.epochs:") for each in differences(saved, run))


def continued_or_longer(run: Run, saved: Run, done: float = 0.0) -> Run:
    """`continued` for pretraining, where the run may have more epochs too, if that changes none of its steps so far.

    done: epochs of its newest checkpoint, where they are known.

    Raises:
        UserError: naming each setting that would change the weights.
    """
    run = continued(run, saved, longer=True)
    if run.train.epochs > saved.train.epochs and (why := _cannot_be_longer(saved, done)):
        raise UserError(
            f"train.epochs cannot be raised from {saved.train.epochs} to {run.train.epochs} in {run.path}: {why} "
            f"Fork it instead: `{fork_command(run, f'train.epochs={run.train.epochs}')}`."
        )
    return run


def _cannot_be_longer(saved: Run, done: float) -> str:
    """Why steps that are done would have been others in a longer run; empty where they would not."""
    kind, cooldown = saved.optim.schedule, saved.optim.cooldown_epochs or 0.0
    if kind == "cosine":
        return (
            "with optim.schedule=cosine every step depends on the length of the run (with constant and wsd it does "
            "not, before the cooldown)."
        )
    if kind == "wsd" and done > (begins := saved.train.epochs - cooldown):
        return (
            f"its rate has been falling since epoch {begins:g} (optim.cooldown_epochs={cooldown:g}). Take a checkpoint "
            "from before that, RUN@STEP, if train.keep_every kept one."
        )
    return ""


def fork_command(run: Run, *settings: str) -> str:
    """The command that goes on from the newest checkpoint of a run in a folder of its own, with other settings."""
    location = [] if run.folder == Run().folder else [f"folder={run.folder}"]
    return shlex.join(["nearfar", "pretrain", "--from", str(run.path), f"name={run.name}-fork", *location, *settings])


def inherit(run: R, saved: R) -> R:
    """Fill every `None` of `run` from a resolved run: a requeue on other cores must not derive other values."""
    tree = run.model_dump()
    for section, values in saved.model_dump().items():
        if isinstance(values, dict):
            kept = {key: value for key, value in tree[section].items() if value is not None}
            tree[section] = values | kept
    return run.as_asked().model_validate(tree)  # type: ignore[return-value]  # of the same kind


def differences(old: AnyRun, new: AnyRun) -> list[str]:
    """Dotted `key: old -> new` for every setting that would change the weights of a continued run."""
    found = []
    for setting in all_settings(new.as_asked()):
        before, after = value_of(old, setting.key), value_of(new, setting.key)
        if not setting.free and before != after:
            found.append(f"{setting.key}: {before} -> {after}")
    return found


def value_of(run: AnyRun, key: str) -> Any:
    """The value of a dotted setting."""
    node: Any = run
    for part in key.split("."):
        node = getattr(node, part)
    return node


def world_size(run: AnyRun, saved: AnyRun | None, cores: int, gpus: int) -> Derived:
    """Ranks of a run on this machine: as set, as the run was begun, or by its GPUs or cores. Known before images are
    read.

    gpus: that the run may use; 0: it trains on the CPU.

    Raises:
        UserError: more ranks are set than there are GPUs.
    """
    key, requested, begun = "train.world_size", run.train.world_size, saved and saved.train.world_size
    if requested:
        if gpus and requested > gpus:
            raise UserError(
                f"train.world_size={requested}, but {_gpus(gpus)} visible here, and each process needs one of its own. "
                f"Leave train.world_size out or say {gpus}, see that CUDA_VISIBLE_DEVICES hides none, or train on the "
                "CPU with train.device=cpu."
            )
        return Derived(key, requested, "as set")
    if begun and (not gpus or begun <= gpus):
        return Derived(key, begun, "as the run was begun" + (_unused(gpus - begun) if gpus else ""))
    if not gpus:
        count = local_ranks(run.train.batch_size // run.train.accumulate_steps, cores)
        return Derived(
            key, count, f"{counted(cores, 'core')}, and equal slices of at least 16 of {run.train.batch_size} images"
        )
    count = gpu_ranks(run.train.batch_size, run.train.accumulate_steps, gpus)
    reason = f"one for each of {gpus} GPUs" if count == gpus > 1 else "the GPU of this machine" if gpus == 1 else ""
    if not reason:
        sizes = " or ".join(map(str, dividing(run.train.batch_size, run.train.accumulate_steps, gpus)))
        one = "1 of" if count == 1 else f"equal slices of {run.train.batch_size} images on {count} of"
        reason = f"{one} {gpus} GPUs{_unused(gpus - count)}; train.batch_size={sizes} would use all"
    if begun:
        reason += f"; the run was begun by {begun} processes, for which there are not enough GPUs here"
    return Derived(key, count, reason)


def _gpus(count: int) -> str:
    return "one GPU is" if count == 1 else f"{count} GPUs are"


def _unused(count: int) -> str:
    return f", {count} left unused" if count > 0 else ""


def gpu_ranks(batch_size: int, accumulate_steps: int, gpus: int) -> int:
    """Processes for a run on this machine's GPUs: as many as GPUs, with equal slices of at least 2 images a part."""
    part = 2 * accumulate_steps
    fits = (n for n in range(gpus, 1, -1) if batch_size % (n * accumulate_steps) == 0 and batch_size >= n * part)
    return next(fits, 1)


def dividing(batch_size: int, accumulate_steps: int, ranks: int) -> list[int]:
    """The batch sizes nearest to this one, below and above, that `ranks` processes share in equal slices."""
    share = ranks * accumulate_steps
    below = batch_size // share * share
    return [size for size in (below, below + share) if size >= 2 * share and size != batch_size] or [2 * share]


def filled(run: R, candidates: list[Derived]) -> tuple[R, list[Derived]]:
    """The run with the candidates for whatever is `None` in it, and those that were taken."""
    derived = [each for each in candidates if value_of(run, each.key) is None]
    values: dict[str, dict[str, Any]] = {}
    for each in derived:
        section, field = each.key.split(".")
        values.setdefault(section, {})[field] = each.value
    sections = {name: getattr(run, name).model_copy(update=update) for name, update in values.items()}
    return run.model_copy(update=sections), derived


def _of_every_run(run: Run, images: int, cores: int) -> list[Derived]:
    """What every run has that follows from the number of images, its length and the cores of each rank.

    DINO's published values belong to 1.28 M images and 100 epochs or more. On a few thousand images 65,536
    prototypes leave the teacher's output flat (loss stays at ln K), and a teacher with momentum .996 never leaves
    its random start within a thousand steps; so both follow the size of the job.
    """
    epochs, batch, rank = run.train.epochs, run.train.batch_size, f"{counted(cores, 'core')} a rank"
    steps = max(1, epochs * (images // batch))
    temperature = 0.07 if images >= 100_000 and epochs >= 30 else 0.04
    momentum = round(min(0.996, max(0.98, 1 - 20 / steps)), 4)
    size = run.eval.size or run.views.global_crops_size
    cosine = run.optim.schedule == "cosine"
    decay_end = 0.4 if cosine else run.optim.weight_decay
    return [
        Derived("data.workers", min(8, cores - 1), rank),
        Derived("head.prototypes", _prototypes(images), f"about 16 images each for {images:,} images"),
        Derived("head.batch_norm", images < 100_000, f"{images:,} images"),
        Derived("loss.teacher_temp", temperature, ".07 from 100,000 images and 30 epochs on, else .04"),
        Derived("loss.warmup_teacher_temp_epochs", _share(epochs, 0.3, 30), "30 epochs or 30 % of the run"),
        Derived("optim.lr", 5e-4 * batch / 256, f"5e-4 x {batch} / 256"),
        Derived("optim.warmup_epochs", _share(epochs, 0.1, 10), "10 epochs or 10 % of the run"),
        Derived("optim.teacher_momentum", momentum, f"1 - 20 / {steps:,} steps, within .98 and .996"),
        _momentum_end(run, momentum, steps),
        Derived("optim.freeze_last_layer_epochs", _share(epochs, 0.05, 1), "1 epoch or 5 % of the run"),
        Derived("train.world_size", 1, "a process that was started alone"),
        Derived("train.threads", cores, rank),
        Derived("eval.size", size, "size of the global views"),
        Derived("eval.resize", round(size * 256 / 224), f"{size} x 256 / 224, as is usual"),
        Derived("eval.knn_every_epochs", max(1.0, epochs // 10), "about ten scores a run"),
        Derived("optim.weight_decay_end", decay_end, "DINO's" if cosine else f"constant with {run.optim.schedule}"),
    ]


def _momentum_end(run: Run, derived_start: float, steps: int) -> Derived:
    """The teacher's momentum at the end of the run.

    DINO's rises to 1, which over 125,000 steps stops the teacher for the last tenth of them, when the rate is nearly 0
    and the student with it. Of 5,000 steps it is the last quarter, and what the student learns there is lost: its 20-NN
    accuracy was 1.0 to 2.3 points above that of its teacher (docs/results.md).
    """
    key, start = "optim.teacher_momentum_end", run.optim.teacher_momentum
    start = derived_start if start is None else start
    if run.optim.schedule != "cosine":
        return Derived(key, start, f"constant with {run.optim.schedule}")
    if steps >= PUBLISHED_STEPS:
        return Derived(key, 1.0, f"DINO's, from {PUBLISHED_STEPS:,} steps on")
    return Derived(key, max(start, round(1 - 20 / steps, 5)), f"1 - 20 / {steps:,} steps, and not below the start")


def _of_parts(run: Run, images: int) -> list[Derived]:
    """What belongs to iBOT, Gram anchoring and the kind of schedule, where it is on."""
    epochs, parts = run.train.epochs, []
    if run.optim.schedule == "wsd":
        parts.append(Derived("optim.cooldown_epochs", _share(epochs, 0.2), "a fifth of the run"))
    if run.head.ibot_separate:
        prototypes = _prototypes(images) if run.head.prototypes is None else run.head.prototypes
        parts.append(Derived("head.ibot_prototypes", prototypes, "as head.prototypes"))
    if run.loss.gram_weight:
        parts.append(Derived("loss.gram_start_epoch", _share(epochs, 0.8), "the last fifth of the run"))
    return parts


def _prototypes(images: int) -> int:
    return int(2 ** round(math.log2(min(65536, max(128, images / 16)))))


def _share(epochs: int, share: float, most: float = math.inf) -> float:
    """A share of the epochs of a run, but at most so many."""
    return round(min(most, share * epochs), 2)


def local_ranks(batch_size: int, cores: int) -> int:
    """Processes for a CPU run on this machine: as many as cores, with equal slices of at least 16 images of a batch.

    Which is faster depends on the network: a process a core was between a fifth slower than threads in one and 1.4
    times as fast (docs/performance.md). It is the same run up to rounding, and says how many there are.
    """
    return max(n for n in range(1, cores + 1) if n == 1 or (batch_size % n == 0 and batch_size // n >= 16))
