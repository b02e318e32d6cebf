"""What adapting keeps and gains: weights trained on one data set go on on another, naively and by `nearfar adapt`.

    python bench/adapting.py OLD OLD_VAL NEW NEW_VAL OUT [--seeds 3] [key=value ...]

For each seed: a run on OLD; from its weights a naive run on NEW (fresh heads, full rate, nothing frozen) and an adapted
one of the same length. Then the 20-NN accuracy of the start and of both on OLD and on NEW, with mean and standard
deviation. `key=value` go to all runs. --old and --new give settings to one kind of run alone. With --start RUN every
seed starts from that run on OLD, or from a file of any weights whose network the settings name.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path


def nearfar(*words: str) -> None:
    print("nearfar", shlex.join(words), flush=True)
    command = [sys.executable, "-m", "nearfar.launch.cli", *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])


def knn(run: Path, train: str, val: str, out: Path) -> float:
    """The 20-NN accuracy of a run, in percent."""
    nearfar("eval", "knn", str(run), "--train", train, "--val", val, "--out", str(out))
    (score,) = json.loads(out.read_text())["scores"]
    return float(score["percent"])


def measure(given: argparse.Namespace, seed: int) -> dict[str, tuple[float, float]]:
    """One seed: for each kind of weights, k-NN on the old images and on the new ones."""
    folder = given.out / f"seed{seed}"
    common = [*given.settings, f"train.seed={seed}", f"folder={folder}"]
    start, new = given.start or folder / "start", [f"data.path={given.new_images}", *shlex.split(given.new)]
    if not given.start:
        old_images = [f"data.path={given.old_images}", *shlex.split(given.old)]
        nearfar("pretrain", given.recipe, "name=start", *old_images, *common)
    nearfar("pretrain", given.recipe, *common, *new, "name=naive", f"backbone.weights={start}")
    # The recipe's own settings, so that the two differ by what `adapt` does and by nothing else.
    nearfar("adapt", str(start), given.new_images, *common, *new, "name=adapted", *shlex.split(given.adapt))
    scores = {}
    begun = folder / "adapted" / "start.safetensors"  # the same weights as `start`, which may be anybody's file
    for name, run in {"start": begun, "naive": folder / "naive", "adapted": folder / "adapted"}.items():
        sets = {"old": (given.old_images, given.old_val), "new": (given.new_images, given.new_val)}
        old, fresh = (knn(run, *paths, folder / f"{name}-{kind}.json") for kind, paths in sets.items())
        scores[name] = (old, fresh)
        print(f"seed {seed}, {name}: {old:.1f} on the old images, {fresh:.1f} on the new ones", flush=True)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("old_images", "old_val", "new_images", "new_val"):
        parser.add_argument(name)
    parser.add_argument("out", type=Path)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--recipe", default="cifar10", help="of all runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--start",
        type=Path,
        help="a run on OLD, or a file of weights, to begin with, instead of training one for each seed",
    )
    parser.add_argument("--old", default="", help="settings of the first run alone, quoted")
    parser.add_argument("--new", default="", help="settings of the other runs alone, quoted")
    parser.add_argument("--adapt", default="", help="settings of the adapted run alone, quoted")
    given = parser.parse_intermixed_args()
    found = [measure(given, seed) for seed in range(given.seeds)]
    print(f"\n20-NN in percent, {given.seeds} seeds: mean (standard deviation)")
    for name in found[0]:
        for index, what in enumerate(("old", "new")):
            values = [scores[name][index] for scores in found]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            print(f"  {name:<8} {what} images: {statistics.mean(values):5.1f} ({spread:.1f})")


if __name__ == "__main__":
    main()
