"""Many linear classifiers side by side on the same features: what a learning-rate sweep trains in one go."""

from torch import Tensor, nn


class LinearHeads(nn.Module):
    """`heads` independent linear classifiers as one matrix product. (B, D) -> (B, heads, classes).

    Zero-initialised: softmax regression is convex, so a start at zero is as good as any and needs no seed.
    """

    def __init__(self, dim: int, classes: int, heads: int = 1) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, heads * classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.shape = (heads, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x).unflatten(-1, self.shape)
        return logits
