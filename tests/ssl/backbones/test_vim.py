"""Vision Mamba against docs/methods.md section 4 written out in float64; its counts, directions and place in timm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nearfar.ssl.backbones import VisionMamba, prr
from nearfar.ssl.backbones.token_model import resize_positions
from nearfar.ssl.errors import UserError

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3}


def randomized(model: nn.Module) -> Any:
    """Every parameter away from its start, so that none can be swapped or left out unseen."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            nn.init.normal_(parameter, std=0.2)
            if name.endswith("_log"):
                parameter += torch.arange(1, 17).log()
    return model.eval()


# Parameters


COUNTS = {  # 224 pixels, position embedding or LGP, head for 1000 classes; published totals in M
    "vim_tiny_patch16": (7_148_008, 7.15),
    "vim_small_patch16": (25_796_584, 25.80),
    "vim_base_patch16": (97_598_440, 97.60),
    "vim_tiny_patch16_uni": (6_424_744, 6.42),
    "vim_small_patch16_uni": (23_907_688, 23.91),
    "vim_base_patch16_uni": (92_051_176, 92.05),
    "vim_tiny_patch16_uni_lgp": (6_424_744 + 226_754, 6.65),
    "vim_small_patch16_uni_lgp": (23_907_688 + 674_690, 24.58),
    "vim_base_patch16_uni_lgp": (92_051_176 + 2_234_114, 94.28),  # 94.285: the table cuts where it should round
    "vim_tiny_patch16_lgp": (7_148_008 + 226_754, None),
    "vim_small_patch16_lgp": (25_796_584 + 674_690, None),
    "vim_base_patch16_lgp": (97_598_440 + 2_234_114, None),
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        counted = sum(p.numel() for p in timm.create_model(name, num_classes=1000).parameters())
    exact, published = COUNTS[name]
    print(f"{name:26} {counted:12,}  published {published} M")
    assert counted == exact
    assert published is None or abs(counted / 1e6 - published) < 0.006


@pytest.mark.parametrize(("size", "published"), [("tiny", 0.05), ("small", 0.15), ("base", 0.47)])
def test_lgp_adds_the_published_multiply_adds(size: str, published: float) -> None:
    """Counted per image: what two images cost more than one, without the fold, which is paid once a batch."""
    from torch.utils.flop_counter import FlopCounterMode

    def count(name: str, images: int) -> int:
        model = timm.create_model(name, depth=1, num_classes=0)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.empty(images, 3, 224, 224))
        return counter.get_total_flops() // 2

    plain, lgp = (count(name, 2) - count(name, 1) for name in (f"vim_{size}_patch16", f"vim_{size}_patch16_lgp"))
    print(f"vim_{size}: LGP adds {(lgp - plain) / 1e9:.3f} G multiply-adds, published {published} G")
    assert round((lgp - plain) / 1e9, 2) == published


def test_names_are_the_public_vims() -> None:
    """Of its released weights, but for timm's `blocks` and `norm`."""
    mixer = ["in_proj.weight", "out_proj.weight", "A_log", "A_b_log", "D", "D_b"]
    for suffix in ("", "_b"):
        mixer += [f"conv1d{suffix}.weight", f"conv1d{suffix}.bias", f"x_proj{suffix}.weight"]
        mixer += [f"dt_proj{suffix}.weight", f"dt_proj{suffix}.bias"]
    public = {f"layers.{i}.mixer.{name}" for i in range(2) for name in mixer}
    public |= {"layers.0.norm.weight", "layers.1.norm.weight", "norm_f.weight", "cls_token", "pos_embed"}
    public |= {"patch_embed.proj.weight", "patch_embed.proj.bias", "head.weight", "head.bias"}
    with torch.device("meta"):
        ours = timm.create_model("vim_tiny_patch16", depth=2).state_dict()
    assert {name.replace("layers.", "blocks.").replace("norm_f.", "norm.") for name in public} == set(ours)
    assert ours["pos_embed"].shape == (1, 197, 192) and ours["blocks.0.mixer.x_proj.weight"].shape == (44, 384)


def test_initial_values() -> None:
    torch.manual_seed(0)
    model: Any = VisionMamba(**{**SMALL, "embed_dim": 192, "depth": 4})
    mixer = model.blocks[2].mixer
    for a_log, d, dt_proj in ((mixer.A_log, mixer.D, mixer.dt_proj), (mixer.A_b_log, mixer.D_b, mixer.dt_proj_b)):
        torch.testing.assert_close(a_log.exp(), torch.arange(1.0, 17).repeat(384, 1))
        assert torch.equal(d, torch.ones(384))
        steps = F.softplus(dt_proj.bias.detach())
        assert 0.9e-3 < steps.min() < 2e-3 and 0.05 < steps.max() < 0.101
        assert steps.log().mean() == pytest.approx(torch.tensor([1e-3, 0.1]).log().mean().item(), abs=0.3)
        assert 0.9 * 12**-0.5 < dt_proj.weight.abs().max() <= 12**-0.5
    assert not torch.equal(mixer.dt_proj.weight, mixer.dt_proj_b.weight)
    limit = 384**-0.5 / 4**0.5
    assert 0.95 * limit < mixer.out_proj.weight.abs().max() <= limit
    assert model.patch_embed.proj.weight.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.05)
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.2)


def test_what_takes_no_weight_decay_is_marked() -> None:
    model = VisionMamba(**SMALL)
    marked = model.no_weight_decay()
    for name, parameter in model.named_parameters():
        expected = name.endswith((".bias", ".A_log", ".A_b_log", ".D", ".D_b")) or name in ("pos_embed", "cls_token")
        if "mixer" in name or parameter.ndim > 1:
            assert (name in marked) == expected, name
    assert marked <= {name for name, _ in model.named_parameters()}


# Values


def direction(mixer: Any, x: Tensor, suffix: str) -> Tensor:
    """One scan of docs/methods.md section 4 over (B, L, inner), number by number along L."""
    conv, x_proj, dt_proj = (getattr(mixer, name + suffix) for name in ("conv1d", "x_proj", "dt_proj"))
    a, d = (mixer.A_b_log, mixer.D_b) if suffix else (mixer.A_log, mixer.D)
    padded = torch.cat([x.new_zeros(len(x), 3, x.shape[2]), x], 1)
    taps = [padded[:, k : k + x.shape[1]] * conv.weight[:, 0, k] for k in range(4)]
    x = torch.stack(taps).sum(0) + conv.bias
    x = x * x.sigmoid()
    rank = dt_proj.weight.shape[1]
    low, b, c = x_proj(x).split([rank, 16, 16], -1)
    dt = (1 + (low @ dt_proj.weight.T + dt_proj.bias).exp()).log()
    state, out = x.new_zeros(len(x), x.shape[2], 16), []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t, :, None] * -a.exp())
        state = decay * state + (dt[:, t] * x[:, t])[..., None] * b[:, t, None]
        out.append((state * c[:, t, None]).sum(-1) + d * x[:, t])
    return torch.stack(out, 1)


def written_out(model: Any, images: Tensor, bidirectional: bool) -> Tensor:
    """The whole network at the size it is made for, CLS first."""
    patches = F.conv2d(images, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=8)
    x = patches.flatten(2).transpose(1, 2)
    middle = x.shape[1] // 2
    x = torch.cat([x[:, :middle], model.cls_token.expand(len(x), -1, -1), x[:, middle:]], 1) + model.pos_embed

    def norm(x: Tensor, layer: Any) -> Tensor:
        if bidirectional:
            return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight
        return F.layer_norm(x, (x.shape[-1],), layer.weight, layer.bias, 1e-5)

    for block in model.blocks:
        inner, gate = (norm(x, block.norm) @ block.mixer.in_proj.weight.T).chunk(2, -1)
        gate = gate * gate.sigmoid()
        y = direction(block.mixer, inner, "") * gate
        if bidirectional:
            y = (y + (direction(block.mixer, inner.flip(1), "_b") * gate.flip(1)).flip(1)) / 2
        x = x + y @ block.mixer.out_proj.weight.T
    x = norm(x, model.norm)
    return torch.cat([x[:, middle : middle + 1], x[:, :middle], x[:, middle + 1 :]], 1)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_equals_methods_written_out_with_gradients(bidirectional: bool) -> None:
    model = randomized(VisionMamba(**SMALL, num_classes=0, bidirectional=bidirectional)).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    got, expected = model.forward_features(images), written_out(model, images, bidirectional)
    torch.testing.assert_close(got, expected)
    up = torch.randn_like(got)
    for (name, _), a, b in zip(
        model.named_parameters(),
        torch.autograd.grad(got, list(model.parameters()), up),
        torch.autograd.grad(expected, list(model.parameters()), up),
        strict=True,
    ):
        torch.testing.assert_close(a, b, msg=name)
    single = model.float().forward_features(images.float())
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lgp", [False, True])
def test_both_directions_run_and_one_only_forwards(lgp: bool) -> None:
    """Which output tokens move when one token of the sequence is changed."""
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    for bidirectional in (True, False):
        model = randomized(VisionMamba(**SMALL, lgp=lgp, num_classes=0, bidirectional=bidirectional)).double()
        x, _ = model.embed(images)
        for position in (0, 7, 16):
            other = x.clone()
            other[:, position] += torch.randn(48)
            before, after = x, other
            for block in model.blocks:
                before, after = block(before), block(after)
            moved = ((before - after).abs().amax((0, 2)) > 1e-14).tolist()
            assert moved == [bidirectional or i >= position for i in range(17)]


def test_cls_is_in_the_middle_and_comes_out_first() -> None:
    model = randomized(VisionMamba(**SMALL, lgp=True, num_classes=0))
    images = torch.randn(1, 3, 24, 40)
    x, grid = model.embed(images)
    assert grid == (3, 5) and x.shape == (1, 16, 48)
    torch.testing.assert_close(x[0, 7], model.cls_token[0, 0])
    patches = model.patch_embed(images)
    torch.testing.assert_close(torch.cat([x[:, :7], x[:, 8:]], 1), patches)
    (prefix, spatial), *_ = [
        (p, s) for s, p in model.forward_intermediates(images, 1, return_prefix_tokens=True, intermediates_only=True)
    ]
    for block in model.blocks:
        x = block(x)
    torch.testing.assert_close(prefix, x[:, 7:8])
    torch.testing.assert_close(spatial.flatten(2).transpose(1, 2), torch.cat([x[:, :7], x[:, 8:]], 1))


def test_positions_of_any_size_keep_cls_apart() -> None:
    model = randomized(VisionMamba(**SMALL, num_classes=0))
    with torch.no_grad():
        model.pos_embed[:, 8] = 100.0  # CLS's
    for height, width in ((32, 32), (48, 24), (16, 64), (8, 8)):
        x, grid = model.embed(torch.zeros(1, 3, height, width))
        middle = grid[0] * grid[1] // 2
        assert x[0, middle].min() > 90
        assert torch.cat([x[0, :middle], x[0, middle + 1 :]]).abs().max() < 10
        assert model.forward_features(torch.zeros(1, 3, height, width)).isfinite().all()
    torch.testing.assert_close(  # a side that is no multiple is padded
        model.forward_features(F.pad(torch.ones(1, 3, 27, 32), (0, 0, 0, 5))),
        model.forward_features(torch.ones(1, 3, 27, 32)),
    )


@pytest.mark.parametrize("antialias", [False, True])
def test_positions_are_resampled_as_torch_does(antialias: bool) -> None:
    """Against torch's own bicubic in float64: with DINO's scale (n + .1) / n0 a side, or antialiased to the size."""
    for made_for, grids in (((14, 14), [(6, 6), (6, 9), (20, 14), (1, 1)]), ((4, 5), [(8, 3), (2, 10)])):
        table = torch.randn(1, 6, *made_for, dtype=torch.float64)
        positions = table.flatten(2).transpose(1, 2)
        for grid in grids:
            if antialias:
                expected = F.interpolate(table, size=grid, mode="bicubic", antialias=True)
            else:
                scale = tuple((new + 0.1) / old for new, old in zip(grid, made_for, strict=True))
                expected = F.interpolate(table, scale_factor=scale, mode="bicubic", align_corners=False)
            got = resize_positions(positions, made_for, grid, antialias).transpose(1, 2).unflatten(2, grid)
            tolerance = 1e-5 if antialias else 1e-12
            if not (antialias and 1 in grid):  # torch 2.13 antialiases one pixel wrongly
                torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
        assert resize_positions(positions, made_for, made_for) is positions


def test_prr_comes_last() -> None:
    model = randomized(VisionMamba(**SMALL, prr=True, num_heads=3, num_classes=0))
    images = torch.randn(2, 3, 32, 32)
    refined = model.forward_features(images)
    model.prr = False
    torch.testing.assert_close(refined, prr(model.forward_features(images), 3))


# Half precision


def test_residual_stream_is_float32_and_bfloat16_stays_near() -> None:
    model = VisionMamba(**SMALL, lgp=True, num_classes=0).eval()
    images = torch.randn(2, 3, 32, 32)
    streams: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: streams.append(args[0]))
    with torch.no_grad():
        exact = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(images)
        assert all(x.dtype == torch.float32 for x in streams)
        assert F.cosine_similarity(exact, rough.float()).min() > 0.999
        streams.clear()
        assert model.bfloat16()(images.bfloat16()).dtype == torch.bfloat16
        assert all(x.dtype == torch.float32 for x in streams)


@pytest.mark.long
def test_300_steps_in_bfloat16_stay_finite_and_learn() -> None:
    """Which quarter of the image is bright."""
    torch.manual_seed(0)
    model = VisionMamba(8, 4, 16, 2, num_classes=4, lgp=True, drop_path_rate=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(300):
        labels = torch.randint(4, (8,))
        images = 0.5 * torch.randn(8, 3, 8, 8)
        for image, label in zip(images, labels.tolist(), strict=True):
            image.unflatten(2, (2, 4)).unflatten(1, (2, 4))[:, label // 2, :, label % 2] += 3.0
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(p.isfinite().all() for p in model.parameters())
    assert sum(losses[-20:]) / 20 < 0.5 * sum(losses[:20]) / 20


# timm


def test_registered_names() -> None:
    assert set(COUNTS) <= set(timm.list_models())


def test_timm_citizen(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model("vim_tiny_patch16", img_size=32, patch_size=8, embed_dim=48, depth=3, num_classes=5)
    model.eval()
    images = torch.randn(2, 3, 32, 32)
    features = model.forward_features(images)
    assert model.num_features == 48 and features.shape == (2, 17, 48) and model(images).shape == (2, 5)
    torch.testing.assert_close(model.forward_head(features), model(images))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features[:, 0])
    last, every = model.forward_intermediates(images, norm=True)
    assert len(every) == 3 and every[0].shape == (2, 48, 4, 4)
    torch.testing.assert_close(every[-1].flatten(2).transpose(1, 2), features[:, 1:])
    torch.testing.assert_close(last, features)
    maps = timm.create_model("vim_tiny_patch16_lgp", img_size=32, depth=3, features_only=True)(images)
    assert [m.shape for m in maps] == [(2, 192, 2, 2)] * 3

    save_file(model.state_dict(), tmp_path / "vim.safetensors")
    twin = timm.create_model(
        "vim_tiny_patch16", img_size=32, patch_size=8, embed_dim=48, depth=3, num_classes=5,
        checkpoint_path=str(tmp_path / "vim.safetensors"),
    ).eval()  # fmt: skip
    torch.testing.assert_close(twin(images), model(images))
    assert load_file(tmp_path / "vim.safetensors").keys() == model.state_dict().keys()
    model.reset_classifier(0, "avg")
    torch.testing.assert_close(model(images), features[:, 1:].mean(1))
    with pytest.raises(UserError, match="pooling"):
        model.reset_classifier(3, "maximum")
    with pytest.raises(UserError, match="no published weights"):
        timm.create_model("vim_tiny_patch16_uni", pretrained=True)


def test_drop_path_and_checkpointing() -> None:
    model = VisionMamba(**SMALL, lgp=True, num_classes=0, drop_path_rate=0.5).train()
    images = torch.randn(4, 3, 32, 32)
    found = []
    for enable, seed in ((False, 0), (True, 0), (False, 1)):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(seed)
        out = model(images)
        out.square().sum().backward()
        found.append([out.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == 1 + len(list(model.parameters()))
    torch.testing.assert_close(found[0], found[1])
    assert not torch.equal(found[0][0], found[2][0])
    assert [getattr(block.drop_path, "drop_prob", 0) for block in model.blocks] == pytest.approx([0, 0.25, 0.5])


def test_compiles_in_one_graph() -> None:
    model = randomized(VisionMamba(**{**SMALL, "depth": 1}, num_classes=0))
    images = torch.randn(1, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images))
