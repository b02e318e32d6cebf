from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare, ks_2samp

import nearfar.ssl.backbones  # noqa: F401  makes torchvision importable everywhere
from nearfar.ssl.data.views import epoch_order, philox, plan_views
from nearfar.ssl.settings.run import ViewSettings

FIELDS = ("box", "flip", "jitter", "factors", "order", "gray", "sigma", "solarize")


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known answers that come with Random123
        ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: tuple[int, int], words: str) -> None:
    assert " ".join(f"{int(word):08x}" for word in philox(counter, key)) == words


def test_philox_of_many_counters_is_that_of_each() -> None:
    counters = np.random.default_rng(0).integers(0, 2**32, (4, 3, 5))
    every = philox(counters, (1, 2))
    assert every.shape == (4, 3, 5)
    np.testing.assert_array_equal(every[:, 2, 4], philox(counters[:, 2, 4], (1, 2)))


def plan(n: int = 4000, size: tuple[int, int] = (375, 500), seed: int = 0, epoch: int = 0, **settings: int) -> Any:
    return plan_views(ViewSettings(**settings), seed, epoch, np.arange(n), np.full((n, 2), size))


def same(one: Any, two: Any) -> bool:
    return all(np.array_equal(getattr(one, field), getattr(two, field)) for field in FIELDS)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**63), st.integers(0, 1000), st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=6))
def test_a_view_depends_on_nothing_but_seed_epoch_sample_and_view(seed: int, epoch: int, index: list[int]) -> None:
    views = ViewSettings(local_crops_number=3)
    size = [(20 + i % 300, 30 + i % 200) for i in index]
    together = plan_views(views, seed, epoch, index, size)
    for k in range(len(index)):
        alone = plan_views(views, seed, epoch, index[k : k + 1], size[k : k + 1])
        assert all(np.array_equal(getattr(together, field)[k], getattr(alone, field)[0]) for field in FIELDS)
    fewer = plan_views(views.model_copy(update={"local_crops_number": 1}), seed, epoch, index, size)
    assert same(fewer, together.views(slice(3)))


def test_seed_epoch_sample_and_view_each_change_the_numbers() -> None:
    one = plan(50)
    assert not np.array_equal(one.factors, plan(50, seed=1).factors)
    assert not np.array_equal(one.factors, plan(50, seed=2**32).factors)  # the high word counts too
    assert not np.array_equal(one.factors, plan(50, epoch=1).factors)
    assert len(np.unique(one.factors.reshape(-1, 4), axis=0)) == 50 * 10


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 2**32))
def test_boxes_lie_inside_images_of_any_shape(height: int, width: int, seed: int) -> None:
    top, left, h, w = np.moveaxis(plan(5, (height, width), seed).box, -1, 0)
    assert (top >= 0).all() and (left >= 0).all() and (h >= 1).all() and (w >= 1).all()
    assert (top + h <= height).all() and (left + w <= width).all()


@pytest.mark.parametrize(
    ("size", "which", "scale"),
    [((375, 500), 0, (0.4, 1.0)), ((32, 32), 1, (0.4, 1.0)), ((90, 500), 0, (0.4, 1.0)), ((375, 500), 5, (0.05, 0.4))],
)
def test_boxes_are_distributed_as_in_torchvision(size: tuple[int, int], which: int, scale: tuple[float, float]) -> None:
    """Also (90, 500), where most draws need several tries, and many the central fallback."""
    from torchvision.transforms import RandomResizedCrop

    n = 4000
    torch.manual_seed(1)
    image = torch.empty(3, *size)
    theirs = np.array([RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(n)])
    ours = plan(n, size).box[:, which]
    for quantity in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 0] / np.maximum(size[0] - b[:, 2], 1),
        lambda b: b[:, 1] / np.maximum(size[1] - b[:, 3], 1),
    ):
        assert ks_2samp(quantity(ours), quantity(theirs)).pvalue > 1e-3


@pytest.mark.parametrize("size", [(10, 1000), (1000, 10), (7, 7)])
def test_no_fitting_try_gives_the_central_crop_of_torchvision(size: tuple[int, int]) -> None:
    from torchvision.transforms import RandomResizedCrop

    expected = RandomResizedCrop.get_params(torch.empty(3, *size), (5.0, 6.0), (3 / 4, 4 / 3))  # larger than the image
    views = ViewSettings.model_construct(**{**ViewSettings().model_dump(), "global_crops_scale": (5.0, 6.0)})
    box = plan_views(views, 0, 0, [3], [size]).box[0, 0]
    assert tuple(box) == expected


def test_jitter_is_distributed_as_in_torchvision() -> None:
    from torchvision.transforms import ColorJitter

    n = 4000
    torch.manual_seed(2)
    jitter = ColorJitter(0.4, 0.4, 0.2, 0.1)
    params = [jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) for _ in range(n)]
    ours = plan(n)
    for op in range(4):
        theirs = np.array([p[1 + op] for p in params], np.float32)
        assert ks_2samp(ours.factors[:, 0, op], theirs).pvalue > 1e-3
    codes = ours.order.reshape(-1, 4) @ [64, 16, 4, 1]
    values, counts = np.unique(codes, return_counts=True)
    assert set(values) == {int(p[0] @ torch.tensor([64, 16, 4, 1])) for p in params}  # all 24 permutations
    assert chisquare(counts).pvalue > 1e-3


def test_switches_come_on_with_their_probabilities() -> None:
    ours = plan(20000, local_crops_number=2)

    def check(switch: NDArray[Any], probability: float) -> None:
        spread = 4.5 * math.sqrt(probability * (1 - probability) / switch.size)
        assert abs(switch.mean() - probability) <= spread

    check(ours.flip, 0.5)
    check(ours.jitter, 0.8)
    check(ours.gray, 0.2)
    for v, p in enumerate((1.0, 0.1, 0.5, 0.5)):
        check(ours.sigma[:, v] > 0, p)
    for v, p in enumerate((0.0, 0.2, 0.0, 0.0)):
        check(ours.solarize[:, v], p)
    sigma = ours.sigma[:, 0]
    assert ks_2samp(sigma, np.random.default_rng(3).uniform(0.1, 2, len(sigma))).pvalue > 1e-3


def test_draws_are_independent_of_each_other() -> None:
    ours = plan(20000, local_crops_number=0)
    box = ours.box[..., 2] * ours.box[..., 3]
    columns = [box, ours.box[..., 0], ours.flip, ours.jitter, *np.moveaxis(ours.factors, -1, 0), ours.gray, ours.sigma]
    table = np.corrcoef(np.concatenate([c.astype(float) for c in columns], axis=1).T)
    views = np.arange(len(table))
    place = {2, 3}  # a larger box leaves less room for its place
    for i in views:
        for j in views[:i]:
            if not (i in place and j in {0, 1}) and np.isfinite(table[i, j]):
                assert abs(table[i, j]) < 4.5 / math.sqrt(20000), (i, j)


def test_types_and_shapes() -> None:
    ours = plan(3, local_crops_number=4)
    assert {f: (getattr(ours, f).dtype.name, getattr(ours, f).shape) for f in FIELDS} == {
        "box": ("int32", (3, 6, 4)),
        "flip": ("bool", (3, 6)),
        "jitter": ("bool", (3, 6)),
        "factors": ("float32", (3, 6, 4)),
        "order": ("uint8", (3, 6, 4)),
        "gray": ("bool", (3, 6)),
        "sigma": ("float32", (3, 6)),
        "solarize": ("bool", (3, 6)),
    }
    assert plan(3, local_crops_number=0).box.shape == (3, 2, 4)
    assert plan(0).box.shape == (0, 10, 4)


def test_these_numbers_are_for_ever() -> None:
    """A change here breaks the continuation of every run: it needs a reason, and a word in the release notes."""
    ours = plan(2, (375, 500), seed=7, epoch=3, local_crops_number=1)
    assert ours.box[1].tolist() == [[7, 36, 367, 402], [9, 56, 311, 261], [128, 329, 172, 164]]
    assert epoch_order(7, 3, 10).tolist() == [4, 3, 1, 8, 9, 2, 0, 6, 5, 7]


@given(st.integers(0, 2**64 - 1), st.integers(0, 10**6), st.integers(0, 300))
def test_epoch_order_is_a_permutation(seed: int, epoch: int, n: int) -> None:
    assert sorted(epoch_order(seed, epoch, n)) == list(range(n))


def test_epoch_order_changes_with_seed_and_epoch_and_is_uniform() -> None:
    assert not np.array_equal(epoch_order(0, 0, 100), epoch_order(0, 1, 100))
    assert not np.array_equal(epoch_order(0, 0, 100), epoch_order(1, 0, 100))
    first = np.bincount([epoch_order(0, e, 10)[0] for e in range(3000)], minlength=10)
    assert chisquare(first).pvalue > 1e-3
