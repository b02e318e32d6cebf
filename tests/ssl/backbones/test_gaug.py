"""GAug against the formula of docs/methods.md section 2, one number at a time in float64."""

import importlib
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfar.ssl.backbones import GaugBias, attention
from nearfar.ssl.backbones.attention import (
    attend_in_windows,
    flex_windows,
    local_score_mod,
    window_bias,
    written_bias,
)


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


def tables(grid: tuple[int, int], tokens: int, width: int = 16) -> list[torch.Tensor]:
    """Queries, keys, values, and the tables of a random window."""
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = torch.randn(3, 2, 3, tokens, width, dtype=torch.float64, generator=generator).unbind(0)
    rows, columns = (
        torch.rand(2, 3, grid[0] * grid[1], side, dtype=torch.float64, generator=generator) for side in grid
    )
    return [x.requires_grad_() for x in (q, k, v, rows, columns)]


def written_out(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Attention with the window on a grid of 3 rows of 4, one logit of the bias at a time."""
    prefix = q.shape[2] - 12
    bias = torch.zeros(*q.shape[:3], q.shape[2], dtype=torch.float64)
    for p in range(12):
        for t in range(12):
            bias[:, :, prefix + p, prefix + t] = rows[:, :, p, t // 4] * columns[:, :, p, t % 4]
    return (q @ k.transpose(2, 3) / math.sqrt(q.shape[3]) + bias).softmax(-1) @ v


@pytest.mark.parametrize("prefix", [0, 3])
def test_windowed_attention_equals_the_written_out_one(prefix: int) -> None:
    leaves = tables((3, 4), prefix + 12)
    out, expected = attend_in_windows(*leaves), written_out(*leaves)
    torch.testing.assert_close(out, expected)
    up = torch.randn_like(out)
    for a, b in zip(*(torch.autograd.grad(y, leaves, up) for y in (out, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_written_out_bias_has_the_gradients_of_its_products(dtype: torch.dtype) -> None:
    """By autograd through the float32 products, whatever the type of the logits."""
    rows, columns = (x.detach().float().requires_grad_() for x in tables((5, 2), 13)[3:])
    bias = written_bias(rows, columns, 13, dtype)
    expected = window_bias(rows, columns, 13)
    assert torch.equal(bias, expected.to(dtype))
    up = torch.randn(bias.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    got, right = (
        torch.autograd.grad(bias, [rows, columns], up),
        torch.autograd.grad(expected, [rows, columns], up.float()),
    )
    for a, b in zip(got, right, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("prefix", [0, 3])
def test_the_gpus_score_is_the_bias_with_its_gradients(prefix: int) -> None:
    """What FlexAttention adds to each logit, evaluated at every place, against the bias written out."""
    rows, columns = tables((3, 4), prefix + 12)[3:]
    padded_rows, padded_columns = (torch.nn.functional.pad(table, (0, 0, prefix, 0)) for table in (rows, columns))
    add = local_score_mod(padded_rows, padded_columns, prefix)
    places = [torch.arange(n) for n in (2, 3, prefix + 12, prefix + 12)]
    grid = torch.meshgrid(*places, indexing="ij")
    found = add(torch.zeros(2, 3, prefix + 12, prefix + 12, dtype=torch.float64), *grid)
    expected = window_bias(rows, columns, prefix + 12)
    torch.testing.assert_close(found, expected)
    up = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad(y, [rows, columns], up) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.fixture
def flex_with_gradients(monkeypatch: pytest.MonkeyPatch) -> Callable[..., torch.Tensor]:
    """FlexAttention as torch.compile traces it for a GPU, its graphs run operation by operation on this CPU.

    Its public function refuses gradients on a CPU, for which inductor has no kernel. The operator behind it has both
    directions: the gradient graph of score_mod, which a GPU's kernel is made from, is traced and run here.
    """
    module = importlib.import_module("torch.nn.attention.flex_attention")
    monkeypatch.setattr(module, "_validate_device", lambda *_: None)
    torch.compiler.reset()
    return torch.compile(module.flex_attention, backend="aot_eager", dynamic=False, fullgraph=True)


@pytest.mark.parametrize(("prefix", "width"), [(0, 16), (1, 8), (3, 16)])
def test_flex_attention_has_the_explicit_paths_values_and_gradients(
    flex_with_gradients: Callable[..., torch.Tensor], prefix: int, width: int
) -> None:
    """Of q, k, v and both tables, by the real score, on a grid that is not square: all in float64."""
    leaves = tables((3, 4), prefix + 12, width)
    found, expected = flex_windows(flex_with_gradients, *leaves), written_out(*leaves)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    up = torch.randn_like(expected)
    gradients = zip(*(torch.autograd.grad(y, leaves, up) for y in (found, expected)), strict=True)
    for name, (ours, theirs) in zip(("q", "k", "v", "rows", "columns"), gradients, strict=True):
        assert float(theirs.abs().max()) > 1e-3, name
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("tokens", "head_dim", "device", "missing", "chosen"),
    [
        (1025, 64, "cuda", "", True),
        (513, 16, "cuda", "", True),
        (512, 64, "cuda", "", False),  # as long as a written-out bias is cheap
        (197, 64, "cuda", "", False),
        (1025, 8, "cuda", "", False),  # narrower than FlexAttention's kernels
        (1025, 64, "cpu", "", False),
        (1025, 64, "meta", "", False),
        (1025, 64, "cuda", "no C compiler", False),
    ],
)
def test_which_attention_reads_the_tables(
    monkeypatch: pytest.MonkeyPatch, tokens: int, head_dim: int, device: str, missing: str, chosen: bool
) -> None:
    monkeypatch.setattr(attention, "cuda_compiler_missing", lambda: missing)
    assert attention.reads_tables(tokens, head_dim, device) is chosen


def test_narrow_heads_do_not_even_look_for_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "cuda_compiler_missing", lambda: pytest.fail("asked for a compiler"))
    assert not attention.reads_tables(4097, 8, "cuda") and not attention.reads_tables(4097, 64, "cpu")


def test_without_a_compiler_the_same_function_runs_uncompiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And the log says why, once."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to find\nC compiler")

    monkeypatch.setattr(torch, "compile", broken)
    for cached in (attention.cuda_compiler_missing, attention.compiled_once):
        cached.cache_clear()
    try:
        assert attention.compiled_once(math.sqrt) is math.sqrt and attention.compiled_once(math.cos) is math.cos
        assert attention.cuda_compiler_missing() == "Failed to find C compiler"
        assert not attention.reads_tables(1025, 64, "cuda")
        assert [record.getMessage().count("C compiler") for record in caplog.records] == [1]
    finally:
        for cached in (attention.cuda_compiler_missing, attention.compiled_once):
            cached.cache_clear()


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
