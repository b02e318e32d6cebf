"""Every backbone by name, behind one contract: our own models and any timm model."""

import difflib
import inspect
import logging
import re
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from nearfar.ssl.backbones.prr import prr as refine
from nearfar.ssl.backbones.published import reaching_for_weights
from nearfar.ssl.backbones.scan import Scan
from nearfar.ssl.backbones.timm_grafts import add_gaug, add_lgp, attention_weights, count_heads
from nearfar.ssl.backbones.tokens import Backbone, Tokens, check_size, pad_to_multiple
from nearfar.ssl.backbones.vim import VisionMamba
from nearfar.ssl.backbones.vit import WIDTHS, VisionTransformer
from nearfar.ssl.backbones.weights import load_weights
from nearfar.ssl.errors import UserError

OURS = (VisionTransformer, VisionMamba)
VIM_NAME = re.compile(r"vim_(tiny|small|base)_patch(\d+)(_uni)?(_lgp)?")
OUR_NAME = re.compile(r"vit_(tiny|small|base)_patch(\d+)(_lgp)?(_locat)?(?:_reg(\d+))?(_rope)?")

log = logging.getLogger(__name__)


class Adapter(Backbone):
    """A network with timm's interface as a `Backbone`; the network is `model`, without its classifier.

    Feature maps, NCHW or NHWC, become patch tokens without prefix. A final norm that timm keeps in the head is applied
    to all tokens. `num_heads` is that of the last attention in the network, and for a convolutional network
    embed_dim // 64 (at least 1). `patch_size` is the total stride. Networks with windows of a fixed number (MaxViT,
    GCViT, MLP-Mixer) run at the one size they are made for, and smaller images are padded to it, which the log says.
    """

    def __init__(self, model: nn.Module, arch: dict[str, Any], *, prr: bool = False) -> None:
        super().__init__()
        self.model = model
        self.arch = arch
        features: Any = model.num_features
        self.embed_dim = int(features)
        stages: Any = model.feature_info
        self.stages = len(stages)
        self.isotropic = len({(stage["num_chs"], stage["reduction"]) for stage in stages}) == 1
        self.patch_size = int(stages[-1]["reduction"])
        self.num_heads = count_heads(model, self.embed_dim)
        self.refines = prr and not isinstance(model, OURS)  # ours do it themselves
        self.num_prefix = int(getattr(model, "num_prefix_tokens", 0))
        self.final_norm = _take_head_norm(model)
        self._sizes: dict[tuple[int, int], tuple[int, int]] = {}  # of images -> that the network runs at

    def forward(self, images: Tensor) -> Tokens:
        tokens = self._final_tokens(images)
        if not self.refines:
            return tokens
        x = refine(torch.cat([tokens.prefix, tokens.patches], 1), self.num_heads)
        return Tokens(x[:, : self.num_prefix], x[:, self.num_prefix :], tokens.grid)

    def blocks(self, images: Tensor, n: int, norm: bool = False) -> list[Tokens]:
        if not 1 <= n <= self.stages:
            raise UserError(
                f"{self.arch['name']} has {self.stages} {'blocks' if self.isotropic else 'stages'}, so its last {n} "
                f"cannot be read; choose between 1 and {self.stages}."
            )
        if norm and not self.isotropic:
            if n > 1:
                raise UserError(
                    f"The final norm of {self.arch['name']} fits its last stage only; read one stage, or without norm."
                )
            return [self._final_tokens(images)]
        images = self._fit(images)
        read: Any = self.model.forward_intermediates
        asked: dict[str, Any] = {"indices": n, "intermediates_only": True}
        if self.num_prefix and "return_prefix_tokens" in inspect.signature(read).parameters:
            asked["return_prefix_tokens"] = True
        out = []
        for found in read(images, **asked):
            spatial, prefix = found if isinstance(found, tuple | list) else (found, None)
            patches = spatial.flatten(2).transpose(1, 2)
            if prefix is None:
                prefix = patches[:, :0]
            if norm:
                prefix, patches = self._norm(prefix), self._norm(patches)
            out.append(Tokens(prefix, patches, (spatial.shape[2], spatial.shape[3])))
        return out

    def attention(self, images: Tensor) -> Tensor:
        images = self._fit(images)
        if isinstance(self.model, VisionTransformer):
            return self.model.last_attention(images)
        network: Any = self.model
        last: Any = getattr(network.blocks[-1], "attn", None) if hasattr(network, "blocks") else None
        if not isinstance(last, Attention | AttentionRope | EvaAttention):  # others change the logits in their own ways
            raise UserError(
                f"{self.arch['name']} has no plain global attention in its last block, so there is no attention map to "
                "show; token PCA works for every model."
            )
        seen: list[tuple[Tensor, Tensor | None]] = []
        hook = last.register_forward_pre_hook(
            lambda _, args, options: seen.append((args[0], options.get("rope"))), with_kwargs=True
        )
        try:
            network.forward_features(images)
        finally:
            hook.remove()
        return attention_weights(last, *seen[0])

    def _final_tokens(self, images: Tensor) -> Tokens:
        """After the final norm, before PRR (but our own models have their PRR inside)."""
        images = self._fit(images)
        return self._tokens(self.final_norm(self.model.forward_features(images)), tuple(images.shape[-2:]))  # type: ignore[operator]

    def _fit(self, images: Tensor) -> Tensor:
        """Images of a size that the network runs at: padded to its stride, or to the size it is made for."""
        if self.isotropic:
            check_size(images, self.patch_size)
        images = pad_to_multiple(images, self.patch_size)
        if isinstance(self.model, OURS):
            return images
        size = (images.shape[-2], images.shape[-1])
        if size not in self._sizes:
            self._sizes[size] = self._running_size(images)
        height, width = self._sizes[size]
        return F.pad(images, (0, width - size[1], 0, height - size[0])) if (height, width) != size else images

    @torch.no_grad()
    def _running_size(self, images: Tensor) -> tuple[int, int]:
        size = (images.shape[-2], images.shape[-1])
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()  # the trial must leave no trace in batch norms or random numbers
        try:
            self.model.forward_features(images[:1])  # type: ignore[operator]
            return size
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, RuntimeError, ValueError) as error:
            made = -(-self.arch["img_size"] // self.patch_size) * self.patch_size
            if max(size) <= made and size != (made, made):
                log.warning(
                    "%s runs at %dx%d only: images of %dx%d (height x width) are padded to it, and cost as much",
                    self.arch["name"], made, made, *size,
                )  # fmt: skip
                return made, made
            raise UserError(
                f"{self.arch['name']} does not run on images of {size[0]}x{size[1]} pixels (height x width): {error}. "
                "Set its img_size to the size of the largest views, or choose a network that takes any size."
            ) from error
        finally:
            for module, training in modes:
                module.training = training

    def _tokens(self, features: Any, size: tuple[int, ...]) -> Tokens:
        name = self.arch["name"]
        if not isinstance(features, Tensor) or features.ndim not in (3, 4):
            raise UserError(f"{name} does not give one feature map or one token sequence, so it cannot be a backbone.")
        if features.ndim == 4:
            if getattr(self.model, "output_fmt", "NCHW") == "NCHW" and features.shape[1] == self.embed_dim:
                features = features.permute(0, 2, 3, 1)
            grid = (features.shape[1], features.shape[2])
            features = features.flatten(1, 2)
        else:
            grid = (size[0] // self.patch_size, size[1] // self.patch_size)
        prefix = features[:, : self.num_prefix]
        patches = features[:, self.num_prefix :]
        if features.shape[-1] != self.embed_dim or patches.shape[1] != grid[0] * grid[1]:
            raise UserError(
                f"{name} gives features of shape {tuple(features.shape)}, which is no {grid[0]}x{grid[1]} grid of "
                f"{self.embed_dim} numbers, so it cannot be a backbone here."
            )
        return Tokens(prefix, patches, grid)

    def _norm(self, x: Tensor) -> Tensor:
        inner: Any = getattr(self.model, "norm", None)
        y: Tensor = self.final_norm(x if inner is None else inner(x))
        return y


def _take_head_norm(model: nn.Module) -> nn.Module:
    """The final norm where timm keeps it after pooling; all other parts of the head are dropped with it."""
    norm: Any = None
    if isinstance(fc_norm := getattr(model, "fc_norm", None), nn.Module):
        norm, model.fc_norm = fc_norm, nn.Identity()
    if isinstance(head := getattr(model, "head", None), nn.Module):
        if norm is None or isinstance(norm, nn.Identity):
            norm = getattr(head, "norm", None)
        model.head = nn.Identity()
    if isinstance(getattr(model, "attn_pool", None), nn.Module):
        model.attn_pool = None  # type: ignore[assignment]
    return norm if isinstance(norm, nn.Module) else nn.Identity()


def create(
    name: str,
    *,
    img_size: int = 224,
    lgp: bool = False,
    levels: int | Literal["auto"] = "auto",
    wavelet: str = "haar",
    gaug: bool = False,
    prr: bool = False,
    registers: int = 0,
    rope: bool = False,
    drop_path: float = 0.0,
    patch_size: int | None = None,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    pretrained: bool = False,
    weights: str | Path | None = None,
    scan: Scan = "auto",
) -> Backbone:
    """A backbone by name: `vit_{tiny,small,base}_patch{P}[_lgp][_locat][_reg4][_rope]`, `vim_{tiny,small,base}_patch{P}
    [_uni][_lgp]`, or `timm/NAME` for timm's.

    `img_size` is the size in pixels the network is made for; other sizes run too. `_locat` is GAug and PRR; `levels`
    and `wavelet` are LGP's. The other settings overrule what the name says. `embed_dim` without `num_heads` keeps heads
    64 wide where that divides it, and the size's number of heads otherwise; Vision Mamba has heads in PRR only.
    `pretrained` takes timm's published weights, `weights` a file (see `load_weights`). `scan` chooses how Vision
    Mamba's recurrence is computed (see `choose_scan`); `arch` leaves it out, for the weights are the same. Raises
    UserError for an unknown name, and for a setting that the model cannot take.
    """
    if not lgp and "_lgp" not in name and (levels, wavelet) != ("auto", "haar"):
        raise UserError(f"levels={levels} and wavelet={wavelet} are LGP's; turn on lgp, or leave them out.")
    sizes = {"patch_size": patch_size, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    if scan != "auto" and not name.startswith("vim_"):
        raise UserError(f"scan={scan} is a setting of Vision Mamba (vim_...), and {name} has no scan; leave it out.")
    grafts = {"lgp": lgp, "levels": levels, "wavelet": wavelet, "gaug": gaug, "prr": prr}
    if name.startswith("timm/"):
        for switch, value in {"registers": registers, "rope": rope}.items():
            if value:
                raise UserError(
                    f"{switch} is not supported for {name}: timm models can take lgp, gaug and prr; for {switch} "
                    "choose one of ours (vit_small_patch16, ...) or a timm model that has it."
                )
        backbone = _create_timms(name, img_size, grafts, drop_path, sizes, pretrained)
    elif match := VIM_NAME.fullmatch(name):
        for switch, value in {"gaug": gaug, "registers": registers, "rope": rope, "pretrained": pretrained}.items():
            if value:
                raise UserError(f"{name} cannot take {switch}: {VIM_LACKS[switch]}")
        backbone = _create_vim(match, img_size, grafts, drop_path, sizes, scan)
    else:
        if pretrained:
            raise UserError(f"{name} has no published weights; leave out pretrained, or take a timm model (timm/NAME).")
        backbone = _create_ours(name, img_size, {**grafts, "registers": registers, "rope": rope}, drop_path, sizes)
    if weights is not None:
        log.info("%s", load_weights(backbone, weights))
    return backbone


def _create_ours(
    name: str, img_size: int, switches: dict[str, Any], drop_path: float, sizes: dict[str, int | None]
) -> Backbone:
    match = OUR_NAME.fullmatch(name)
    if match is None:
        raise UserError(f"There is no backbone called {name!r}. {_did_you_mean(name)}")
    size, patch, has_lgp, has_locat, has_registers, has_rope = match.groups()
    width, heads = WIDTHS[size]
    width = sizes["embed_dim"] or width
    patch_size = sizes["patch_size"] or int(patch)
    settings: dict[str, Any] = {
        "img_size": img_size,
        **switches,
        "lgp": switches["lgp"] or bool(has_lgp),
        "gaug": switches["gaug"] or bool(has_locat),
        "prr": switches["prr"] or bool(has_locat),
        "registers": switches["registers"] or int(has_registers or 0),
        "rope": switches["rope"] or bool(has_rope),
        "embed_dim": width,
        "depth": sizes["depth"] or 12,
        "num_heads": sizes["num_heads"] or (width // 64 if width % 64 == 0 else heads),
    }
    model = VisionTransformer(patch_size=patch_size, drop_path_rate=drop_path, num_classes=0, **settings)
    return Adapter(model, {"name": f"vit_{size}_patch{patch_size}", **settings, "drop_path": drop_path})


VIM_LACKS = {
    "gaug": "it has no attention to which a Gaussian could be added. Leave it out, or take a vit_ model.",
    "registers": "its one prefix token is the CLS token in the middle of the sequence. Leave it out.",
    "rope": "it reads its patches in order and needs no positions in an attention it has not. Leave it out.",
    "pretrained": "it has no published weights here; leave it out, or take a timm model (timm/NAME).",
}


def _create_vim(
    match: re.Match[str],
    img_size: int,
    grafts: dict[str, Any],
    drop_path: float,
    sizes: dict[str, int | None],
    scan: Scan,
) -> Backbone:
    size, patch, uni, has_lgp = match.groups()
    patch_size = sizes["patch_size"] or int(patch)
    arch: dict[str, Any] = {
        "img_size": img_size,
        "lgp": grafts["lgp"] or bool(has_lgp),
        "levels": grafts["levels"],
        "wavelet": grafts["wavelet"],
        "prr": grafts["prr"],
        "embed_dim": sizes["embed_dim"] or WIDTHS[size][0],
        "depth": sizes["depth"] or 24,
    }
    how: dict[str, Any] = {"bidirectional": not uni, "scan": scan, "drop_path_rate": drop_path, "num_classes": 0}
    model = VisionMamba(patch_size=patch_size, num_heads=sizes["num_heads"], **arch, **how)
    name = f"vim_{size}_patch{patch_size}{uni or ''}"
    return Adapter(model, {"name": name, **arch, "drop_path": drop_path, "num_heads": model.num_heads})


def _create_timms(
    name: str,
    img_size: int,
    grafts: dict[str, Any],
    drop_path: float,
    sizes: dict[str, int | None],
    pretrained: bool,
) -> Backbone:
    plain = name.removeprefix("timm/")
    if not timm.is_model(plain):
        raise UserError(f"timm {timm.__version__} has no model called {plain!r}. {_did_you_mean(name)}")
    asked: dict[str, Any] = {key: value for key, value in sizes.items() if value is not None}
    # What lets a network run at any size, and has no meaning where it does so anyway.
    wished: dict[str, Any] = {"img_size": img_size, "dynamic_img_size": True, "strict_img_size": False}
    (asked if drop_path else wished)["drop_path_rate"] = drop_path
    model = None
    while model is None:
        try:
            with reaching_for_weights(pretrained):
                model = timm.create_model(plain, pretrained=pretrained, num_classes=0, **asked, **wished)
        except TypeError as error:
            refused = re.findall(r"'(\w+)'", str(error).partition("unexpected keyword argument")[2])
            if not refused or not set(refused) <= set(asked | wished):
                raise
            for key in refused:
                if wished.pop(key, None) is None:
                    raise UserError(f"{name} cannot take {key.removesuffix('_rate')}; leave it out.") from None
        except (OSError, RuntimeError, ValueError, AssertionError) as error:
            reason = " ".join(str(error).split())[:200]
            if pretrained:
                raise UserError(
                    f"The published weights of {name} cannot be had: they are not in the cache here, and could not be "
                    f"downloaded ({reason}). Give a file of them with backbone.weights=FILE in place of "
                    "backbone.pretrained=true, or leave both out."
                ) from error
            raise UserError(f"{name} cannot be made: these settings do not fit it ({reason}).") from error
    if not (hasattr(model, "forward_features") and getattr(model, "feature_info", None)):
        raise UserError(f"{name} does not say what its features are, so it cannot be a backbone here.")
    if grafts["lgp"]:
        add_lgp(model, grafts["levels"], grafts["wavelet"], drop_path)
    if grafts["gaug"]:
        add_gaug(model)
    arch = {"name": name, "img_size": img_size, **grafts, "drop_path": drop_path, **asked}
    arch.pop("drop_path_rate", None)
    backbone = Adapter(model, arch, prr=grafts["prr"])
    with torch.no_grad():  # better now than in the first step: does it give tokens at all?
        backbone.eval()(torch.zeros(1, 3, img_size, img_size))
    return backbone.train()


def _did_you_mean(name: str) -> str:
    ours = [
        f"vit_{size}_patch{patch}{lgp}{locat}{registers}{rope}"
        for size in WIDTHS
        for patch in (8, 16)
        for lgp in ("", "_lgp")
        for locat in ("", "_locat")
        for registers in ("", "_reg4")
        for rope in ("", "_rope")
    ] + [f"vim_{size}_patch16{uni}{lgp}" for size in WIDTHS for uni in ("", "_uni") for lgp in ("", "_lgp")]
    timms = [f"timm/{model}" for model in timm.list_models()]
    if f"timm/{name}" in timms:
        near = [f"timm/{name}"]
    else:
        near = difflib.get_close_matches(name, timms if name.startswith("timm/") else [*ours, *timms], n=3)
    if near:
        return f"Did you mean {' or '.join(near)}?"
    return (
        "Ours are vit_{tiny,small,base}_patch16 + _lgp + _locat + _reg4 + _rope and vim_{tiny,small,base}_patch16 + "
        "_uni + _lgp, in this order; timm's are timm/NAME, for instance timm/resnet18."
    )
