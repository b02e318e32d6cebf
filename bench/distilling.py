"""Is a student better off with a teacher? The same student, distilled and trained alone by DINO, for the same time.

    python bench/distilling.py --data cifar10.beton --train train.npz --val test.npz --out /tmp/distilling \
        --teacher-seconds 900 --seconds 90 --seeds 0 1 2

Both follow recipes/cifar10.yaml (vit_tiny_patch4, width 96, depth 4, LGP, GAug and PRR) at a constant rate for as many
seconds of the process's CPU time, so that other work on the machine does not count; the frozen teacher's passes do.
The teacher is pretrained first, by DINO, twice as heavy (width 128, without GAug and PRR), or taken from --teacher.
Prints the 20-NN accuracy of `nearfar eval knn` for every seed, that of the teacher, and steps and seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from nearfar.launch.cli import main as nearfar
from nearfar.launch.recipes import find_recipe
from nearfar.ssl import config
from nearfar.ssl.data import open_source
from nearfar.ssl.settings.run import Run
from nearfar.ssl.train import pretrain

# Of all runs: one thread, no schedule that a run cut off by the clock would not see the end of.
COMMON = [
    "optim.schedule=constant", "optim.warmup_epochs=0.03", "optim.freeze_last_layer_epochs=0.03", "train.epochs=100",
    "train.world_size=1", "train.threads=1", "train.precision=fp32", "data.workers=0", "eval.knn_every_epochs=0",
    "optim.teacher_momentum=0.95",
]  # fmt: skip
TEACHER = [
    "backbone.embed_dim=128", "backbone.num_heads=2", "backbone.gaug=false", "backbone.prr=false",
    "views.local_crops_number=2", "optim.lr=0.0015", "optim.teacher_momentum=0.99",
]  # fmt: skip


def settings(name: str, arguments: argparse.Namespace, *more: str) -> Run:
    where = [f"name={name}", f"folder={arguments.out}", f"data.path={arguments.data}"]
    colors = ["data.color_on=loader"] if arguments.data.endswith(".beton") else []
    return config.load(find_recipe("cifar10"), [*where, *colors, *COMMON, *more])


def train(run: Run, seconds: float) -> tuple[int, float]:
    """For as many seconds of CPU time; returns steps and seconds."""
    begun = time.process_time()

    def spent() -> float:
        return time.process_time() - begun

    outcome = pretrain(run, open_source(run.data.path), should_stop=lambda: spent() > seconds)
    return outcome.step, spent()


def knn(run: Path, arguments: argparse.Namespace) -> float:
    """In percent."""
    file = arguments.out / f"{run.name}.json"
    given = ["--train", arguments.train, "--val", arguments.val, "--out", str(file), "--workers", "0"]
    assert nearfar(["eval", "knn", str(run), *given]) == 0
    found = json.loads(file.read_text())
    return float(next(score["percent"] for score in reversed(found["scores"]) if score["task"] == "knn"))


def compare(arguments: argparse.Namespace, say: Callable[[str], None]) -> None:
    teacher = arguments.teacher
    if teacher is None and "distilled" in arguments.ways:
        teacher = arguments.out / "teacher"
        steps, seconds = train(settings("teacher", arguments, *TEACHER), arguments.teacher_seconds)
        say(f"teacher: {steps} steps, {seconds:.0f} s of CPU time")
    if teacher is not None:
        say(f"teacher: {knn(teacher, arguments):.1f}")
    own = {"distilled": [f"distill.teacher={teacher}", "views.local_crops_number=0", "loss.koleo_weight=0"]}
    found: dict[str, list[float]] = {name: [] for name in arguments.ways}
    for seed in arguments.seeds:
        for name in arguments.ways:
            run = settings(f"{name}-{seed}", arguments, f"train.seed={seed}", *own.get(name, []))
            steps, seconds = train(run, arguments.seconds)
            found[name].append(knn(run.path, arguments))
            say(f"{name}, seed {seed}: {found[name][-1]:.1f} after {steps} steps, {seconds:.0f} s of CPU time")
    for name, scores in found.items():
        spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        say(f"{name}: {statistics.mean(scores):.1f}{spread} over {len(scores)} seeds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="training images")
    parser.add_argument("--train", required=True, help="labeled images for k-NN's memory")
    parser.add_argument("--val", required=True, help="labeled images to score")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--teacher", type=Path, help="a run, in place of one that is pretrained first")
    parser.add_argument("--teacher-seconds", type=float, default=900, help="CPU time for the teacher (default 900)")
    parser.add_argument("--seconds", type=float, default=90, help="CPU time for each student (default 90)")
    parser.add_argument("--ways", nargs="+", choices=["alone", "distilled"], default=["alone", "distilled"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    compare(parser.parse_args(), lambda text: print(text, flush=True))


if __name__ == "__main__":
    main()
