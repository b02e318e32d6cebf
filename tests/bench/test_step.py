"""The table of bench/step.py by hand, and the products of a step it counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from nearfar.ssl.parallel import device


@pytest.fixture(scope="module")
def bench(load_bench: Callable[[str], Any]) -> Any:
    return load_bench("step")


def test_ratios_are_taken_round_by_round(bench: Any) -> None:
    first = bench.Measurement("dino", [2.0, 4.0, 6.0], 10.0, float("nan"))
    second = bench.Measurement("plain", [1.0, 1.0, 4.0], 20.0, 3e9)
    _, row = bench.rows([first, second], 8, 100e9)
    assert row["seconds"] == 1 and row["img_per_s"] == 8 and row["share_of_peak"] == pytest.approx(0.2)
    assert (row["ratio"], row["ratio_least"], row["ratio_most"]) == (2, 1.5, 4)
    text = bench.markdown(bench.rows([first, second], 8, 100e9))
    assert "| plain | 1000.0 | 8.0 | 2.00 | 1.50 .. 4.00 | 20 % | 3.00 |" in text
    assert "| dino | 4000.0 | 2.0 | 1.00 | 1.00 .. 1.00 | 2 % | - |" in text


def test_steps_in_fp16_scale_their_losses_and_move_the_weights(bench: Any) -> None:
    """On a CPU, whose hardware may only emulate it: ours by its own scaler, dino's by torch's."""
    compute = bench.Compute(torch.device("cpu"), lambda: torch.autocast("cpu", torch.float16), device.FP16)
    options = bench.StepOptions("vit_tiny_patch16", 2, (32, 16), 1, 64, "cpu", "fp16", 1)
    stepper = bench.stepper_of("plain", options, compute)
    assert stepper.learner.loss_scale is not None and bench.peak_flops(compute, 64) > 0
    for name in ("dino", "plain", "plain, Muon"):
        step = bench.step_of(name, options, compute)
        assert all(math.isfinite(step()) for _ in range(3))


def test_dino_skips_a_step_that_overflows_in_fp16_as_ours_does(bench: Any) -> None:
    views = [torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    step, student = bench.dino_step("vit_tiny_patch16_224", 64, torch.device("cpu"), nullcontext, scaled=True)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    handle = student.head.mlp[0].weight.register_hook(lambda grad: grad * float("inf"))
    step(views)
    assert all(torch.equal(before[name], p) for name, p in student.named_parameters())
    handle.remove()
    step(views)
    assert not all(torch.equal(before[name], p) for name, p in student.named_parameters())


def test_products_grow_with_images_and_prototypes(bench: Any) -> None:
    """The last layer by hand: a prototype costs each image three products of 256 for each of the student's 3 views
    (forward, and the gradients of both factors), and one for each of the teacher's 2.
    """
    options = bench.StepOptions("vit_tiny_patch16", 4, (32, 16), 1, 64, "cpu", "fp32", 1)
    few, many = (bench.products("plain", options._replace(prototypes=k)) for k in (64, 1064))
    assert many - few == pytest.approx(1000 * 4 * 2 * 256 * (3 * 3 + 2) / 1e9)
    assert bench.products("plain", options._replace(batch=8)) == pytest.approx(2 * few, rel=0.05)
