"""The DINO loss against the published double loop, and the center against its recurrence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nearfar.ssl.learning.losses import DINOLoss, coding_rate, cosine_loss, dino_loss, koleo, sinkhorn_knopp

Array = NDArray[np.float64]


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def published(student: Array, teacher: Array, center: Array, student_temp: float, teacher_temp: float) -> float:
    """The loop over pairs of views of DINO's Algorithm 1 with multi-crop: (V, B, K), (G, B, K) -> scalar."""
    total, terms = 0.0, 0
    for iq, t in enumerate(teacher):
        q = softmax((t - center) / teacher_temp)
        for v, s in enumerate(student):
            if v == iq:
                continue
            total += (-q * np.log(softmax(s / student_temp))).sum(-1).mean()
            terms += 1
    return total / terms


@given(views=st.integers(2, 6), batch=st.integers(1, 5), prototypes=st.integers(2, 9), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_it_is_the_mean_over_all_pairs_of_different_views(views: int, batch: int, prototypes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    student, teacher = rng.uniform(-1, 1, (views, batch, prototypes)), rng.uniform(-1, 1, (2, batch, prototypes))
    loss = DINOLoss(prototypes, student_temp=0.1).double()
    loss.center += torch.from_numpy(rng.normal(0, 0.1, prototypes))
    probabilities = loss.teacher_probabilities(torch.from_numpy(teacher), 0.05)
    value = loss(torch.from_numpy(student), probabilities)
    assert float(value) == pytest.approx(published(student, teacher, loss.center.numpy(), 0.1, 0.05), rel=1e-9)


def test_two_views_are_the_symmetric_loss_of_the_paper() -> None:
    logits, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5).softmax(-1)
    student = logits.log_softmax(-1)
    symmetric = -(teacher[0] * student[1]).sum(-1).mean() / 2 - (teacher[1] * student[0]).sum(-1).mean() / 2
    torch.testing.assert_close(dino_loss(logits, teacher, 1.0), symmetric)


def test_the_flat_answer_costs_ln_k_and_a_perfect_one_nothing() -> None:
    flat = torch.zeros(4, 3, 50)
    loss = DINOLoss(50)
    assert float(loss(flat, loss.teacher_probabilities(flat[:2], 0.04))) == pytest.approx(np.log(50), rel=1e-6)
    sure = torch.nn.functional.one_hot(torch.tensor([1, 2, 3]), 50).float().expand(4, 3, 50) * 100
    assert float(loss(sure, loss.teacher_probabilities(sure[:2], 0.04))) == pytest.approx(0, abs=1e-6)


def test_the_same_view_is_skipped_in_the_gradient_too() -> None:
    student = torch.randn(2, 3, 5, requires_grad=True)
    loss = DINOLoss(5)
    teacher = loss.teacher_probabilities(torch.randn(2, 3, 5), 0.04)
    teacher[1] = 0  # then only the pair (teacher 0, student 1) is left
    loss(student, teacher).backward()
    assert student.grad is not None and not student.grad[0].any() and student.grad[1].any()


@pytest.mark.parametrize("views", [2, 3, 6])
def test_gradients_are_those_of_the_formula_in_float64(views: int) -> None:
    generator = torch.Generator().manual_seed(views)
    logits = torch.randn(views, 3, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    teacher = torch.randn(2, 3, 7, dtype=torch.float64, generator=generator).softmax(-1)
    assert torch.autograd.gradcheck(lambda x: dino_loss(x, teacher, 0.3), logits)
    other = torch.tensor([[g != v for v in range(views)] for g in range(2)], dtype=torch.float64)
    formula = -torch.einsum("gv,gbk,vbk->", other, teacher, (logits / 0.3).log_softmax(-1)) / other.sum() / 3
    mine, plain = (torch.autograd.grad(2.5 * value, logits)[0] for value in (dino_loss(logits, teacher, 0.3), formula))
    torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-15)


def test_no_gradient_reaches_the_teacher() -> None:
    logits = torch.randn(2, 3, 5, requires_grad=True)
    assert not DINOLoss(5).teacher_probabilities(logits, 0.04).requires_grad


def test_the_center_follows_the_mean_of_all_teacher_logits() -> None:
    loss, center = DINOLoss(5, center_momentum=0.9).double(), np.zeros(5)
    for seed in range(4):
        logits = np.random.default_rng(seed).normal(1, 1, (2, 3, 5))
        loss.note_teacher(torch.from_numpy(logits))
        loss.update_center()
        center = 0.9 * center + 0.1 * logits.reshape(6, 5).mean(0)
        np.testing.assert_allclose(loss.center.numpy(), center, rtol=1e-12)


def test_the_center_is_saved_with_the_run() -> None:
    assert set(DINOLoss(5).state_dict()) == {"center"}


def test_half_precision_logits_are_widened_before_the_softmax() -> None:
    loss, logits = DINOLoss(5), torch.randn(2, 3, 5).bfloat16()
    assert loss.teacher_probabilities(logits, 0.04).dtype == torch.float32
    assert loss(logits, loss.teacher_probabilities(logits, 0.04)).dtype == torch.float32
    loss.note_teacher(logits)
    loss.update_center()
    assert loss.center.dtype == torch.float32


def test_autocast_leaves_the_loss_and_its_gradient_exact() -> None:
    """bf16 products would leave only the rounding of a gradient that is a small difference near the uniform output."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.rand(2, 8, 64, generator=generator).softmax(-1)
    student = (0.01 * torch.randn(4, 8, 64, generator=generator)).requires_grad_()
    loss = DINOLoss(64)
    exact = loss(student, teacher)
    (gradient,) = torch.autograd.grad(exact, student)
    with torch.autocast("cpu", torch.bfloat16):
        cast = loss(student, teacher)
    assert cast.dtype == torch.float32
    assert torch.equal(cast, exact)
    assert torch.equal(torch.autograd.grad(cast, student)[0], gradient)


def test_sinkhorn_knopp_is_the_published_iteration() -> None:
    """DINOv2's form, in float64: exp, then three times columns to 1/K and rows to 1/B, scaled back to rows of 1."""
    logits = np.random.default_rng(0).uniform(-1, 1, (2, 12, 6))
    q = np.exp(logits.reshape(24, 6) / 0.05)
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(0, keepdims=True) * 6
        q /= q.sum(1, keepdims=True) * 24
    got = sinkhorn_knopp(torch.from_numpy(logits), 0.05)
    np.testing.assert_allclose(got.reshape(24, 6).numpy(), q * 24, rtol=1e-10)


def test_sinkhorn_knopp_uses_every_prototype_alike() -> None:
    logits = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0)).double() * 0.3
    logits[..., 0] += 2  # a prototype that every image prefers
    balanced = sinkhorn_knopp(logits, 0.05, iterations=50)
    torch.testing.assert_close(balanced.sum(-1), torch.ones(2, 64).double())
    torch.testing.assert_close(balanced.sum((0, 1)), torch.full((16,), 8.0).double(), rtol=1e-2, atol=0)


def test_sinkhorn_knopp_neither_overflows_nor_loses_a_row_at_low_temperatures() -> None:
    """In float32, where exp(logits / temperature) is infinite, against the same iteration of logarithms in float64."""
    logits = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0))
    q = logits.reshape(16, 4).double() / 1e-3
    assert q.max() > 1000
    for _ in range(3):
        q = q - q.logsumexp(0, keepdim=True) - np.log(4)
        q = q - q.logsumexp(1, keepdim=True) - np.log(16)
    got = sinkhorn_knopp(logits, 1e-3)
    torch.testing.assert_close(got.reshape(16, 4).double(), q.exp() * 16, rtol=1e-2, atol=1e-4)


def test_the_loss_balances_as_it_is_told() -> None:
    logits = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(DINOLoss(4, sinkhorn=True).teacher_probabilities(logits, 0.1), sinkhorn_knopp(logits, 0.1))
    assert torch.equal(DINOLoss(4).teacher_probabilities(logits, 0.1), (logits / 0.1).softmax(-1))


@given(views=st.integers(1, 3), batch=st.integers(2, 7), width=st.integers(2, 6), seed=st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_koleo_is_the_log_of_the_nearest_neighbors_distance(views: int, batch: int, width: int, seed: int) -> None:
    features = np.random.default_rng(seed).normal(size=(views, batch, width))
    expected = 0.0
    for view in features / np.linalg.norm(features, axis=-1, keepdims=True):
        nearest = [min(np.linalg.norm(a - b) for j, b in enumerate(view) if j != i) for i, a in enumerate(view)]
        expected -= np.log(nearest).mean()
    assert float(koleo(torch.from_numpy(features))) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_koleo_pushes_apart_and_stays_finite_for_twins() -> None:
    angles = torch.tensor([0.0, 0.1, 2.0, 4.0], requires_grad=True)
    koleo(torch.stack([angles.cos(), angles.sin()], -1)[None]).backward()
    assert angles.grad is not None and angles.grad[0] > 0 > angles.grad[1]  # a step downhill widens the gap
    twins = torch.ones(1, 3, 4, requires_grad=True)
    koleo(twins).backward()
    assert twins.grad is not None and torch.isfinite(twins.grad).all()


@given(views=st.integers(1, 3), batch=st.integers(1, 7), width=st.integers(1, 6), seed=st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_the_coding_rate_is_the_papers_for_one_dimension(views: int, batch: int, width: int, seed: int) -> None:
    features = np.random.default_rng(seed).normal(size=(views, batch, width))
    unit = (features / np.linalg.norm(features, axis=-1, keepdims=True)).reshape(-1, width)
    spread = sum(np.outer(row, row) for row in unit) / len(unit)
    rate = np.linalg.slogdet(np.eye(width) + width / 0.3**2 * spread)[1] / 2
    assert float(coding_rate(torch.from_numpy(features), 0.3)) == pytest.approx(rate / width, rel=1e-9)


def test_the_coding_rate_is_highest_when_all_directions_are_used_alike() -> None:
    features = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    assert torch.autograd.gradcheck(coding_rate, features)
    even = float(coding_rate(torch.eye(4).double()[None]))
    assert even == pytest.approx(np.log(1 + 4) / 2)  # D / .5^2 times M = I / D
    one_direction = float(coding_rate(torch.ones(1, 4, 4).double()))
    assert one_direction < float(coding_rate(features)) < even


def test_the_coding_rate_of_features_that_are_not_finite_is_not_finite() -> None:
    features = torch.randn(1, 8, 4)
    features[0, 3, 1] = torch.nan
    assert not torch.isfinite(coding_rate(features))
    assert torch.isfinite(coding_rate(torch.zeros(1, 3, 4)))


def test_the_cosine_loss_is_one_minus_the_mean_cosine_whatever_the_lengths() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(6, 4)), rng.normal(size=(6, 4))
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(ours, theirs, strict=True)]
    got = cosine_loss(torch.from_numpy(ours), torch.from_numpy(theirs))
    assert float(got) == pytest.approx(1 - np.mean(cosines), rel=1e-12)
    assert float(cosine_loss(torch.from_numpy(ours), 3 * torch.from_numpy(ours))) == pytest.approx(0, abs=1e-12)
