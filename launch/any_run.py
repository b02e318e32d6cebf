"""A run of either kind: which function trains it."""

from __future__ import annotations

from rich.console import Console

from nearfar.launch import finetune, pretrain
from nearfar.ssl.distributed import Ranks
from nearfar.ssl.finetune_settings import FinetuneRun
from nearfar.ssl.settings import Run
from nearfar.ssl.train import Outcome


def train(run: Run | FinetuneRun, console: Console) -> Outcome:
    """`run_pretraining` or `run_finetuning`, whichever the run is for."""
    if isinstance(run, FinetuneRun):
        return finetune.run_finetuning(run, console)
    return pretrain.run_pretraining(run, console)


def train_rank(run: Run | FinetuneRun, console: Console, world: Ranks) -> Outcome:
    """The part of `train` that each process of the run does."""
    if isinstance(run, FinetuneRun):
        return finetune.train_rank(run, console, world)
    return pretrain.train_rank(run, console, world)
