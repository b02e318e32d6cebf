"""Many linear classifiers side by side on the same features: what a learning-rate sweep trains in one go."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearHeads(nn.Module):
    """`heads` independent linear classifiers as one matrix product. (B, D) -> (B, heads, classes).

    Zero-initialized: softmax regression is convex, so a start at zero is as good as any and needs no seed.
    """

    def __init__(self, dim: int, classes: int, heads: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, classes, dim))
        self.bias = nn.Parameter(torch.zeros(heads, classes))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(0, 1), self.bias.flatten()).unflatten(-1, self.bias.shape)
