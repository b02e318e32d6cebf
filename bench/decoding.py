"""Images a second for evaluation on one core: libjpeg-turbo and compiled loops beside Pillow, whose pixels are equal.

    python bench/decoding.py IMAGES [--images 400] [--rounds 3]

IMAGES: JPEGs in folders, or a .beton. Both ways take turns in one process (and one thread, or one worker process), so
that a busy machine slows both; what counts is the ratio. Needs FFCV.
"""

import argparse
import time
from statistics import median
from unittest import mock

import torch

from nearfar.eval.features import images
from nearfar.eval.features.images import View, batches
from nearfar.ssl.data import libjpeg, open_source
from nearfar.ssl.data.sources.base import Source, Subset

VIEW = View((224, 224), 256, whole=False)


def speed(source: Source, workers: int) -> float:
    """Images a second."""
    numbers = [range(first, min(first + 32, len(source))) for first in range(0, len(source), 32)]
    began = time.perf_counter()
    count = sum(len(batch.index) for batch in batches(source, VIEW, numbers, workers=workers, pinned=False))
    return count / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    libjpeg.require("This comparison")
    torch.set_num_threads(1)
    whole = open_source(arguments.source)
    source = Subset(whole, range(min(len(whole), arguments.images)))
    speed(Subset(source, range(1)), 0)  # compiles
    for workers, where in ((0, "in the main thread"), (1, "in one worker")):
        compiled, pillow = [], []
        for _ in range(arguments.rounds):
            compiled.append(speed(source, workers))
            with mock.patch.object(images, "compiled", return_value=False):
                pillow.append(speed(source, workers))
        ratios = sorted(a / b for a, b in zip(compiled, pillow, strict=True))
        print(
            f"{where}: compiled {median(compiled):,.0f} images/s, Pillow {median(pillow):,.0f}, "
            f"{median(ratios):.2f} times as fast ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
