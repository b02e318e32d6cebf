"""What the tests of scores share: images whose color is their class, and whose masks say where it is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from nearfar.ssl.data.sources.base import ArraySource


@pytest.fixture(scope="session")
def colored() -> Callable[[int, int], ArraySource]:
    """Makes n images (16, 16) of a seed: squares on noise, whose color is the class and whose pixels are the mask."""

    def make(n: int, seed: int) -> ArraySource:
        rng = np.random.default_rng(seed)
        images = rng.integers(0, 120, (n, 16, 16, 3), dtype=np.uint8)
        masks = np.zeros((n, 16, 16), np.uint8)
        labels = np.arange(n) % 3
        for i, label in enumerate(labels):
            r, c = rng.integers(0, 8, 2)
            images[i, r : r + 8, c : c + 8] = np.eye(3)[label] * 255
            masks[i, r : r + 8, c : c + 8] = label + 1
        return ArraySource(images, labels=labels, masks=masks, classes=["red", "green", "blue"])

    return make
