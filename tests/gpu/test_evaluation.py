"""Evaluation on the device: the features of the CPU to rounding, and the same neighbors to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nearfar.eval.features.extraction import Reading, extract
from nearfar.eval.features.images import Decoding
from nearfar.eval.knn import knn
from nearfar.eval.linear import linear_probe
from nearfar.eval.neighbors import neighbors
from nearfar.ssl.backbones import create
from nearfar.ssl.data.sources.base import ArraySource


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("layer", "pooling"), [("final", "cls"), ("blocks-2", "cls+mean"), ("last-block", "grid")])
def test_features_are_those_of_the_cpu(device: torch.device, layer: str, pooling: str, workers: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (23, 32, 32, 3), np.uint8)
    source = ArraySource(images, labels=np.arange(23) % 4)
    model = create("vit_tiny_patch8", img_size=32, embed_dim=48, depth=2, num_heads=3, lgp=True, gaug=True, prr=True)
    reading = Reading(32 if pooling != "grid" else (32, 32), layer=layer, pooling=pooling)
    expected = extract(model, source, reading, Decoding(8, workers=0))
    found = extract(model.to(device), source, reading, Decoding(8, workers=workers))
    np.testing.assert_allclose(found.x, expected.x, rtol=1e-4, atol=1e-4)
    assert found.index.tolist() == expected.index.tolist() and found.manifest == expected.manifest


def blobs(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise around 10 directions."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(7).standard_normal((10, 48), dtype=np.float32)
    y = rng.integers(0, 10, n)
    return centers[y] + 1.5 * rng.standard_normal((n, 48), dtype=np.float32), y


def test_neighbors_have_the_bits_of_the_cpu(device: torch.device) -> None:
    memory, queries = blobs(9000, 0)[0], blobs(1100, 1)[0]
    memory[100:110] = memory[50]  # ties
    found, expected = (neighbors(memory, queries, 50, device=each) for each in (device, "cpu"))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_scores_are_those_of_the_cpu(device: torch.device) -> None:
    train, test = blobs(2000, 0), blobs(500, 1)
    assert knn(*train, *test, device=device) == knn(*train, *test)
    found, expected = (linear_probe(*train, *test, epochs=3, device=each) for each in (device, "cpu"))
    assert found["top1"] == pytest.approx(expected["top1"], abs=1.0) and expected["top1"] > 50
