"""GAug, Gaussian-augmented attention (docs/methods.md section 2): a query looks around itself as far as it chooses."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.ssl.backbones.attention import attend_in_windows, compiled_once, window_bias
from nearfar.ssl.backbones.tokens import without_autocast

LARGEST = 1e4  # of alpha: a weight of this size is a choice of one patch already, and float16 ends at 65,504


class GaugBias(nn.Module):
    """Predicts from each query a Gaussian window to add to its attention logits.

    One predictor for all heads of a layer, 3 * (head_dim + 1) parameters. `grid` is the token grid (h, w) the model
    is made for: it bounds the variance (C = max(h, w)**2), and on another grid the variance is scaled by
    min(current) / min(initial), and patches count as at most max(h, w) - 1 rows or columns apart. Everything is
    float32 (or float64), whatever autocast says.
    """

    def __init__(self, head_dim: int, grid: tuple[int, int], eps: float = 0.1) -> None:
        super().__init__()
        self.grid = grid
        self.eps = eps
        self.ceiling = float(max(grid) ** 2)
        self.shift = math.log(self.ceiling - 1) if self.ceiling > 2 else 0.0  # so that the variance starts at 1
        self.var = nn.Linear(head_dim, 2)
        self.alpha = nn.Linear(head_dim, 1)
        for layer in (self.var, self.alpha):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def tables(self, q: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Two tables whose outer product is the bias, which is separable.

        `q` is (..., h*w, head_dim), queries of patch tokens before scaling and before any rotation. Returns
        (..., h*w, h), which carries alpha, and (..., h*w, w).
        """
        with without_autocast(q.device.type):
            own_graph = q.device.type == "cuda" and not torch.compiler.is_compiling()
            make = compiled_once(window_tables) if own_graph else window_tables
            u = self._predicted(q)
            tables: tuple[Tensor, Tensor] = make(u, grid, self.grid, self.ceiling, self.shift, self.eps)
            return tables

    def windows(self, q: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The variances (..., h*w, 2), down and across in patches, and alphas (..., h*w, 1) of the windows."""
        with without_autocast(q.device.type):
            return window_shapes(self._predicted(q), grid, self.grid, self.ceiling, self.shift, self.eps)

    def _predicted(self, q: Tensor) -> Tensor:
        """(..., 3) from queries (..., head_dim), in float32 or float64."""
        precise = torch.promote_types(q.dtype, torch.float32)
        weight = torch.cat([self.var.weight, self.alpha.weight]).to(precise)
        bias = torch.cat([self.var.bias, self.alpha.bias]).to(precise)
        return F.linear(q.to(precise), weight, bias)

    def forward(self, q: Tensor, grid: tuple[int, int]) -> Tensor:
        """Queries (B, heads, R + h*w, head_dim) to a bias (B, heads, R + h*w, R + h*w).

        Rows and columns of the R prefix tokens (CLS, registers) are 0.
        """
        return window_bias(*self.tables(patch_queries(q, grid), grid), q.shape[-2])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], gaug_q: Tensor | None = None) -> Tensor:
        """softmax(q k^T / sqrt(D) + S) v, all (B, heads, R + h*w, head_dim).

        `gaug_q` are the queries that predict the window, where they are not q (rotary models: before rotation).
        """
        rows, columns = self.tables(patch_queries(q if gaug_q is None else gaug_q, grid), grid)
        return attend_in_windows(q, k, v, rows, columns)


def window_tables(
    u: Tensor, grid: tuple[int, int], made_for: tuple[int, int], ceiling: float, shift: float, eps: float
) -> tuple[Tensor, Tensor]:
    """What the predictor says, u (..., h*w, 3), as the tables of `GaugBias.tables`: one expression, to be fused.

    Squared distances count at most (max(made_for) - 1)**2, the largest of the initial grid, as in the published code.
    """
    height, width = grid
    farthest = (max(made_for) - 1) ** 2
    y, x = (torch.arange(side, device=u.device) for side in grid)
    down, across = ((v[:, None] - v).square().clamp(max=farthest).to(u.dtype) for v in (y, x))
    # ONNX converts `repeat_interleave` wrongly for a number of repeats that varies (torch 2.13): expanded instead.
    rows = down.unsqueeze(1).expand(-1, width, -1).flatten(0, 1)  # (h*w, h)
    columns = across.repeat(height, 1)  # (h*w, w)
    variance, alpha = window_shapes(u, grid, made_for, ceiling, shift, eps)
    precision = -0.5 / variance
    return alpha * torch.exp(precision[..., :1] * rows), torch.exp(precision[..., 1:] * columns)


def window_shapes(
    u: Tensor, grid: tuple[int, int], made_for: tuple[int, int], ceiling: float, shift: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Variances (..., h*w, 2) and alphas (..., h*w, 1) from what the predictor says, u (..., h*w, 3)."""
    ceiling = ceiling * (min(grid) / min(made_for))  # no branch, so that one exported graph holds for every grid
    variance = ceiling * torch.sigmoid(u[..., :2] - shift) + eps
    return variance, F.softplus(u[..., 2:]).clamp(max=LARGEST)


def patch_queries(q: Tensor, grid: tuple[int, int]) -> Tensor:
    """The last h*w of the tokens (..., R + h*w, head_dim)."""
    return q[..., q.shape[-2] - grid[0] * grid[1] :, :]
