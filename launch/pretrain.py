"""One pretraining run from the command line: the loop of `nearfar.ssl.train` with signals, pictures and online k-NN."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from torch import Tensor

from nearfar.eval.pictures.view_sheet import contact_sheet, save
from nearfar.launch.local import processes
from nearfar.launch.local.stop_signals import StopFlag
from nearfar.launch.online_scores import OnlineKNN, OnlineScores, StartSimilarity
from nearfar.ssl import config, train
from nearfar.ssl.data import open_source
from nearfar.ssl.data.loaders.base import Batch
from nearfar.ssl.parallel.distributed import Ranks
from nearfar.ssl.run.run_folder import START
from nearfar.ssl.settings.run import Run


def run_pretraining(run: Run, console: Console) -> train.Outcome:
    """Train `run`, or continue it. SIGTERM, SIGUSR2 and Ctrl-C save a checkpoint and return an unfinished outcome.

    Under torchrun or srun this is one of the processes they started; otherwise it starts the others: one for each
    visible GPU, or by the cores, unless `train.world_size` says how many.

    Raises:
        UserError: as `nearfar.ssl.train.pretrain`; `data.path` or `data.val` holds no images; the device is not there,
            or has fewer GPUs than `train.world_size`.
        PeerError: another of the run's processes ended.
    """
    return processes.in_all(run, console, pretrain_rank)


def pretrain_rank(run: Run, console: Console, world: Ranks) -> train.Outcome:
    """The part of `run_pretraining` that each process of the run does."""
    config.require_images(run)
    source = open_source(run.data.path)
    with StopFlag() as stop:
        score = None
        shared = world.size > 1 and not run.train.shard  # of a sharded teacher only the first rank has a whole copy
        if run.data.val and (world.first or shared):
            say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
            score = OnlineKNN(source, open_source(run.data.val), run.eval.knn_max_images, stop, shared, say)
            if score.missing and world.first:
                say(f"No online k-NN of data.path ({run.data.path}) and data.val ({run.data.val}): {score.missing}")
        probe = OnlineScores(score, StartSimilarity(source, run.path / START)) if world.first else None
        observers = train.Observers(save_views, probe, score.assist if score else None)
        return train.pretrain(run, source, observers, stop, console, world)


def save_views(batch: Batch, colored: list[Tensor], folder: Path) -> np.ndarray:
    """The first batch as the networks see it, one row an image: runs/NAME/views.png, and its pixels (H, W, 3)."""
    picture = contact_sheet(colored)
    save(picture, folder / "views.png")
    return np.asarray(picture.convert("RGB"))
