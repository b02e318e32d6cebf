"""The scale of the loss under fp16 (Micikevicius et al. 2018, section 3.2), found and kept on the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

FIRST, LEAST, MOST = 2.0**16, 1.0, 2.0**24
GROWTH_INTERVAL = 2000  # good steps in a row after which the scale is doubled


class LossScale(nn.Module):
    """A power of two that the loss is multiplied by, so that small gradients are numbers of float16 too.

    A step whose scaled gradient overflows is skipped and halves the scale; `GROWTH_INTERVAL` good steps in a row double
    it. All ranks see the same gradients, summed, and so the same scale. torch's GradScaler asks the device for its
    answer in every step; here the host never waits. Both numbers are buffers: checkpoints hold them.
    """

    scale: Tensor
    good_steps: Tensor  # in a row, since the scale last changed

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((), FIRST))
        self.register_buffer("good_steps", torch.zeros(()))

    def scaled(self, loss: Tensor) -> Tensor:
        return loss * self.scale

    @torch.no_grad()
    def unscale(self, parameters: list[nn.Parameter]) -> None:
        """Divide the gradients by the scale: exact, since it is a power of two."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_mul_(gradients, self.scale.reciprocal())

    @torch.no_grad()
    def overflowed(self, loss: Tensor, bad: Tensor) -> Tensor:
        """1 where a step failed by its scale alone: the loss is finite, the gradient is not, and can be scaled less.

        bad: 1 where loss or gradient are not finite.
        """
        return bad * (torch.isfinite(loss) & (self.scale > LEAST))

    @torch.no_grad()
    def update(self, skipped: Tensor, stopped: Tensor) -> None:
        """After a step. skipped: 1 where it overflowed. stopped: 1 where the run is over, and nothing changes any more.

        Both are scalars on the device of the scale.
        """
        good = (self.good_steps + 1) * (1 - skipped)
        grown = (good >= GROWTH_INTERVAL).to(good.dtype)
        scale = (self.scale * (1 - skipped / 2 + grown)).clamp(LEAST, MOST)
        self.scale.copy_(torch.where(stopped > 0, self.scale, scale))
        self.good_steps.copy_(torch.where(stopped > 0, self.good_steps, good * (1 - grown)))


def fitted(tensors: Mapping[str, Tensor], scale: LossScale | None, prefix: str = "loss_scale.") -> dict[str, Tensor]:
    """A learner's saved tensors for one that may compute in another precision.

    Continued without fp16, a saved scale has no use; continued with fp16 after another precision, it starts afresh.
    """
    own = {} if scale is None else {f"{prefix}{name}": tensor for name, tensor in scale.state_dict().items()}
    return own | {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix) or name in own}
