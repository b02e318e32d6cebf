"""Public weight files, made here in their layouts: names, wrappers, heads, positions, and what does not fit."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from nearfar.ssl import checkpoint
from nearfar.ssl.backbones import VisionTransformer, create, load_weights
from nearfar.ssl.backbones.weights import antialiased, read_state
from nearfar.ssl.errors import UserError

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
SMALL_OURS: dict[str, Any] = {key: value for key, value in SMALL.items() if key != "patch_size"}

State = dict[str, Tensor]


def timms(**options: Any) -> Any:
    torch.manual_seed(3)
    model = timm.models.VisionTransformer(**{**SMALL, "num_classes": 0, "dynamic_img_size": True, **options})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def saved(tmp_path: Path, content: Any, name: str = "weights.pth") -> Path:
    torch.save(content, tmp_path / name)
    return tmp_path / name


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


HEAD = {"head.mlp.0.weight": torch.ones(4, 48), "head.last_layer.weight_g": torch.ones(9, 1)}


@pytest.mark.parametrize("layout", ["full", "teacher", "plain", "compiled", "safetensors"])
def test_dinos_files(tmp_path: Path, layout: str) -> None:
    theirs = timms()
    state, other = theirs.state_dict(), {k: v + 1 for k, v in theirs.state_dict().items()}
    content: dict[str, Any] = {
        "full": {
            "student": prefixed("module.backbone.", other) | prefixed("module.", HEAD),
            "teacher": prefixed("backbone.", state) | HEAD,
            "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
            "epoch": 3,
            "args": argparse.Namespace(arch="vit_small"),
            "dino_loss": {"center": torch.zeros(1, 9)},
        },
        "teacher": {"teacher": prefixed("module.backbone.", state) | prefixed("module.", HEAD)},
        "plain": dict(state),
        "compiled": {"state_dict": prefixed("_orig_mod.module.", state)},
        "safetensors": {},
    }
    path = saved(tmp_path, content[layout])
    if layout == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(state, path)
    model = VisionTransformer(**SMALL, num_classes=0).eval()
    match = load_weights(model, path)
    images = torch.randn(1, 3, 32, 32)  # at other sizes timm's positions differ from DINO's
    torch.testing.assert_close(model.forward_features(images), theirs.forward_features(images), rtol=1e-4, atol=1e-4)
    assert match.tensors == len(state)
    assert match.numbers == sum(value.numel() for value in state.values())
    assert set(match.dropped) == (set(HEAD) if layout in ("full", "teacher") else set())
    assert str(match).splitlines()[1].split() == [
        "matched",
        str(len(state)),
        "tensors,",
        f"{match.numbers:,}",
        "numbers",
    ]


def test_dinov2_with_registers(tmp_path: Path) -> None:
    """Meta's names (register_tokens, mask_token, positions for CLS) into timm's model, and timm's into ours."""
    theirs = timms(reg_tokens=4, no_embed_class=True)
    state = theirs.state_dict()
    meta = {key: value for key, value in state.items() if key not in ("reg_token", "pos_embed")}
    meta |= {"register_tokens": state["reg_token"], "mask_token": torch.zeros(1, 48)}
    meta["pos_embed"] = torch.cat([torch.zeros(1, 1, 48), state["pos_embed"]], 1)
    images = torch.randn(1, 3, 32, 32)
    for content, model in [
        (meta, VisionTransformer(**SMALL, registers=4, num_classes=0)),
        (state, VisionTransformer(**SMALL, registers=4, num_classes=0)),
        (meta, timms(reg_tokens=4, no_embed_class=True, norm_layer=nn.LayerNorm)),
    ]:
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        load_weights(model, saved(tmp_path, content))
        tolerance = {"rtol": 1e-4, "atol": 1e-3}
        torch.testing.assert_close(model.eval().forward_features(images), theirs.forward_features(images), **tolerance)


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_dinov3", "vit_small_patch14_dinov2", "swin_tiny_patch4_window7_224"]
)
def test_timms_names_into_create(tmp_path: Path, name: str) -> None:
    depth = {} if "swin" in name else {"depth": 1}
    theirs = timm.create_model(name, img_size=56 if "14" in name else 64, **depth).eval()
    path = saved(tmp_path, theirs.state_dict())
    size = 56 if "14" in name else 64
    backbone = create(f"timm/{name}", img_size=size, weights=str(path), **depth).eval()
    images = torch.randn(1, 3, size, size)
    expected = theirs.forward_features(images)
    found = backbone(images)
    torch.testing.assert_close(torch.cat([found.prefix, found.patches], 1), expected.reshape(1, -1, expected.shape[-1]))
    assert "weights" not in backbone.arch  # an exported model needs no file but its own


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "legacy_seresnet18", "inception_next_atto"])
def test_timms_files_of_convolutional_networks(tmp_path: Path, name: str) -> None:
    """Their blocks are numbered by stage and block, as those of a ViT in chunks are by chunk and block."""
    theirs = timm.create_model(name)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
    backbone: Any = create(f"timm/{name}", img_size=64, weights=saved(tmp_path, theirs.state_dict())).eval()
    images = torch.randn(2, 3, 64, 64)
    expected = theirs.eval().forward_features(images)
    torch.testing.assert_close(backbone(images).map(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_norm_in_the_head_is_found(tmp_path: Path) -> None:
    theirs = timm.create_model("convnext_atto").eval()
    nn.init.normal_(theirs.head.norm.weight)
    backbone: Any = create("timm/convnext_atto", img_size=64, weights=saved(tmp_path, theirs.state_dict())).eval()
    images = torch.randn(1, 3, 64, 64)
    expected = theirs.head.norm(theirs.forward_features(images))
    torch.testing.assert_close(backbone(images).map(), expected)


def test_our_own_export(tmp_path: Path) -> None:
    theirs = create("vit_tiny_patch8_lgp_locat", img_size=32, depth=1).eval()
    save_file(theirs.state_dict(), tmp_path / "teacher.safetensors")
    ours = create("vit_tiny_patch8_lgp_locat", img_size=32, depth=1, weights=tmp_path / "teacher.safetensors").eval()
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(ours(images).patches, theirs(images).patches)


def test_new_parts_start_fresh_and_positions_give_way(tmp_path: Path) -> None:
    """Plain weights into models with GAug and LGP: the table says what was new and what was dropped."""
    theirs = timms()
    path = saved(tmp_path, theirs.state_dict())
    match = load_weights(VisionTransformer(**SMALL, gaug=True, num_classes=0), path)
    assert len(match.fresh) == 8
    assert "blocks.*.attn.gaug.var.weight" in str(match)
    model = VisionTransformer(**SMALL, lgp=True, num_classes=0)
    match = load_weights(model, path)
    assert match.dropped == ["pos_embed"]
    assert {name.split(".")[1] for name in match.fresh} == {
        "local_mix", "bands_proj", "bands_mix", "bands_out", "gate", "fuse", "out", "norm",
    }  # fmt: skip
    assert torch.equal(model.state_dict()["patch_embed.proj.weight"], theirs.state_dict()["patch_embed.proj.weight"])
    backbone: Any = create("timm/vit_tiny_patch16_224", img_size=32, depth=1, lgp=True, gaug=True)
    plain = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    load_weights(backbone, saved(tmp_path, plain.state_dict()))
    assert torch.equal(backbone.model.patch_embed.proj.proj.weight, plain.patch_embed.proj.weight)


def test_half_of_a_part_is_a_mistake(tmp_path: Path) -> None:
    state = VisionTransformer(**SMALL, gaug=True, num_classes=0).state_dict()
    del state["blocks.1.attn.gaug.alpha.bias"]
    with pytest.raises(UserError, match=r"missing: blocks\.1\.attn\.gaug\.alpha\.bias"):
        load_weights(VisionTransformer(**SMALL, gaug=True, num_classes=0), saved(tmp_path, state))


def test_locats_names(tmp_path: Path) -> None:
    theirs = VisionTransformer(**SMALL, gaug=True, num_classes=0)
    state = {
        key.replace("gaug.var", "W_var").replace("gaug.alpha", "W_alpha"): v for key, v in theirs.state_dict().items()
    }
    ours = VisionTransformer(**SMALL, gaug=True, num_classes=0)
    assert not load_weights(ours, saved(tmp_path, state)).fresh
    assert torch.equal(ours.state_dict()["blocks.1.attn.gaug.var.weight"], state["blocks.1.attn.W_var.weight"])


def dinos_positions(table: Tensor, height: int, width: int) -> Tensor:
    """As facebookresearch/dino resizes (1, n0*n0, D) for h x w patches: by torch's own bicubic, with its scale."""
    side = int(table.shape[1] ** 0.5)
    picture = table.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    scale = ((height + 0.1) / side, (width + 0.1) / side)
    return F.interpolate(picture, scale_factor=scale, mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)


@pytest.mark.parametrize("classifier", [False, True], ids=["dino", "timm"])
def test_positions_are_resampled_as_their_family_does_and_said(tmp_path: Path, classifier: bool) -> None:
    """A classifier gives timm's files away; DINO's have none."""
    model = VisionTransformer(**{**SMALL, "img_size": 48}, num_classes=0)
    theirs = timms(num_classes=7 if classifier else 0)
    table = theirs.pos_embed.detach()
    match = load_weights(model, saved(tmp_path, theirs.state_dict()))
    assert match.adapted[0].startswith("pos_embed: 4x4 resampled to 6x6 as " + ("timm" if classifier else "DINO"))
    got = model.state_dict()["pos_embed"]
    assert torch.equal(got[:, :1], table[:, :1])
    if classifier:
        picture = table[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
        expected = F.interpolate(picture, size=(6, 6), mode="bicubic", antialias=True).permute(0, 2, 3, 1).flatten(1, 2)
    else:
        expected = dinos_positions(table[:, 1:], 6, 6)
    torch.testing.assert_close(got[:, 1:], expected, rtol=1e-4, atol=1e-4)
    other = timms(img_size=48)  # timm's own models stay timm's
    assert "pos_embed" in load_weights(other, saved(tmp_path, theirs.state_dict())).adapted[0]


def test_dinos_table_can_be_kept_for_all_sizes(tmp_path: Path) -> None:
    theirs = timms()
    options = {**SMALL, "img_size": 16}
    backbone: Any = create("vit_tiny_patch8", **options, pos_size=32, weights=saved(tmp_path, theirs.state_dict()))
    assert torch.equal(backbone.model.pos_embed, theirs.pos_embed)
    for height, width in ((2, 2), (3, 5), (4, 4), (7, 4)):
        seen: list[Tensor] = []
        network = backbone.model
        hook = network.blocks[0].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        images = torch.zeros(1, 3, 8 * height, 8 * width)
        network.forward_features(images)
        hook.remove()
        patches = network.patch_embed(images)
        torch.testing.assert_close(
            seen[0][:, 1:] - patches,
            theirs.pos_embed[:, 1:]
            if (height, width) == (4, 4)
            else dinos_positions(theirs.pos_embed[:, 1:], height, width),
            rtol=1e-4,
            atol=1e-4,
        )
    again = create(**backbone.arch)
    again.load_state_dict(backbone.state_dict(), strict=True)
    for name in ("vit_tiny_patch8_lgp", "vim_tiny_patch16", "timm/resnet18"):
        with pytest.raises(UserError, match="pos"):
            create(name, img_size=32, pos_size=224)


@pytest.mark.parametrize("antialias", [False, True])
def test_positions_of_our_own_network_with_registers_follow_its_own_rule(tmp_path: Path, antialias: bool) -> None:
    """Loaded for another size: the features of the network that the weights came from."""
    made = {**SMALL, "registers": 4, "pos_antialias": antialias, "num_classes": 0}
    trained = VisionTransformer(**{**made, "img_size": 32}).eval()
    path = saved(tmp_path, trained.state_dict())
    assert not antialiased(read_state(path))
    images = torch.randn(1, 3, 48, 48)
    ours = VisionTransformer(**{**made, "img_size": 48}).eval()
    load_weights(ours, path)
    torch.testing.assert_close(ours.forward_features(images), trained.forward_features(images))


@pytest.mark.parametrize("meta", [False, True], ids=["timm", "meta"])
def test_positions_of_dinov2_with_registers_are_antialiased_at_every_size(tmp_path: Path, meta: bool) -> None:
    """Loaded for another size, or kept and resampled in the forward pass: timm's features, which antialias as Meta's
    own code does with registers."""
    theirs = timms(reg_tokens=4, no_embed_class=True)
    state = theirs.state_dict()
    if meta:
        positions = torch.cat([torch.zeros(1, 1, 48), state["pos_embed"]], 1)
        state = {k: v for k, v in state.items() if k != "reg_token"} | {"register_tokens": state["reg_token"]}
        state["pos_embed"] = positions
    path = saved(tmp_path, state)
    assert antialiased(read_state(path))
    images = torch.randn(1, 3, 48, 48)
    for made_for in ({"img_size": 48}, {"img_size": 16, "pos_size": 32, "pos_antialias": True}):
        ours = VisionTransformer(**{**SMALL, **made_for}, registers=4, num_classes=0).eval()
        load_weights(ours, path)
        torch.testing.assert_close(ours.forward_features(images), theirs.forward_features(images), rtol=1e-4, atol=1e-3)


def test_without_positions_the_order_of_the_patches_is_unknown() -> None:
    bag: Any = create("vit_tiny_patch8", **{**SMALL_OURS, "img_size": 16}, no_positions=True).eval()
    images = torch.randn(1, 3, 16, 16)
    turned = torch.cat([images[..., 8:], images[..., :8]], -1)  # columns of patches change places
    torch.testing.assert_close(bag(turned).cls, bag(images).cls, rtol=1e-5, atol=1e-5)
    other: Any = create("vit_tiny_patch8", **{**SMALL_OURS, "img_size": 16}).eval()
    assert (other(turned).cls - other(images).cls).abs().max() > 1e-4
    assert create(**bag.arch).model.pos_embed is None
    for name in ("vit_tiny_patch8_lgp", "vit_tiny_patch8_rope", "vim_tiny_patch16", "timm/resnet18"):
        with pytest.raises(UserError, match="no_positions"):
            create(name, img_size=32, no_positions=True)


def test_another_architecture_is_told(tmp_path: Path, same_bits: Callable[..., None]) -> None:
    path = saved(tmp_path, timms().state_dict())
    for options, message in [
        ({"embed_dim": 96}, r"misshapen: .*cls_token \(1, 1, 48\) instead of \(1, 1, 96\)"),
        ({"depth": 3}, r"missing: blocks\.2\.attn\.proj\.bias.* and \d+ more"),
        ({"depth": 1}, r"unexpected: blocks\.1\.attn\.proj\.bias"),
        ({"registers": 2}, "missing: reg_token"),
    ]:
        with pytest.raises(UserError, match=message):
            load_weights(VisionTransformer(**{**SMALL, **options}, num_classes=0), path)
    with pytest.raises(UserError, match=r"another architecture than this ResNet.*missing: .*bn1"):
        create("timm/resnet18", img_size=32, weights=path)
    before = VisionTransformer(**{**SMALL, "depth": 3}, num_classes=0)
    untouched = {key: value.clone() for key, value in before.state_dict().items()}
    with pytest.raises(UserError):
        load_weights(before, path)
    same_bits(untouched, before.state_dict())


class Sly:
    def __reduce__(self) -> Any:
        return (print, ("run",))


def test_bad_files_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = VisionTransformer(**SMALL, num_classes=0)
    with pytest.raises(UserError, match="could run code"):
        load_weights(model, saved(tmp_path, {"teacher": Sly()}))
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match=r"There is no file of weights .*nowhere"):
        load_weights(model, tmp_path / "nowhere.pth")
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "cut.safetensors").write_bytes(b"0123456789")
    for name in ("cut.pth", "cut.safetensors"):
        with pytest.raises(UserError, match=r"cannot be read|could run code"):
            load_weights(model, tmp_path / name)
    (tmp_path / "README.md").write_text("# Not weights\n")
    with pytest.raises(UserError, match=r"cannot be read: [^.:/]*\. It is damaged"):  # without torch's own advice
        load_weights(model, tmp_path / "README.md")
    with pytest.raises(UserError, match="no named tensors"):
        load_weights(model, saved(tmp_path, {"epoch": 3}))


@pytest.mark.parametrize("location", ["run", "run with an export", "checkpoint"])
def test_a_runs_folder_or_a_checkpoint_gives_its_teacher(
    tmp_path: Path, location: str, same_bits: Callable[..., None]
) -> None:
    """backbone.weights=RUNFOLDER: the export if there is one, else the newest checkpoint's teacher."""
    old, new, student = (create("vit_tiny_patch8", **SMALL_OURS) for _ in range(3))
    for step, teacher in ((9, old), (10, new)):
        tensors = prefixed("learner/teacher.backbone.", dict(teacher.state_dict()))
        tensors |= prefixed("learner/student.backbone.", dict(student.state_dict()))
        checkpoint.save(tmp_path / "checkpoints", step, {**tensors, "learner/teacher.head.x": torch.ones(2)}, {})
    path = tmp_path
    if location == "run with an export":
        checkpoint.export(tmp_path / "teacher.safetensors", new, {})
    elif location == "checkpoint":
        path = tmp_path / "checkpoints" / "step-000000010"
    model = create("vit_tiny_patch8", **SMALL_OURS, weights=path)
    same_bits(model.state_dict(), new.state_dict())
    with pytest.raises(UserError, match="belong to another architecture"):
        create("vit_tiny_patch8", **{**SMALL_OURS, "depth": 3}, weights=path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There are no weights in"):
        create("vit_tiny_patch8", **SMALL_OURS, weights=tmp_path)


def header(text: bytes, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + data


HOSTILE: dict[str, bytes] = {
    "empty.pth": b"",
    "empty.safetensors": b"",
    "text.pth": b"hello, I am no file of weights",
    "text.safetensors": b"hello, I am no file of weights",
    "cut.zip.pth": b"PK\x03\x04" + bytes(40),
    "endless.safetensors": (2**62).to_bytes(8, "little") + b"{}",
    "latin.safetensors": header(b'{"\xff\xfe": {}}'),
    "deep.safetensors": header(b"[" * 90_000),
    "nested.safetensors": header(b'{"a":' * 20_000 + b"1" + b"}" * 20_000),
    "overlap.safetensors": header(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
    ),
    "huge.safetensors": header(b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,4]}}', bytes(4)),
    "kind.safetensors": header(b'{"a":{"dtype":"Q9","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "negative.safetensors": header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[4,0]}}', bytes(4)),
    "pickle.pth": b"\x80\x02cos\nsystem\nq\x00X\x04\x00\x00\x00exitq\x01\x85q\x02Rq\x03.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_files_of_anything_else_are_a_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(HOSTILE[name])
    with pytest.raises(UserError, match=r"cannot be read|could run code") as caught:
        create("vit_tiny_patch8", **SMALL, weights=str(tmp_path / name))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 800 + len(str(tmp_path))


def test_tensors_of_another_kind_and_nests_without_end_are_a_sentence(tmp_path: Path) -> None:
    state = timms().state_dict()
    itself: dict[str, Any] = {}
    itself["model"] = itself
    for content, message in (
        ({**state, "pos_embed": state["pos_embed"].long()}, "another type: pos_embed torch.int64"),
        ({**state, "pos_embed": torch.zeros(())}, "another architecture"),
        ({**state, "pos_embed": torch.zeros(1).expand(10**9, 10**6, 48)}, "misshapen: pos_embed"),
        ({**state, "norm.bias": state["norm.bias"].to_sparse()}, "not a dense tensor"),
        ({**state, "norm.bias": torch.zeros(48, device="meta")}, "not a dense tensor"),
        ({**state, "\x1b[31m": torch.zeros(1)}, r"unexpected: \?\[31m"),
        (itself, "no named tensors"),
        ([1, 2], "no named tensors"),
        ({0: torch.zeros(1)}, "no named tensors"),
    ):
        with pytest.raises(UserError, match=message):
            load_weights(VisionTransformer(**SMALL, num_classes=0), saved(tmp_path, content))
    with pytest.raises(UserError, match="There are no weights in"):
        load_weights(VisionTransformer(**SMALL, num_classes=0), tmp_path)
