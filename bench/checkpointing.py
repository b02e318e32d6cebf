"""How long training waits for a checkpoint that is written at once, and for one that is written in the background.

    python bench/checkpointing.py [--model vit_small_patch16] [--prototypes 65536] [--rounds 5] [--folder DIR]

One process trains on given views and saves: in each round first with train.save_in_background=false, then with true.
The ratio is the median over the rounds of the one wait by the other, beside the smallest and the largest. While a
checkpoint is written in the background the steps go on; on a CPU they share its cores, and what they lose to it (their
time beyond the median step without a writer) is a cost of the checkpoint too. Shares are those of a run that saves
every `--every` minutes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from nearfar.ssl import config
from nearfar.ssl.learning.dino import build_dino_learner
from nearfar.ssl.learning.optim import adamw
from nearfar.ssl.learning.step import Stepper
from nearfar.ssl.parallel import device
from nearfar.ssl.run import resume
from nearfar.ssl.run.background_save import Saver
from nearfar.ssl.run.run_folder import RunFolder
from nearfar.ssl.settings.defaults import resolve

VALUES = {"lr": 1e-6, "weight_decay": 0.04, "teacher_momentum": 0.996, "teacher_temp": 0.04}


class Round(NamedTuple):
    """Seconds of one round."""

    at_once: float  # that training waited for a checkpoint
    background: float  # the same
    writing: float  # from then on until it was on the disk
    lost: float  # by the steps meanwhile


def measure(
    model: str, prototypes: int, batch: int, rounds: int, folder: Path, device_name: str
) -> tuple[list[Round], int]:
    """The rounds, and the bytes of a checkpoint."""
    settings = [f"backbone.name={model}", f"head.prototypes={prototypes}", "head.batch_norm=false"]
    run = resolve(config.load(None, settings), 100_000)[0]
    compute = device.choose(device_name, "auto", 10**6)
    if compute.device.type == "cpu":
        device.keep_freed_memory()
    learner = build_dino_learner(run).to(compute.device)
    optimizer = adamw(learner.student)
    stepper = Stepper(learner, optimizer, 3.0, compute.autocast)
    views = [torch.randn(2, batch, 3, 224, 224), torch.randn(2, batch, 3, 96, 96)]
    views = [group.to(compute.device) for group in views]

    def step() -> float:
        begun = time.monotonic()
        stepper(views, VALUES).report.read()
        return time.monotonic() - begun

    description = resume.self_description(run, learner, "none", compute.precision)
    with RunFolder(folder) as run_folder:

        def write(number: int, tensors: dict[str, torch.Tensor]) -> None:
            resume.write(run_folder, number, tensors, description, run.train)

        usual = statistics.median([step() for _ in range(8)][2:])
        size = sum(tensor.nbytes for _, tensor in resume.contents(learner, optimizer))
        with Saver(write, print, False) as at_once, Saver(write, print) as background:
            done = []
            for number in range(rounds + 1):
                begun = at_once.seconds, background.seconds
                at_once.save(2 * number, resume.contents(learner, optimizer))
                background.save(2 * number + 1, resume.contents(learner, optimizer))
                waited, started, steps = background.seconds - begun[1], time.monotonic(), []
                while background.writing:
                    steps.append(step())
                writing = time.monotonic() - started
                lost = max(0.0, sum(steps) - usual * len(steps))
                done.append(Round(at_once.seconds - begun[0], waited, writing, lost))
    return done[1:], size  # in the first one the memory of the copy is new


def table(rounds: list[Round], size: int, every: float) -> str:
    """Markdown; `every`: minutes between two checkpoints."""
    ratios = [each.at_once / each.background for each in rounds]
    at_once, background, writing, lost = (statistics.median(column) for column in zip(*rounds, strict=True))
    share = 100 / (60 * every)
    return "\n".join(
        [
            f"A checkpoint of {size / 1e6:.0f} MB, {len(rounds)} rounds, shares at one every {every:g} minutes:",
            "",
            "| | training waits, s | share of the run |",
            "|---|--:|--:|",
            f"| at once | {at_once:.3f} | {share * at_once:.3f} % |",
            f"| in the background | {background:.3f} | {share * background:.3f} % |",
            f"| and what the steps lose to {writing:.1f} s of writing | {lost:.3f} | {share * lost:.3f} % |",
            "",
            f"Waiting is {statistics.median(ratios):.1f} times shorter ({min(ratios):.1f} .. {max(ratios):.1f}).",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16")
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--every", type=float, default=5.0, help="minutes between two checkpoints")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure; default: that of temporary files")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rounds, size = measure(
            arguments.model,
            arguments.prototypes,
            arguments.batch,
            arguments.rounds,
            Path(folder) / "run",
            arguments.device,
        )
    print(table(rounds, size, arguments.every))


if __name__ == "__main__":
    main()
