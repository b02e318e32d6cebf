"""Axial rotary positions: queries and keys turn by angles that grow with a patch's row and column.

Heo et al., "Rotary Position Embedding for Vision Transformer" (2024), the axial form with its temperature of 100. The
first half of a head's pairs of numbers turns with the row, the second with the column; a product of a query and a key
then depends on how far apart they are, so no position is learned and any grid fits.
"""

import torch
from torch import Tensor, nn

from nearfar.ssl.errors import UserError

TEMPERATURE = 100.0


class AxialRope(nn.Module):
    """Angles for heads of `head_dim` numbers (a multiple of 4, or UserError). It has no parameters."""

    def __init__(self, head_dim: int, temperature: float = TEMPERATURE) -> None:
        super().__init__()
        if head_dim % 4:
            raise UserError(
                f"Rotary positions turn pairs of numbers by row and by column, so the heads' width must be a multiple "
                f"of 4, not {head_dim}; choose another embed_dim or num_heads."
            )
        frequencies = temperature ** -(torch.arange(head_dim // 4, device="cpu") / (head_dim // 4))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Sine and cosine, each (h*w, head_dim / 2), of the patches of a grid (h, w) row by row."""
        frequencies: Tensor = self.frequencies  # type: ignore[assignment]
        height, width = grid
        y, x = (torch.arange(side, device=frequencies.device)[:, None] * frequencies for side in (height, width))
        rows = y.unsqueeze(1).expand(-1, width, -1).flatten(0, 1)  # ONNX has no `repeat_interleave` by a varying number
        angles = torch.cat([rows, x.repeat(height, 1)], 1)
        return angles.sin(), angles.cos()


def rotate(x: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
    """Turn the patch tokens of (B, heads, R + h*w, head_dim); the R prefix tokens stay. Returns x's dtype."""
    prefix = x.shape[-2] - sine.shape[-2]
    a, b = x[..., prefix:, 0::2], x[..., prefix:, 1::2]
    rotated = torch.stack([a * cosine - b * sine, b * cosine + a * sine], -1).flatten(-2)
    return torch.cat([x[..., :prefix, :], rotated.to(x.dtype)], -2)
