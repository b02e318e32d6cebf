"""Size-aware defaults: what a setting is when its recipe does not say, and why."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from nearfar.ssl.config import Run


class Derived(NamedTuple):
    key: str
    value: Any
    why: str


def resolve(run: Run, images: int, cores: int = 1) -> tuple[Run, list[Derived]]:
    """Fill every `None` that follows from the number of images, the length of the run and the cores of each rank.

    DINO's published values belong to 1.28 M images and 100 epochs or more. On a few thousand images 65,536
    prototypes leave the teacher's output flat (loss stays at ln K), and a teacher with momentum .996 never leaves
    its random start within a thousand steps; so both follow the size of the job.
    """
    derived: list[Derived] = []

    def default(section: str, field: str, value: Any, why: str) -> Any:
        current = getattr(getattr(run, section), field)
        if current is not None:
            return current
        derived.append(Derived(f"{section}.{field}", value, why))
        return value

    epochs, batch = run.train.epochs, run.train.batch_size
    steps = max(1, epochs * (images // batch))
    prototypes = 2 ** round(math.log2(min(65536, max(128, images / 16))))
    temperature = 0.07 if images >= 100_000 and epochs >= 30 else 0.04
    momentum = round(min(0.996, max(0.98, 1 - 20 / steps)), 4)
    filled = {
        "data": {"workers": default("data", "workers", min(8, cores - 1), f"{cores} cores a rank")},
        "head": {
            "prototypes": default("head", "prototypes", prototypes, f"about 16 images each for {images:,} images"),
            "batch_norm": default("head", "batch_norm", images < 100_000, f"{images:,} images"),
        },
        "loss": {
            "teacher_temp": default(
                "loss", "teacher_temp", temperature, ".07 from 100,000 images and 30 epochs on, else .04"
            ),
            "warmup_teacher_temp_epochs": default(
                "loss",
                "warmup_teacher_temp_epochs",
                round(min(30.0, 0.3 * epochs), 2),
                "30 epochs or 30 % of the run",
            ),
        },
        "optim": {
            "lr": default("optim", "lr", 5e-4 * batch / 256, f"5e-4 x {batch} / 256"),
            "warmup_epochs": default(
                "optim", "warmup_epochs", round(min(10.0, 0.1 * epochs), 2), "10 epochs or 10 % of the run"
            ),
            "teacher_momentum": default(
                "optim", "teacher_momentum", momentum, f"1 - 20 / {steps:,} steps, within .98 and .996"
            ),
            "freeze_last_layer_epochs": default(
                "optim", "freeze_last_layer_epochs", round(min(1.0, 0.05 * epochs), 2), "1 epoch or 5 % of the run"
            ),
        },
        "train": {
            "world_size": default("train", "world_size", 1, "a process that was started alone"),
            "threads": default("train", "threads", cores, f"{cores} cores a rank"),
        },
        "eval": {
            "size": default("eval", "size", run.views.global_crops_size, "size of the global views"),
            "resize": default("eval", "resize", run.eval.size or run.views.global_crops_size, "no border is cut away"),
            "knn_every_epochs": default("eval", "knn_every_epochs", max(1.0, epochs // 10), "about ten scores a run"),
        },
    }
    sections = {name: getattr(run, name).model_copy(update=values) for name, values in filled.items()}
    return run.model_copy(update=sections), derived


def local_ranks(batch_size: int, cores: int) -> int:
    """Processes for a CPU run on this machine: as many as cores, with equal slices of at least 16 images of a batch.

    Small operators gain little from threads: a process a core was 1.4 times as fast as two threads in one.
    """
    return max(n for n in range(1, cores + 1) if n == 1 or (batch_size % n == 0 and batch_size // n >= 16))
