"""Muon: the matrices of a network move along their orthogonalized momentum, everything else as AdamW has it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nearfar.ssl.parallel.sharding import is_sharded, local, split_like, whole

MOMENTUM = 0.95
# A gradient with Nesterov's momentum is orthogonalized by five steps of a x + b x^3 + c x^5 on its singular values.
QUINTIC = (3.4445, -4.7750, 2.0315)
ROUNDS = 5
# Root mean square of AdamW's steps in training, times the rate (Liu et al. 2025, section 2.2).
STEP_SIZE = 0.2
FUSED = {"qkv": 3, "kv": 2}  # linear layers by their last name: queries, keys and values below each other
COLORS = 3  # a convolution of so many channels reads pixels
SMALLEST_SIDE = 16  # fewer rows have too few directions for it to matter
TOGETHER = 32  # matrices of one shape that are orthogonalized at a time: fewer kernels, and not all gradients twice


class Muon(torch.optim.Optimizer):
    """Muon for the groups with `matrices`, AdamW for the others, under one set of rates.

    A matrix W (n, m) with gradient G goes W <- (1 - rate * decay) W - rate * .2 sqrt(max(n, m)) O(.95 M + .05 G), with
    M <- .95 M + .05 G and O(X) = U V^T, nearly, of X = U S V^T (Jordan et al. 2024, "Muon: an optimizer for hidden
    layers in neural networks"). The factor makes the step as large as AdamW's, so its rates and decay fit (Liu et al.
    2025, "Muon is scalable for LLM training"). Queries, keys and values are three matrices; a convolution is one of
    (out, in * kernel). Its state is one tensor a matrix, AdamW's two.

    As a fused AdamW it leaves everything as it is where `found_inf` is 1.
    """

    found_inf: Tensor | None = None

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        """groups: with "params" and "matrices": of how many each is made (see `matrices` below), or 0 for AdamW."""
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        others = [group for group in self.param_groups if not group["matrices"]]
        self.adamw = torch.optim.AdamW(others, lr=0.0, fused=True) if others else None  # on the same dicts
        if self.adamw is not None:
            self.adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "nearfar's steps have their gradients already"
        if self.adamw is not None:
            if self.found_inf is not None:
                self.adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
            self.adamw.step()
        for group in self.param_groups:
            if group["matrices"]:
                for together in _alike([p for p in group["params"] if p.grad is not None], group["matrices"]):
                    self._move(together, group["matrices"], group["lr"], group["weight_decay"])

    def _move(self, weights: list[nn.Parameter], parts: int, lr: float, decay: float) -> None:
        """Weights of one shape, in parts of which each is a matrix."""
        directions = [self._direction(weight).flatten(1).chunk(parts) for weight in weights]
        moves = orthogonal(torch.stack([part for each in directions for part in each])).unflatten(0, (-1, parts))
        size = lr * STEP_SIZE * max(moves.shape[-2:]) ** 0.5
        for weight, move in zip(weights, moves, strict=True):
            step = move.flatten(0, 1).view(weight.shape).to(weight.dtype)
            own = local(weight)
            moved = own * (1 - lr * decay) - size * local(split_like(step, weight) if is_sharded(weight) else step)
            own.copy_(self._unless_skipped(own, moved))

    def _direction(self, weight: nn.Parameter) -> Tensor:
        """The momentum takes the gradient in; -> all rows of what is orthogonalized."""
        assert weight.grad is not None
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        momentum: Tensor = state["momentum"]
        moved = momentum.lerp(weight.grad, 1 - MOMENTUM)
        local(momentum).copy_(self._unless_skipped(local(momentum), local(moved)))
        return whole(weight.grad.lerp(moved, MOMENTUM))

    def _unless_skipped(self, before: Tensor, after: Tensor) -> Tensor:
        return after if self.found_inf is None else torch.where(self.found_inf.bool(), before, after)


def matrices(network: nn.Module) -> dict[str, int]:
    """Names of the parameters that Muon takes, and of how many matrices each is made: 3 for `qkv`, 2 for `kv`, else 1.

    The weights of linear layers and of convolutions over all channels, but of what has fewer than 16 rows or columns
    and of a convolution of three channels, which reads pixels. LGP's `bands_proj` mixes the colors in a linear layer,
    and is taken. Prototypes, tokens and positions are no layer's weights.
    """
    taken = dict[str, int]()
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            parts = FUSED.get(name.rpartition(".")[2], 1)
        elif isinstance(module, nn.Conv2d) and module.groups == 1 and module.in_channels > COLORS:
            parts = 1
        else:
            continue
        if min(module.weight.flatten(1).shape) >= SMALLEST_SIDE:
            taken[f"{name}.weight"] = parts
    return taken


def orthogonal(directions: Tensor) -> Tensor:
    """U V^T, nearly, of each U S V^T in directions (K, n, m); singular values come to .7 to 1.2, small ones to less.

    From about .002 of X's norm on, that is: .001 comes to .47, .0001 to .05, and 0 stays.

    Five rounds of Newton and Schulz's iteration with Jordan's coefficients, which allow for bf16: under its autocast
    the products are in bf16. Not for float16, in which squares of what is small in X are nothing.
    """
    x = directions
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = QUINTIC
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _alike(weights: list[nn.Parameter], parts: int) -> Iterator[list[nn.Parameter]]:
    """Weights of one shape, a number at a time."""
    by_shape: dict[torch.Size, list[nn.Parameter]] = {}
    for weight in weights:
        by_shape.setdefault(weight.shape, []).append(weight)
    count = max(1, TOGETHER // parts)
    for found in by_shape.values():
        for first in range(0, len(found), count):
            yield found[first : first + count]
