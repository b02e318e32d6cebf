"""PRR and attention: fused, explicit, and timm's pooling form of PRR agree."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolPrr

from nearfar.ssl.backbones import prr
from nearfar.ssl.backbones.attention import attend


def test_fused_equals_explicit() -> None:
    x = torch.randn(2, 10, 24, dtype=torch.float64, requires_grad=True)
    fused, explicit = prr(x, 3), prr(x, 3, fused=False)
    torch.testing.assert_close(fused, explicit)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (fused, explicit)))


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_pooled_equals_timm(pool: str) -> None:
    x = torch.randn(2, 17, 48)
    y = prr(x, 4)
    pooled = y[:, 0] if pool == "token" else y.mean(1)
    torch.testing.assert_close(pooled, AttentionPoolPrr(48, 4, pool_type=pool)(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_attend_equals_sdpa(dtype: torch.dtype, biased: bool) -> None:
    q, k, v = torch.randn(3, 2, 4, 9, 16, dtype=dtype).unbind(0)
    bias = torch.randn(2, 4, 9, 9, dtype=dtype) if biased else None
    expected = F.scaled_dot_product_attention(
        *(x.double() for x in (q, k, v)), attn_mask=None if bias is None else bias.double()
    )
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(attend(q, k, v, bias).double(), expected, rtol=tolerance, atol=tolerance)


def test_float32_tokens_under_autocast_are_refined_in_bfloat16() -> None:
    x = torch.nn.functional.layer_norm(torch.randn(2, 10, 24), (24,)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = prr(x, 3)
    assert y.dtype == torch.bfloat16
    expected = prr(x.double(), 3)
    torch.testing.assert_close(y.double(), expected, rtol=2e-2, atol=2e-2)
    gradient, exact = (torch.autograd.grad(z.double().square().sum(), x)[0] for z in (y, expected))
    torch.testing.assert_close(gradient, exact, rtol=5e-2, atol=5e-2)
