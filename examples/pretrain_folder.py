"""Pretrain a backbone on a folder of images, from Python, and read features with it.

    python examples/pretrain_folder.py ~/pictures train.epochs=20

Every setting of `nearfar pretrain --help` may follow the folder. The same call again continues the run.
"""

import argparse

import torch
from rich.console import Console

from nearfar.launch.pretrain import run_pretraining
from nearfar.ssl import config
from nearfar.ssl.checkpoint import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", help="images, in folders or not; labels are not used")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of the run")
    arguments = parser.parse_args()

    # A recipe file could stand in place of None; without one, only what differs from the defaults is said here.
    small = ["name=example", "backbone.name=vit_tiny_patch16", "backbone.lgp=true", "backbone.gaug=true"]
    run = config.load(None, [*small, f"data.path={arguments.folder}", *arguments.settings])
    outcome = run_pretraining(run, Console())

    backbone = load(outcome.folder).eval()  # the run folder says what the architecture is
    size = run.views.global_crops_size
    with torch.no_grad():
        tokens = backbone(torch.zeros(1, 3, size, size))  # ImageNet-normalized images (B, 3, H, W)
    print(f"{outcome.folder}: step {outcome.step} of {outcome.steps}")
    print(f"one image: CLS {tuple(tokens.cls.shape)}, patch map {tuple(tokens.map().shape)}")


if __name__ == "__main__":
    main()
