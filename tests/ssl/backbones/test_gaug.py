"""GAug against the formula of METHODS section 2, one number at a time in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfar.ssl.backbones import GaugBias


def naive(bias: GaugBias, q: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    height, width = grid
    start = q.shape[2] - height * width
    out = torch.zeros(*q.shape[:2], q.shape[2], q.shape[2], dtype=torch.float64)
    ceiling = max(bias.grid) ** 2
    shift = math.log(ceiling - 1) if ceiling > 2 else 0
    for b in range(q.shape[0]):
        for head in range(q.shape[1]):
            for p in range(height * width):
                query = q[b, head, start + p].double()
                u = bias.var.weight.double() @ query + bias.var.bias.double()
                alpha = bias.alpha.weight.double() @ query + bias.alpha.bias.double()
                v_row, v_col = (
                    ceiling
                    / (1 + math.exp(-(float(x) - shift)))
                    * (1 if grid == bias.grid else min(grid) / min(bias.grid))
                    for x in u
                )
                for t in range(height * width):
                    dr, dc = p // width - t // width, p % width - t % width
                    gauss = math.exp(-0.5 * (dr**2 / (v_row + 0.1) + dc**2 / (v_col + 0.1)))
                    out[b, head, start + p, start + t] = math.log1p(math.exp(float(alpha))) * gauss
    return out


@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    made_for=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    prefix=st.integers(0, 3),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=25)
def test_bias_equals_the_formula(grid: tuple[int, int], made_for: tuple[int, int], prefix: int, seed: int) -> None:
    torch.manual_seed(seed)
    bias = GaugBias(8, made_for)
    for parameter in bias.parameters():
        torch.nn.init.normal_(parameter)
    q = torch.randn(1, 2, prefix + grid[0] * grid[1], 8)
    with torch.no_grad():
        torch.testing.assert_close(bias(q, grid).double(), naive(bias, q, grid), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bias.double()(q.double(), grid), naive(bias, q, grid), rtol=1e-10, atol=1e-12)


def test_at_birth_every_query_looks_one_patch_around() -> None:
    bias = GaugBias(64, (14, 14))
    for layer in (bias.var, bias.alpha):
        torch.nn.init.zeros_(layer.weight)
    row = bias(torch.randn(1, 1, 197, 64), (14, 14))[0, 0, 1 + 5 * 14 + 5, 1:].reshape(14, 14) / math.log(2)
    got = [row[5, 5], row[5, 6], row[6, 6], row[5, 7]]
    torch.testing.assert_close(torch.stack(got), torch.tensor([1, 0.635, 0.403, 0.162]), atol=6e-4, rtol=0)


def test_parameters() -> None:
    assert sum(p.numel() for p in GaugBias(64, (14, 14)).parameters()) == 195


def test_gradients_flow_to_queries_and_predictor() -> None:
    bias = GaugBias(4, (2, 3)).double()
    q = torch.randn(1, 1, 7, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, *_: bias(q, (2, 3)), (q, *bias.parameters()))


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_finite_and_float32_under_autocast(scale: float) -> None:
    bias = GaugBias(8, (4, 4))
    q = (torch.randn(1, 2, 17, 8) * scale).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = bias(q, (4, 4))
    out.sum().backward()
    assert out.dtype == torch.float32
    assert out.isfinite().all()
    assert q.grad is not None
    assert q.grad.isfinite().all()
