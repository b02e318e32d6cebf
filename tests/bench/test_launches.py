"""Kernels of a step, as bench/launches.py counts them: the count by hand, and bounds that a step has to keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def bench(load_bench: Callable[[str], Any]) -> Any:
    return load_bench("launches")


def counted(bench: Any, function: Any) -> int:
    with bench.LaunchCounter() as counter:
        function()
    return int(counter.counts.total())


def test_views_and_allocations_start_nothing(bench: Any) -> None:
    x = torch.ones(4, 4)
    assert counted(bench, lambda: x.t()[1:].unsqueeze(0).expand(3, 3, 4)) == 0
    assert counted(bench, lambda: torch.empty_like(x).detach()) == 0
    assert counted(bench, lambda: (x @ x).add_(1).sum()) == 3


def test_lists_of_tensors_take_a_few_kernels_where_they_are_alike(bench: Any) -> None:
    """110 tensors of a launch by one list, 64 by two (torch's MultiTensorApply.cuh); large ones by their blocks."""
    many = [torch.ones(3) for _ in range(111)]
    scalars = [torch.ones(()) for _ in many]
    assert counted(bench, lambda: torch._foreach_mul_(many, 2.0)) == 2
    assert counted(bench, lambda: torch._foreach_mul_(many[:110], 2.0)) == 1
    assert counted(bench, lambda: torch._foreach_add_(many, [x.clone() for x in many])) == 111 + 2
    assert counted(bench, lambda: torch._foreach_mul_(many, scalars)) == 111  # shapes differ: one by one
    large = [torch.empty(65536, 321, device="meta")]
    assert bench.list_launches([large]) == 2 and bench.list_launches([large, []]) == 2


def of_depth(bench: Any, variant: str, depth: int) -> tuple[Counter[str], int]:
    model = "vim_tiny_patch16" if variant == "Vim" else "vit_tiny_patch16"
    settings = [*bench.settings_of(variant, model), f"backbone.depth={depth}", "backbone.embed_dim=48"]
    counter, student = bench.count_step(settings, bf16=False)
    return counter.counts, len(list(student.parameters()))


@pytest.mark.parametrize(
    ("variant", "teacher", "student", "backward"),
    [("plain", 11, 34, 60), ("LGP + GAug + PRR", 54, 120, 155), ("Vim", 42, 95, 158)],
)
def test_a_block_starts_no_more_kernels_than_stated(
    bench: Any, variant: str, teacher: int, student: int, backward: int
) -> None:
    """In float32; what depends on the number of parameters must not grow with it, but for the two launches that each
    shape of a parameter costs the clip."""
    (few, _), (many, parameters) = (of_depth(bench, variant, depth) for depth in (2, 4))
    for part, bound in {"teacher": teacher, "student": student, "backward": backward}.items():
        assert 0 < many[part] - few[part] <= 2 * bound, part
    for part, bound in {"optimizer": 14, "teacher's update": 10, "rest": 20, "loss": 45, "colors": 20}.items():
        assert many[part] <= bound and many[part] - few[part] <= 4, part
    assert many["clip"] <= 60 and many["clip"] - few["clip"] <= 4 and parameters > 40


def test_a_loop_over_the_parameters_is_seen(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_by_one(self: Any, momentum: float, not_finite: Any = None) -> None:
        for ours, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            ours.lerp_(theirs.detach(), 1 - momentum)

    monkeypatch.setattr("nearfar.ssl.learning.learner.Learner.update_teacher", one_by_one)
    counts, parameters = of_depth(bench, "plain", 2)
    assert counts["teacher's update"] >= parameters > 10
