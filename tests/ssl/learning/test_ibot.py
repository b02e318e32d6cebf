"""iBOT's patch loss against the loop over images in float64, and its two ways of balancing the teacher."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from nearfar.ssl.learning.ibot import PatchLoss, patch_loss
from nearfar.ssl.learning.losses import sinkhorn_knopp
from nearfar.ssl.learning.masks import BlockMasks, Masks

K = 7


@pytest.fixture
def masks() -> Masks:
    """Of 2 views of 5 images, 4x4 patches; some views have none that are hidden, some rows only fill the list."""
    (found,) = BlockMasks(1, 0.5, (0.1, 0.6), (4, 4), 5).of_step(0, torch.device("cpu"))
    assert (found.weights == 0).any() and not found.hidden.any(2).all()
    return found


def logits(seed: int, rows: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, (rows, K)))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def test_it_is_the_mean_over_views_of_the_mean_over_their_hidden_patches(masks: Masks) -> None:
    """The published double loop, on the logits of all patches."""
    student, teacher = logits(0, 160), logits(1, 160)
    total = 0.0
    for view in range(10):
        hidden = masks.hidden.flatten(0, 1)[view].numpy()
        s, t = (x.reshape(10, 16, K)[view].numpy()[hidden] for x in (student, teacher))
        terms = -(softmax((t - 0.1) / 0.05) * np.log(softmax(s / 0.1))).sum(-1)
        total += terms.sum() / max(1, len(terms))
    loss = PatchLoss(K).double()
    loss.center += 0.1
    probabilities = loss.teacher_probabilities(teacher[masks.rows], masks.weights, 0.05)
    value = loss(student[masks.rows], probabilities, masks.weights, 10)
    assert float(value) == pytest.approx(total / 10, rel=1e-6)  # weights are float32


def test_gradients_are_right_and_rows_that_fill_the_list_have_none(masks: Masks) -> None:
    rows = len(masks.rows)
    student, teacher = logits(0, rows).requires_grad_(), logits(1, rows).softmax(-1)
    weights = masks.weights.double()
    assert torch.autograd.gradcheck(lambda x: patch_loss(x, teacher, weights, 10, 0.3), student)
    patch_loss(student, teacher, weights, 10, 0.3).backward()
    assert student.grad is not None
    assert torch.equal(student.grad.abs().sum(1) > 0, weights > 0)


def test_sinkhorn_knopp_sees_the_rows_that_count_only(masks: Masks) -> None:
    rows, counts = logits(0, len(masks.rows)), masks.weights > 0
    found = sinkhorn_knopp(rows, 0.05, counts=counts)
    torch.testing.assert_close(found[counts], sinkhorn_knopp(rows[counts], 0.05), rtol=1e-12, atol=0)
    assert not found[~counts].any()
    changed = torch.where(counts[:, None], rows, 1e3)
    assert torch.equal(sinkhorn_knopp(changed, 0.05, counts=counts), found)
    assert torch.equal(
        sinkhorn_knopp(rows, 0.05, counts=torch.zeros_like(counts)), torch.zeros_like(rows)
    )  # and no NaN


def test_the_center_follows_the_mean_over_all_hidden_patches(masks: Masks) -> None:
    loss, center = PatchLoss(K, center_momentum=0.8).double(), np.zeros(K)
    counts = masks.weights > 0
    for seed in range(3):
        parts = [logits(10 * seed + part, len(counts)) for part in range(2)]
        for part in parts:
            loss.note_teacher(part, masks.weights)
        loss.update_center()
        center = 0.8 * center + 0.2 * torch.cat([part[counts] for part in parts]).numpy().mean(0)
        np.testing.assert_allclose(loss.center.numpy(), center, rtol=1e-12)
    loss.note_teacher(logits(0, len(counts)), masks.weights)
    loss.update_center(torch.ones(()))
    np.testing.assert_allclose(loss.center.numpy(), center, rtol=1e-12)  # a step that is not finite moves nothing
    loss.note_teacher(logits(0, len(counts)), torch.zeros_like(masks.weights))
    loss.update_center()
    np.testing.assert_allclose(loss.center.numpy(), center, rtol=1e-12)  # nor one without hidden patches


def test_state_and_precision() -> None:
    loss = PatchLoss(K)
    assert set(loss.state_dict()) == {"center"}
    half, weights = logits(0, 4).bfloat16(), torch.tensor([0.5, 0.5, 1.0, 0.0])
    probabilities = loss.teacher_probabilities(half, weights, 0.04)
    assert probabilities.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(half, probabilities, weights, 2), loss(half.float(), probabilities, weights, 2))
        rows = torch.rand(4, K)
        loss.note_teacher(rows, weights)
        loss.update_center()
    torch.testing.assert_close(loss.center, 0.1 * rows[:3].mean(0), rtol=1e-6, atol=0)
