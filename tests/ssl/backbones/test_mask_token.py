"""Hidden patches: nothing of them is seen, everything else is as it was; layer scale; both in files of weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nearfar.ssl import checkpoint
from nearfar.ssl.backbones import Backbone, create, load_weights
from nearfar.ssl.errors import UserError

OURS: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2}
NETWORKS: dict[str, dict[str, Any]] = {
    "vit": {"name": "vit_tiny_patch8", "num_heads": 2, **OURS},
    "vit_lgp_locat": {"name": "vit_tiny_patch8", "num_heads": 2, "lgp": True, "gaug": True, "prr": True, **OURS},
    "vit_rope": {"name": "vit_tiny_patch8", "num_heads": 2, "rope": True, "registers": 2, **OURS},
    "vim": {"name": "vim_tiny_patch8", **OURS},
    "vim_lgp": {"name": "vim_tiny_patch8", "lgp": True, **OURS},
    "timm_vit": {"name": "timm/test_vit", "img_size": 64, "patch_size": 16},
    "timm_vit_ideas": {"name": "timm/test_vit", "img_size": 64, "lgp": True, "gaug": True, "prr": True},
    "timm_eva": {"name": "timm/eva02_tiny_patch14_224", "img_size": 56, "depth": 2},
}
WITHOUT_LGP = [name for name, settings in NETWORKS.items() if not settings.get("lgp")]


def make(name: str, **more: Any) -> Backbone:
    torch.manual_seed(0)
    network = create(**NETWORKS[name], mask_token=True, **more).eval()
    for key, parameter in network.named_parameters():
        if key.endswith("mask_token"):
            nn.init.normal_(parameter, std=0.5)  # it starts at 0
    return network


def example(network: Backbone) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    side = network.arch["img_size"]
    images = torch.randn(2, 3, side, side, generator=generator)
    patches = network(images).patches.shape[1]
    masks = torch.zeros(2, patches, dtype=torch.bool)
    masks[0, 1] = masks[0, patches // 2] = masks[1, 0] = True
    return images, masks


@pytest.mark.parametrize("name", WITHOUT_LGP)
def test_hidden_pixels_have_no_influence_and_the_others_have(name: str) -> None:
    """In every patch: what comes out does not change with its pixels if and only if it is hidden."""
    network = make(name)
    images, masks = example(network)
    size, tokens = network.patch_size, network(images, masks)
    columns = tokens.grid[1]
    for patch in range(masks.shape[1]):
        changed = images.clone()
        top, left = patch // columns * size, patch % columns * size
        changed[:, :, top : top + size, left : left + size] += 1
        after = network(changed, masks).patches
        for image in range(2):
            assert torch.equal(after[image], tokens.patches[image]) == bool(masks[image, patch])


@pytest.mark.parametrize("name", NETWORKS)
def test_the_token_learns_and_an_empty_mask_changes_nothing(name: str) -> None:
    network = make(name)
    images, masks = example(network)
    plain, empty = network(images), network(images, torch.zeros_like(masks))
    assert torch.equal(plain.patches, empty.patches) and torch.equal(plain.prefix, empty.prefix)
    masked = network(images, masks)
    assert not torch.equal(masked.patches, plain.patches)
    masked.patches.square().sum().backward()
    (token,) = [p for key, p in network.named_parameters() if key.endswith("mask_token")]
    assert token.grad is not None and token.grad.abs().sum() > 0
    token.grad = None
    network(images, torch.zeros_like(masks)).patches.sum().backward()
    assert token.grad is not None and not token.grad.any()  # there, and 0: all ranks send the same gradients


@pytest.mark.parametrize("name", ["vit_lgp_locat", "vim_lgp"])
def test_fused_lgp_tokens_are_replaced_after_the_embedding(name: str) -> None:
    network = make(name)
    images, masks = example(network)
    model: Any = network.model
    plain, (sequence, _) = model.patch_embed(images), model.embed(images, masks)
    middle = plain.shape[1] // 2  # Vision Mamba's CLS stands there
    cut = torch.cat([sequence[:, :middle], sequence[:, middle + 1 :]], 1) if name.startswith("vim") else sequence[:, 1:]
    expected = torch.where(masks[..., None], model.mask_token, plain)
    torch.testing.assert_close(cut, expected, rtol=0, atol=0)


def test_a_network_with_stages_hides_all_that_makes_up_a_patch() -> None:
    swin = create("timm/swin_tiny_patch4_window7_224", img_size=64, mask_token=True).eval()
    seen: list[Tensor] = []
    swin.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    masks = torch.tensor([[False, True, False, False]])
    with torch.no_grad():
        swin.mask_token.fill_(7)
        swin(torch.randn(1, 3, 64, 64), masks)
    hidden = (seen[0] == 7).all(-1)[0]
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[:8, 8:] = True
    assert torch.equal(hidden, expected)


def test_copies_hide_with_their_own_token() -> None:
    network = make("timm_vit")
    images, masks = example(network)
    other = copy.deepcopy(network)
    torch.nn.init.constant_(other.mask_token, 3.0)
    first = network(images, masks).patches
    assert not torch.equal(other(images, masks).patches, first)
    assert torch.equal(network(images, masks).patches, first)


@pytest.mark.parametrize("name", ["timm/test_resnet", "timm/test_convnext"])
def test_networks_without_a_patch_embedding_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"no patch embedding whose tokens could be hidden.*loss\.ibot_weight"):
        create(name, mask_token=True)


def test_masks_without_a_token_are_a_mistake_of_the_caller() -> None:
    for name in ("vit", "timm_vit"):
        network = create(**NETWORKS[name])
        images, masks = example(network)
        with pytest.raises(ValueError, match="mask_token=True"):
            network(images, masks)


@pytest.mark.parametrize("name", ["vit", "vim_lgp", "timm_vit"])
def test_exported_with_and_without_a_token(name: str, tmp_path: Path) -> None:
    """A file says which it is; as starting weights either fits both kinds."""
    images, _ = example(make(name))
    for token in (True, False):
        network = create(**NETWORKS[name], mask_token=token, layer_scale=0.3).eval()
        file = tmp_path / f"{token}.safetensors"
        checkpoint.export(file, network, {})
        assert any(key.endswith("mask_token") for key in load_file(file)) is token
        again = checkpoint.load(file)
        assert again.arch == network.arch and network.arch.get("mask_token", False) is token
        assert network.arch["layer_scale"] == 0.3
        assert torch.equal(again(images).patches, network(images).patches)
        for other in (True, False):
            started = create(**NETWORKS[name], mask_token=other, layer_scale=0.3).eval()
            load_weights(started, file)
            assert torch.equal(started(images).patches, network(images).patches)


@pytest.mark.parametrize("name", ["vit", "vim", "timm_vit"])
def test_layer_scale_multiplies_every_branch(name: str) -> None:
    """At 0 the blocks add nothing; at 1 they are those of a network without."""
    scaled, plain = create(**NETWORKS[name], layer_scale=0.5).eval(), create(**NETWORKS[name]).eval()
    gammas = {key: p for key, p in scaled.named_parameters() if key.endswith("gamma")}
    assert len(gammas) == {"vit": 4, "vim": 2, "timm_vit": 12}[name] and all((p == 0.5).all() for p in gammas.values())
    rest = {key: tensor for key, tensor in scaled.state_dict().items() if key not in gammas}
    assert rest.keys() == plain.state_dict().keys()
    plain.load_state_dict(rest)
    images, _ = example(plain)
    first = plain(images).patches
    for value in (1.0, 0.0):
        for gamma in gammas.values():
            nn.init.constant_(gamma, value)
        assert torch.allclose(scaled(images).patches, first, atol=1e-5) is bool(value)
    blocks = scaled.blocks(images, 2)
    assert torch.equal(blocks[0].patches, blocks[1].patches)


def test_layer_scale_that_a_network_cannot_take_is_refused_by_its_own_name() -> None:
    with pytest.raises(UserError, match=r"timm/test_resnet cannot take layer_scale; leave it out"):
        create("timm/test_resnet", layer_scale=1e-5)
