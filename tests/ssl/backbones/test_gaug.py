"""GAug against the formula of docs/methods.md section 2, one number at a time in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfar.ssl.backbones import GaugBias
from nearfar.ssl.backbones.attention import attend_in_windows, window_bias, window_score


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
                    r, c = (min(d**2, (max(bias.grid) - 1) ** 2) for d in (dr, dc))
                    gauss = math.exp(-0.5 * (r / (v_row + 0.1) + c / (v_col + 0.1)))
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


def tables(grid: tuple[int, int], tokens: int) -> list[torch.Tensor]:
    """Queries, keys, values, and the tables of a random window."""
    q, k, v = torch.randn(3, 2, 3, tokens, 16, dtype=torch.float64).unbind(0)
    rows, columns = (torch.rand(2, 3, grid[0] * grid[1], side, dtype=torch.float64) for side in grid)
    return [x.requires_grad_() for x in (q, k, v, rows, columns)]


@pytest.mark.parametrize("prefix", [0, 3])
def test_windowed_attention_equals_the_written_out_one(prefix: int) -> None:
    q, k, v, rows, columns = leaves = tables((3, 4), prefix + 12)
    out = attend_in_windows(*leaves)
    logits = q @ k.transpose(2, 3) / 4
    bias = torch.zeros(2, 3, prefix + 12, prefix + 12, dtype=torch.float64)
    for p in range(12):
        for t in range(12):
            bias[:, :, prefix + p, prefix + t] = rows[:, :, p, t // 4] * columns[:, :, p, t % 4]
    wanted = (logits + bias).softmax(-1) @ v
    torch.testing.assert_close(out, wanted)
    up = torch.randn_like(out)
    for a, b in zip(*(torch.autograd.grad(y, leaves, up) for y in (out, wanted)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("prefix", [0, 3])
def test_the_gpus_score_is_the_bias_with_its_gradients(prefix: int) -> None:
    """What FlexAttention adds to each logit, evaluated at every place, against the bias written out."""
    rows, columns = tables((3, 4), prefix + 12)[3:]
    padded_rows, padded_columns = (torch.nn.functional.pad(table, (0, 0, prefix, 0)) for table in (rows, columns))
    add = window_score(padded_rows, padded_columns, prefix)
    places = [torch.arange(n) for n in (2, 3, prefix + 12, prefix + 12)]
    grid = torch.meshgrid(*places, indexing="ij")
    found = add(torch.zeros(2, 3, prefix + 12, prefix + 12, dtype=torch.float64), *grid)
    wanted = window_bias(rows, columns, prefix + 12)
    torch.testing.assert_close(found, wanted)
    up = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad(y, [rows, columns], up) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_agrees_with_the_explicit_path() -> None:
    """Values only: FlexAttention has no backward on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    leaves = [x.detach().float() for x in tables((3, 4), 14)]
    q, k, v, rows, columns = leaves
    padded_rows, padded_columns = (torch.nn.functional.pad(table, (0, 0, 2, 0)) for table in (rows, columns))
    found = flex_attention(q, k, v, score_mod=window_score(padded_rows, padded_columns, 2))
    torch.testing.assert_close(found, attend_in_windows(*leaves), rtol=1e-5, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gpus_path_agrees_with_the_explicit_one(dtype: torch.dtype) -> None:
    leaves = [x.detach().float() for x in tables((14, 14), 199)]
    results = []
    for device in ("cpu", "cuda"):
        here = [x.to(device, torch.float32 if i > 2 else dtype).requires_grad_() for i, x in enumerate(leaves)]
        out = attend_in_windows(*here)
        gradients = torch.autograd.grad(out.float().square().sum(), here)
        results.append([out.cpu().float(), *(gradient.cpu().float() for gradient in gradients)])
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))
