"""PRR, patch representation refinement: self-attention without parameters on the final tokens.

The formula is in docs/methods.md section 3.
"""

from torch import Tensor

from nearfar.ssl.backbones.attention import attend


def prr(x: Tensor, num_heads: int, fused: bool = True) -> Tensor:
    """Refine tokens (B, N, D), CLS and registers included, by y = MHSA(x, x, x) without projections or residual.

    It goes after the final norm and before pooling. `fused=False` writes the attention matrix out; both agree.
    """
    heads = x.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    if fused:
        y = attend(heads, heads, heads)
    else:
        logits = heads @ heads.transpose(-2, -1) * heads.shape[-1] ** -0.5
        y = logits.softmax(-1) @ heads
    return y.transpose(1, 2).flatten(2)
