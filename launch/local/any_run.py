"""A run of either kind: which function trains it."""

from __future__ import annotations

from rich.console import Console

from nearfar.launch import finetune, pretrain
from nearfar.launch.local import processes
from nearfar.ssl.parallel.distributed import Ranks
from nearfar.ssl.settings.finetune_settings import FinetuneRun
from nearfar.ssl.settings.run import Run
from nearfar.ssl.train import Outcome


def train(run: Run | FinetuneRun, console: Console) -> Outcome:
    """Train a run of either kind, or continue it, in all of its processes: `processes.in_all`, with its errors and
    those of `run_pretraining`."""
    return processes.in_all(run, console, train_rank)


def train_rank(run: Run | FinetuneRun, console: Console, world: Ranks) -> Outcome:
    """The part of `train` that each process of the run does."""
    if isinstance(run, FinetuneRun):
        return finetune.finetune_rank(run, console, world)
    return pretrain.pretrain_rank(run, console, world)
