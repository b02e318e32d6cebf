"""The optimizer of a run: AdamW, which parameters decay, and how gradients are clipped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nearfar.ssl import distributed
from nearfar.ssl.backbones.token_model import decays
from nearfar.ssl.sharding import is_sharded, local


def parameter_groups(student: nn.Module) -> list[dict[str, Any]]:
    """AdamW's two groups: what decays, and what does not."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            groups[decays(name, parameter)].append(parameter)
    return [
        {"params": groups[True], "decays": True},
        {"params": groups[False], "decays": False, "weight_decay": 0.0},
    ]


def adamw(student: nn.Module) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; `set_rates` gives it learning rate and weight decay before every step."""
    return torch.optim.AdamW(parameter_groups(student), lr=0.0, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


@torch.no_grad()
def clip_gradients(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Scale each tensor's gradient to at most `limit` (DINO clips per tensor; 0 = off).

    Returns:
        The norm of the whole gradient before clipping: not finite as soon as one of its numbers is not.
    """
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    if is_sharded(parameters[0]):  # the squares of all ranks' rows, in float64: in float32 they may overflow
        norms = distributed.all_sum_(norms.double().square()).sqrt().to(norms.dtype)
    if limit > 0:
        scales = (limit / (norms + 1e-6)).clamp(max=1.0)
        if scales.is_cuda:
            multiply_alike(gradients, list(scales.unbind()))
        else:  # a loop over the tensors in any case
            torch._foreach_mul_(gradients, list(scales.unbind()))
    return norms.norm()


def multiply_alike(tensors: list[Tensor], factors: list[Tensor]) -> None:
    """tensors[i] *= factors[i] in place; the factors are scalars on the tensors' device. Same bits as one by one.

    `_foreach_mul_` takes all tensors in a few launches only if every factor has the shape of its tensor; otherwise it
    starts a kernel for each. So tensors of equal shapes, of which the blocks of a backbone give most, share one tensor
    of spread factors, which takes as much memory as they do until this returns.
    """
    alike: dict[tuple[torch.Size, tuple[int, ...]], list[int]] = {}
    for number, tensor in enumerate(tensors):
        alike.setdefault((tensor.shape, tensor.stride()), []).append(number)
    many, spread = list[Tensor](), list[Tensor]()
    for (shape, _), numbers in alike.items():
        if len(numbers) == 1 or not tensors[numbers[0]].is_contiguous():
            for number in numbers:
                tensors[number].mul_(factors[number])
        else:
            many += [tensors[number] for number in numbers]
            each = torch.stack([factors[number] for number in numbers])
            spread += each.view(-1, *(1 for _ in shape)).expand(-1, *shape).contiguous().unbind()
    if many:
        torch._foreach_mul_(many, spread)
