"""What a run says at its start and at a bad end, in plain words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nearfar.ssl.backbones import choose_scan
from nearfar.ssl.config import Run
from nearfar.ssl.data.loaders.base import Batch
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.defaults import Derived
from nearfar.ssl.device import Compute
from nearfar.ssl.learner import Learner


def start_lines(
    run: Run,
    derived: list[Derived],
    learner: Learner,
    steps: int,
    compute: Compute,
    step: int,
    source: Source,
    loader: str,
) -> list[str]:
    lines = [f"derived {key} = {value}  ({why})" for key, value, why in derived]
    parameters = sum(p.numel() for p in learner.student.backbone.parameters())
    lines.append(
        f"{run.name}: {run.backbone.name}, {parameters / 1e6:.2f} M parameters, on {len(source):,} images; "
        f"{run.train.epochs} epochs = {steps:,} steps; {compute.device.type}, {compute.precision}, "
        f"ranks: {run.train.world_size}, each with threads: {run.train.threads}, workers: {run.data.workers}, {loader}"
    )
    if run.backbone.name.startswith("vim_"):
        chosen = choose_scan(run.backbone.scan, compute.device.type)
        lines.append(f"selective scan: {chosen} (backbone.scan={run.backbone.scan})")
    if step >= steps:
        lines.append(f"This run is already finished (step {step}): nothing to train.")
    elif step:
        lines.append(f"Continuing from step {step} of {steps}.")
    return lines


def continued_otherwise(saved: dict[str, Any], run: Run, precision: str) -> list[str]:
    """What a checkpoint's state says was otherwise before, so that the run goes on with other bits."""
    lines = []
    if (ranks := saved.get("world_size", 1)) != run.train.world_size:
        drawn = ", and drop-path draws others" if run.backbone.drop_path else ""
        lines.append(
            f"Saved by {ranks} ranks, continued by {run.train.world_size}: the same run, but sums are rounded "
            f"otherwise{drawn}."
        )
    if (before := saved.get("precision", precision)) != precision:
        lines.append(f"Saved in {before}, continued in {precision}: the same run, but not the same bits.")
    return lines


def not_finite(step: int, loss: float, grad_norm: float, batch: Batch, source: Source, folder: Path) -> str:
    files = ", ".join(source.name(int(index)) for index in batch.index[:4])
    return (
        f"At step {step} the loss is {loss} and the gradient's norm {grad_norm}: not finite, so the weights were left "
        f"as they were and the run stopped. The last checkpoint in {folder} is from before. The batch began with "
        f"{files}. Try a lower optim.lr, a longer optim.warmup_epochs, optim.clip_grad=1, or train.precision=fp32, "
        "under another name= (a run keeps its settings)."
    )
