"""The optimizer of a run: AdamW or Muon, which parameters decay, and how gradients are clipped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nearfar.ssl.backbones.token_model import decays
from nearfar.ssl.errors import UserError
from nearfar.ssl.learning.muon import Muon, matrices
from nearfar.ssl.parallel import distributed
from nearfar.ssl.parallel.sharding import is_sharded, local
from nearfar.ssl.settings.optimization import OptimSettings


def parameter_groups(
    student: nn.Module,
    layerwise_decay: float = 1.0,
    patch_embed_lr_mult: float = 1.0,
    backbone_lr_mult: float = 1.0,
    muon: bool = False,
) -> list[dict[str, Any]]:
    """AdamW's groups: what decays, and what does not, each at every rate there is (`lr_scale`, a factor).

    By default there are two, at the same rate. layerwise_decay and so on: see `rate_scales`. muon: what Muon takes is
    in groups of its own, by `matrices`, the number of them in each weight; it is 0 for AdamW.
    """
    scales = rate_scales(student, layerwise_decay, patch_embed_lr_mult, backbone_lr_mult)
    taken = matrices(student) if muon else dict[str, int]()
    groups: dict[tuple[bool, float, int], list[nn.Parameter]] = {(True, 1.0, 0): [], (False, 1.0, 0): []}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            kind = (decays(name, parameter), scales.get(name, 1.0), taken.get(name, 0))
            groups.setdefault(kind, []).append(parameter)
    return [
        {"params": found, "decays": decay, "lr_scale": scale, "matrices": parts}
        | ({} if decay else {"weight_decay": 0.0})
        for (decay, scale, parts), found in groups.items()
    ]


def rate_scales(
    student: nn.Module, layerwise_decay: float, patch_embed_lr_mult: float, backbone_lr_mult: float = 1.0
) -> dict[str, float]:
    """For names of parameters of `student.backbone`, the factor on their learning rate; 1 for those not named.

    layerwise_decay ** (layers behind it) for each layer, the final norm and the heads at 1 (ELECTRA; BEiT; DINOv2), and
    patch_embed_lr_mult on top of it for the patch embedding (DINOv2; MoCo v3 freezes it), and backbone_lr_mult for all
    of the backbone.

    Raises:
        UserError: the network has no patch embedding, or timm does not know its layers.
    """
    backbone: Any = getattr(student, "backbone", None)
    scales: dict[str, float] = {}
    if layerwise_decay != 1:
        scales = {f"backbone.{name}": layerwise_decay**behind for name, behind in backbone.layers_behind().items()}
    if patch_embed_lr_mult != 1:
        names = [f"backbone.{name}" for name, _ in backbone.named_parameters() if name.startswith("model.patch_embed.")]
        if not names:
            raise UserError(
                f"{backbone.arch['name']} has no patch embedding, so optim.patch_embed_lr_mult does not apply; set it "
                "to 1."
            )
        scales |= {name: scales.get(name, 1.0) * patch_embed_lr_mult for name in names}
    if backbone_lr_mult != 1:
        every = [f"backbone.{name}" for name, _ in backbone.named_parameters()]
        scales |= {name: scales.get(name, 1.0) * backbone_lr_mult for name in every}
    return scales


def adamw(
    student: nn.Module,
    layerwise_decay: float = 1.0,
    patch_embed_lr_mult: float = 1.0,
    backbone_lr_mult: float = 1.0,
) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; `set_rates` gives it learning rate and weight decay before every step."""
    groups = parameter_groups(student, layerwise_decay, patch_embed_lr_mult, backbone_lr_mult)
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, fused=True)


def optimizer_of(run: OptimSettings, student: nn.Module) -> torch.optim.Optimizer:
    """As the settings of a run say."""
    rates = run.layerwise_decay, run.patch_embed_lr_mult, run.backbone_lr_mult
    if run.name == "adamw":
        return adamw(student, *rates)
    return Muon(group for group in parameter_groups(student, *rates, muon=True) if group["params"])


def moment_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What its state takes once every weight has moved: AdamW's two moments, or Muon's momentum."""
    return sum(
        (1 if group["matrices"] else 2) * p.numel() * p.element_size()
        for group in optimizer.param_groups
        for p in group["params"]
    )


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
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
        multiply = multiply_alike if scales.is_cuda else multiply_each
        multiply(gradients, list(scales.unbind()))
    return norms.norm()


def multiply_each(tensors: list[Tensor], factors: list[Tensor]) -> None:
    """As `multiply_alike`, for a CPU, where it is a loop over the tensors in any case."""
    torch._foreach_mul_(tensors, factors)


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
