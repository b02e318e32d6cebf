"""`nearfar demo`: draw scenes, pretrain on them, score the frozen features, write the report. No download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console

from nearfar.eval.results import HEADLINES
from nearfar.launch.computing import compute_for
from nearfar.launch.pretrain import run_pretraining
from nearfar.launch.recipes import find_recipe
from nearfar.launch.scenes.compose import CLASSES, make_scenes
from nearfar.launch.scenes.style import Style
from nearfar.launch.scoring.report import report_run
from nearfar.launch.scoring.score import ScoreOptions, Subject, protocol_of, score, sources
from nearfar.ssl import config
from nearfar.ssl.data import libjpeg
from nearfar.ssl.data.beton_writer import write_beton
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.disk.files import atomic

TRAIN, VAL = 2000, 1000  # scenes
HEAD_STEPS = 800  # of the segmentation head
# What all views of a scene share is what DINO learns first. With many kinds of background that is the background, and
# minutes are not enough to get past it: here they are of one kind. Scenes differ in color, light and polarity instead,
# which the views take away and which neighbors in pixel space go by.
STYLE = Style(
    backgrounds=("even",),
    clutter=0,
    color=0.8,
    texture=0.2,
    contrast=(0.45, 0.65),
    digit_height=(0.65, 0.85),
    shift=0.5,
    rotation=8.0,
    shear=0.1,
)


def demo(seed: int, settings: list[str], console: Console) -> None:
    """The whole demo, in runs/demo (other seeds: runs/demo-seedN). A second call continues it or shows its results."""
    name = "demo" if seed == 0 else f"demo-seed{seed}"
    preset = [f"name={name}", f"train.seed={seed}"]
    run = config.load(find_recipe("demo"), preset + settings)
    data = run.path / "data"
    paths = draw(data, seed)
    preset += [f"data.{key}={value}" for key, value in paths.items()]
    if paths["path"].suffix == ".beton":
        preset.append("data.color_on=loader")  # quicker than on the device, when that is a CPU
    run = config.load(find_recipe("demo"), [*preset, *settings])
    console.print(f"Scenes: {TRAIN:,} to learn from without labels, {VAL:,} to score, in {data}", highlight=False)
    outcome = run_pretraining(run, console)
    if not outcome.finished:
        return
    subject = Subject.of(outcome.folder)
    subject = subject.on(compute_for(subject.backbone, run.train.device, "train.device="))
    train, val = sources(run, None, None)
    # Tokens of 8x8 pixels of a digit must know the rest of it: read after PRR, with a head that can combine channels.
    protocol = protocol_of(subject, grid_layer="final", head="mlp", steps=HEAD_STEPS)
    score(
        subject, train, val, tasks=HEADLINES, options=ScoreOptions(baselines=True, protocol=protocol), console=console
    )
    report = report_run(outcome.folder, subject)
    console.print(f"Report: {report}   Curves: tensorboard --logdir {outcome.folder}", highlight=False, soft_wrap=True)


def draw(folder: Path, seed: int) -> dict[str, Path]:
    """The demo's two files of scenes, drawn unless they are there: {"path": train, "val": val}.

    With FFCV they are .beton files, which its loader reads; otherwise .npz.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES[1:]))
    files = {}
    for key, split, count in (("path", "train", TRAIN), ("val", "val", VAL)):
        beton, npz = folder / f"{split}.beton", folder / f"{split}.npz"
        files[key] = beton if beton.exists() or (libjpeg.available() and not npz.exists()) else npz
        if files[key].exists():
            continue
        scenes = make_scenes(count, seed, "train" if split == "train" else "val", style=STYLE)
        if files[key] == beton:
            write_beton(ArraySource(scenes.images, scenes.labels, scenes.masks, CLASSES[1:]), beton)
        else:
            with atomic(npz) as partial, partial.open("wb") as file:
                np.savez(file, images=scenes.images, label=scenes.labels, mask=scenes.masks)
    return files
