"""How many kernels a step of training starts on a GPU, part by part: counted on a CPU, an upper bound.

    python bench/launches.py [--model vit_small_patch16] [--only plain "LGP + GAug + PRR" Vim] [--float32]

The real step runs on tiny images, and every operation that reaches the device is counted, with its views and
allocations left out; numbers of kernels do not depend on the size of the batch. An operation is taken for one kernel,
but for the ones over lists of tensors, which start as many as torch's multi_tensor_apply would on a GPU (or one a
tensor where it cannot). Differences from a GPU: under bfloat16 a CPU's attention is 4 operations forward where a GPU's
is 1; matrix products over several kernels (split K) and reductions in two passes count once. Vim's scan is counted as
its two Triton kernels with the copies and sums around them. Colors are counted from their source (`COLOR_LAUNCHES`).
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nearfar.ssl import config
from nearfar.ssl.backbones.attention import rounded_bias
from nearfar.ssl.backbones.scan import scan_backward, scan_forward
from nearfar.ssl.data.transforms.normalize import normalize
from nearfar.ssl.learning.dino import build_dino_learner
from nearfar.ssl.learning.learner import Learner
from nearfar.ssl.learning.optim import adamw, multiply_alike
from nearfar.ssl.learning.step import Stepper
from nearfar.ssl.settings.defaults import resolve

VALUES = {"lr": 1e-6, "weight_decay": 0.04, "teacher_momentum": 0.996, "teacher_temp": 0.04}
VARIANTS: dict[str, tuple[str, ...]] = {"plain": (), "LGP + GAug + PRR": ("lgp", "gaug", "prr"), "Vim": ()}
PARTS = ["colors", "teacher", "student", "loss", "backward", "clip", "optimizer", "teacher's update", "rest"]
# Of a group of views, ssl/data/transforms/triton_colors.py: two kernels that adjust, a sum and a division between
# them, two that blur; and the copies of the pixels and of the plan.
COLOR_LAUNCHES = 6 + 2
ALLOCATIONS = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "_unsafe_view",
    "_reshape_alias", "lift_fresh", "resize_", "set_",
}  # fmt: skip
# Of torch's MultiTensorApply.cuh: tensors of a launch by number of lists, blocks of a launch, numbers of a block.
TENSORS_OF_A_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
BLOCKS_OF_A_LAUNCH, NUMBERS_OF_A_BLOCK = 320, 65536


def list_launches(lists: list[list[Tensor]]) -> int:
    """Kernels for an operation over lists of tensors, as multi_tensor_apply makes them.

    It wants the tensors at one place of every list to be alike; otherwise each place has a kernel of its own.
    """
    lists = [each for each in lists if each]
    first = lists[0]
    for other in lists[1:]:
        if any(a.shape != b.shape or a.dtype != b.dtype for a, b in zip(first, other, strict=False)):
            return len(first)
    blocks = sum(math.ceil(tensor.numel() / NUMBERS_OF_A_BLOCK) for tensor in first)
    return max(math.ceil(len(first) / TENSORS_OF_A_LAUNCH[len(lists)]), math.ceil(blocks / BLOCKS_OF_A_LAUNCH))


def launches(function: Any, args: tuple[Any, ...]) -> int:
    """Kernels that an operation starts, at most."""
    schema = function._schema
    name = schema.name.partition("::")[2]
    views = any(out.alias_info is not None and not out.alias_info.is_write for out in schema.returns)
    if views or name in ALLOCATIONS:
        return 0
    if name.startswith(("_foreach_", "_fused_")):
        # The last list of the fused optimizers, the steps, is small and read by every block.
        lists = [arg for arg in args if isinstance(arg, list | tuple) and arg and isinstance(arg[0], Tensor)]
        steps = name.startswith("_fused_adam")
        return list_launches(lists[:-1] if steps else lists) * (2 if name == "_foreach_norm" else 1) + steps
    if name == "scan_forward":
        return 1
    if name == "scan_backward":
        return 6  # the kernel, three sums of its parts, two copies
    return 1


class LaunchCounter(TorchDispatchMode):
    """Counts the kernels of what runs within it, by the `part` that is set."""

    def __init__(self) -> None:
        super().__init__()
        self.part = "rest"
        self.counts: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        number = launches(func, args)
        self.counts[self.part] += number
        self.operations[f"{self.part}: {func._schema.name.partition('::')[2]}"] += number
        return func(*args, **(kwargs or {}))

    def during(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose operations count as `part`."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            before, self.part = self.part, part
            try:
                return function(*args, **kwargs)
            finally:
                self.part = before

        return counted


class _Scan(torch.autograd.Function):
    """The scan with what surrounds Triton's kernels, in either direction: which one changes no count."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        inputs = tuple(v.contiguous() for v in inputs)
        y, starts = scan_forward(*inputs)
        ctx.save_for_backward(*inputs, starts)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, ...] = scan_backward(grad.contiguous(), *ctx.saved_tensors)
        return gradients


def one_way_scan(*inputs: Any) -> Any:
    return _Scan.apply(*inputs[:6])


@contextmanager
def parts_told_apart(counter: LaunchCounter, learner: Learner, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    places: list[tuple[Any, str, str]] = [
        (learner, "teacher_outputs", "teacher"),
        (learner, "student_outputs", "student"),
        (learner.loss, "teacher_probabilities", "loss"),
        (learner.loss, "forward", "loss"),
        (torch.autograd, "backward", "backward"),
        (__import__("nearfar.ssl.learning.step", fromlist=["step"]), "clip_gradients", "clip"),
        (optimizer, "step", "optimizer"),
        (learner, "after_step", "teacher's update"),
    ]
    with ExitStack() as stack:
        for owner, name, part in places:
            stack.enter_context(mock.patch.object(owner, name, counter.during(part, getattr(owner, name))))
        stack.enter_context(mock.patch("nearfar.ssl.backbones.vim.selective_scan", one_way_scan))
        stack.enter_context(mock.patch("nearfar.ssl.learning.optim.multiply_each", multiply_alike))  # as on a GPU
        stack.enter_context(mock.patch("nearfar.ssl.backbones.attention.written_bias", rounded_bias))  # likewise
        stack.enter_context(counter)
        yield


def count_step(settings: list[str], bf16: bool) -> tuple[LaunchCounter, nn.Module]:
    """The kernels of the second step of a run, and its student."""
    images = 2
    run = resolve(config.load(None, [*settings, f"train.batch_size={images}"]), 1000)[0]
    learner = build_dino_learner(run)
    optimizer = adamw(learner.student)
    stepper = Stepper(learner, optimizer, 3.0, lambda: torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext())
    sizes = ((2, run.views.global_crops_size), (run.views.local_crops_number, run.views.local_crops_size))
    views = [torch.rand(number, images, 3, side, side) for number, side in sizes]
    normalize(views[0])
    stepper(views, VALUES)
    counter = LaunchCounter()
    with parts_told_apart(counter, learner, optimizer):
        counter.during("colors", lambda: [normalize(group) for group in views])()
        stepper(views, VALUES, votes=lambda: (0.0, 0.0))
    counter.counts["colors"] += COLOR_LAUNCHES * len(views)
    return counter, learner.student


def settings_of(variant: str, model: str) -> list[str]:
    name = model.replace("vit_", "vim_") if variant == "Vim" else model
    # Two sizes, small ones: the global views have the grid that the model is made for, the local ones do not.
    return [
        f"backbone.name={name}", "head.prototypes=256", "head.batch_norm=false", "views.global_crops_size=64",
        "views.local_crops_size=32", "views.local_crops_number=2",
        *(f"backbone.{idea}=true" for idea in VARIANTS[variant]),
    ]  # fmt: skip


def markdown(found: dict[str, Counter[str]]) -> str:
    lines = ["| | " + " | ".join(found) + " |", "|---|" + "--:|" * len(found)]
    for part in PARTS:
        lines.append(f"| {part} | " + " | ".join(f"{counts[part]:,}" for counts in found.values()) + " |")
    lines.append("| **all** | " + " | ".join(f"**{counts.total():,}**" for counts in found.values()) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="vit_small_patch16")
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--float32", action="store_true", help="without autocast, which adds the casts of weights")
    parser.add_argument("--operations", type=int, default=0, metavar="N", help="the N most frequent ones of each")
    options = parser.parse_args()
    found = {}
    for variant in options.only:
        counter, student = count_step(settings_of(variant, options.model), not options.float32)
        found[variant] = counter.counts
        print(f"{variant}: {len(list(student.parameters()))} parameters")
        for operation, number in counter.operations.most_common(options.operations):
            print(f"  {number:6,} {operation}")
    print(f"\n{markdown(found)}")


if __name__ == "__main__":
    main()
