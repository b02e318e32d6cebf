"""The projection head of DINO: features -> logits over prototypes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.ssl.heads.batch_norm import BatchNorm


class _CosineLogits(torch.autograd.Function):
    """x (N, D), rows w (K, D) of any length -> x . w / |w|, (N, K).

    The lengths scale the products instead of the rows: with N below D, as in a step of DINO, dividing 65,536 rows and
    going back through that division costs more than the product itself. Nothing is done for `w` while it is frozen.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        scale = torch.linalg.vector_norm(w, dim=1).clamp_min_(1e-12).reciprocal_()
        logits = torch.mm(x, w.t()).mul_(scale)
        ctx.save_for_backward(x, w, scale, logits)
        return logits

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, w, scale, logits = ctx.saved_tensors
        scaled = grad * scale
        to_x = torch.mm(scaled, w) if ctx.needs_input_grad[0] else None
        to_w = None
        if ctx.needs_input_grad[1]:  # d|w|^-1 / dw = -|w|^-3 w: the part along the prototype is removed
            along = torch.linalg.vecdot(scaled, logits, dim=0).mul_(scale).neg_()
            to_w = torch.addmm(w * along[:, None], scaled.t(), x)
        return to_x, to_w


def cosine_logits(embeddings: Tensor, prototypes: Tensor) -> Tensor:
    """Unit embeddings (N, D) and prototypes (K, D) of any length -> cosines (N, K); once differentiable."""
    logits: Tensor = _CosineLogits.apply(embeddings, prototypes)
    return logits


class DINOHead(nn.Module):
    """MLP, L2 normalization, cosine with K unit prototypes (DINO, section 3.1; docs/methods.md section 5).

    Three linear layers with GELU between (`batch_norm` before each GELU, which DINO leaves out and short runs on
    little data need), then a weight-normed layer without bias whose gain stays 1: only directions are learned.
    """

    def __init__(
        self,
        in_dim: int,
        prototypes: int,
        hidden: int = 2048,
        bottleneck: int = 256,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = in_dim
        for _ in range(2):
            layers.append(nn.Linear(width, hidden, bias=not batch_norm))
            if batch_norm:
                layers.append(BatchNorm(hidden))
            layers.append(nn.GELU())
            width = hidden
        layers.append(nn.Linear(width, bottleneck))
        self.mlp = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        # Uniform as in torch's Linear: only the direction counts, but the length sets the effective learning rate.
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck).uniform_(-1, 1) * bottleneck**-0.5)

    def forward(self, features: Tensor, counts: Tensor | None = None) -> Tensor:
        """(N, in_dim) -> cosines (N, K), each within [-1, 1]; `counts` (N,) bool: rows that batch norm looks at."""
        embedding = features
        for layer in self.mlp:
            embedding = layer(embedding, counts) if isinstance(layer, BatchNorm) else layer(embedding)
        # A temperature of .04 multiplies the rounding of a cosine by 25, so cosines are never half precision.
        with torch.autocast(embedding.device.type, enabled=False):
            embedding = F.normalize(embedding.to(self.prototypes.dtype), dim=-1, eps=1e-6)
            return cosine_logits(embedding, self.prototypes)
