"""Every backbone by name, behind one contract: our own models and any timm model."""

import difflib
import logging
import re
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import nn

from nearfar.ssl.backbones import normalization
from nearfar.ssl.backbones.adapter import Adapter
from nearfar.ssl.backbones.published import cache_only_when_offline
from nearfar.ssl.backbones.scan import Scan
from nearfar.ssl.backbones.timm_grafts import add_gaug, add_lgp
from nearfar.ssl.backbones.tokens import Backbone
from nearfar.ssl.backbones.vim import VisionMamba
from nearfar.ssl.backbones.vit import WIDTHS, VisionTransformer
from nearfar.ssl.backbones.weights import load_weights, weights_in
from nearfar.ssl.errors import UserError

VIM_NAME = re.compile(r"vim_(tiny|small|base)_patch(\d+)(_uni)?(_lgp)?")
OUR_NAME = re.compile(r"vit_(tiny|small|base)_patch(\d+)(_lgp)?(_locat)?(?:_reg(\d+))?(_rope)?")

log = logging.getLogger(__name__)


def create(  # noqa: PLR0913 - a network's settings, each by name
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
    pos_size: int | None = None,
    pos_antialias: bool = False,
    no_positions: bool = False,
    pretrained: bool = False,
    weights: str | Path | None = None,
    scan: Scan = "auto",
    mask_token: bool = False,
    layer_scale: float | None = None,
) -> Backbone:
    """A backbone by name: `vit_{tiny,small,base}_patch{P}[_lgp][_locat][_reg4][_rope]`, `vim_{tiny,small,base}_patch{P}
    [_uni][_lgp]`, or `timm/NAME` for timm's. The other settings overrule what the name says.

    `img_size` is the size in pixels the network is made for; other sizes run too. `_locat` is GAug and PRR; `levels`
    and `wavelet` are LGP's. `embed_dim` without `num_heads` keeps heads 64 wide where that divides it, and the size's
    number of heads otherwise; Vision Mamba has heads in PRR only.
    `pos_size` is the size the learned positions of our ViT are made for, where that is not `img_size`: 224 keeps DINO's
    public table, resampled for every size of image as their own code does it, or with `pos_antialias` as timm and
    DINOv2 with registers do it. `no_positions` leaves learned positions out of our ViT.
    `pretrained` takes timm's published weights, `weights` a file (see `load_weights`). `scan` chooses how Vision
    Mamba's recurrence is computed (see `choose_scan`); `arch` leaves it out, for the weights are the same.
    `mask_token` makes a learned token that stands in for hidden patches (`Backbone.forward`), `layer_scale` multiplies
    residual branches by learned vectors that start at it. Raises UserError for an unknown name or impossible setting.
    """
    if not lgp and "_lgp" not in name and (levels, wavelet) != ("auto", "haar"):
        raise UserError(f"levels={levels} and wavelet={wavelet} are settings of LGP; turn on lgp, or leave them out.")
    if scan != "auto" and not name.startswith("vim_"):
        raise UserError(f"scan={scan} is a setting of Vision Mamba (vim_...), and {name} has no scan; leave it out.")
    sizes = {"patch_size": patch_size, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    grafts = {"lgp": lgp, "levels": levels, "wavelet": wavelet, "gaug": gaug, "prr": prr}
    positions = {"rope": rope, "pos_size": pos_size, "pos_antialias": pos_antialias, "no_positions": no_positions}
    others = {"registers": registers, **positions}
    extras: dict[str, Any] = {"mask_token": mask_token} if mask_token else {}
    extras |= {"layer_scale": layer_scale} if layer_scale else {}
    if name.startswith("timm/"):
        _refuse_for_timm(name, others)
        backbone = _create_timm(name, img_size, grafts, drop_path, sizes | extras, pretrained)
    elif match := VIM_NAME.fullmatch(name):
        _refuse_for_vim(name, {"gaug": gaug, **others, "pretrained": pretrained})
        backbone = _create_vim(match, img_size, grafts, drop_path, sizes | extras, scan)
    elif pretrained:
        raise UserError(f"{name} has no published weights; leave out pretrained, or take a timm model (timm/NAME).")
    else:
        backbone = _create_ours(name, img_size, {**grafts, **others, **extras}, drop_path, sizes)
    return backbone if weights is None else _with_weights(backbone, weights)


def _with_weights(backbone: Backbone, weights: str | Path) -> Backbone:
    log.info("%s", load_weights(backbone, weights))
    if seen := normalization.beside(weights_in(Path(weights))):
        network: Any = backbone.model
        normalization.see_as_published(network, str(weights), *seen)
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
    for key in ("pos_size", "pos_antialias", "no_positions"):  # described only where they are set
        if not settings[key]:
            del settings[key]
    model = VisionTransformer(patch_size=patch_size, drop_path_rate=drop_path, num_classes=0, **settings)
    return Adapter(model, {"name": f"vit_{size}_patch{patch_size}", **settings, "drop_path": drop_path})


VIM_LACKS = {
    "gaug": "it has no attention to which a Gaussian could be added. Leave it out, or take a vit_ model.",
    "registers": "its one prefix token is the CLS token in the middle of the sequence. Leave it out.",
    "rope": "it has no attention in which positions could be rotated. Leave it out.",
    "pos_size": "its positions are made for img_size. Leave it out.",
    "pos_antialias": "its positions reach other sizes as DINO's do. Leave it out.",
    "no_positions": "its scan goes by the order of the patches anyway. Leave it out.",
    "pretrained": "it has no published weights here; leave it out, or take a timm model (timm/NAME).",
}


def _refuse_for_vim(name: str, switches: dict[str, Any]) -> None:
    for switch, value in switches.items():
        if value:
            raise UserError(f"{name} cannot take {switch}: {VIM_LACKS[switch]}")


def _create_vim(
    match: re.Match[str],
    img_size: int,
    grafts: dict[str, Any],
    drop_path: float,
    sizes: dict[str, Any],
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
        **{key: sizes[key] for key in ("mask_token", "layer_scale") if key in sizes},
    }
    how: dict[str, Any] = {"bidirectional": not uni, "scan": scan, "drop_path_rate": drop_path, "num_classes": 0}
    model = VisionMamba(patch_size=patch_size, num_heads=sizes["num_heads"], **arch, **how)
    name = f"vim_{size}_patch{patch_size}{uni or ''}"
    return Adapter(model, {"name": name, **arch, "drop_path": drop_path, "num_heads": model.num_heads})


TIMM_NAMES = {"layer_scale": "init_values"}  # settings of ours that timm calls otherwise


def _refuse_for_timm(name: str, switches: dict[str, Any]) -> None:
    for switch, value in switches.items():
        if value:
            raise UserError(
                f"{switch} is not supported for {name}: timm models can take lgp, gaug and prr; for {switch} "
                "choose one of ours (vit_small_patch16, ...) or a timm model that has it."
            )


def _create_timm(
    name: str,
    img_size: int,
    grafts: dict[str, Any],
    drop_path: float,
    sizes: dict[str, Any],
    pretrained: bool,
) -> Backbone:
    settings = {key: value for key, value in sizes.items() if value is not None}
    required: dict[str, Any] = {TIMM_NAMES.get(key, key): v for key, v in settings.items() if key != "mask_token"}
    # What lets a network run at any size; one that does so anyway does not have these.
    optional: dict[str, Any] = {"img_size": img_size, "dynamic_img_size": True, "strict_img_size": False}
    (required if drop_path else optional)["drop_path_rate"] = drop_path
    model = _timm_model(name, required, optional, pretrained)
    if pretrained:
        normalization.see_as_published(model, name, *normalization.of_published(model))
    if grafts["lgp"]:
        add_lgp(model, grafts["levels"], grafts["wavelet"], drop_path)
    if grafts["gaug"]:
        add_gaug(model)
    arch = {"name": name, "img_size": img_size, **grafts, "drop_path": drop_path, **settings}
    backbone = Adapter(model, arch, prr=grafts["prr"], mask_token="mask_token" in settings)
    with torch.no_grad():  # fail now rather than in the first step where it does not return tokens
        backbone.eval()(torch.zeros(1, 3, img_size, img_size))
    return backbone.train()


def _timm_model(name: str, required: dict[str, Any], optional: dict[str, Any], pretrained: bool) -> nn.Module:
    """timm's model with all `required` settings, and those of the `optional` ones that it has."""
    plain = name.removeprefix("timm/")
    if not timm.is_model(plain):
        raise UserError(f"timm {timm.__version__} has no model called {plain!r}. {_did_you_mean(name)}")
    optional, model = dict(optional), None
    while model is None:
        try:
            with cache_only_when_offline(pretrained):
                model = timm.create_model(plain, pretrained=pretrained, num_classes=0, **required, **optional)
        except TypeError as error:
            refused = re.findall(r"'(\w+)'", str(error).partition("unexpected keyword argument")[2])
            if not refused or not set(refused) <= set(required | optional):
                raise
            for key in refused:
                if optional.pop(key, None) is None:
                    ours = {theirs: own for own, theirs in TIMM_NAMES.items()} | {"drop_path_rate": "drop_path"}
                    setting = ours.get(key, key)
                    hint = " (where loss.recipe sets it: backbone.layer_scale=null)" if setting == "layer_scale" else ""
                    raise UserError(f"{name} cannot take {setting}; leave it out{hint}.") from None
        except (OSError, RuntimeError, ValueError, AssertionError) as error:
            reason = " ".join(str(error).split())[:200]
            if pretrained:
                raise UserError(
                    f"The published weights of {name} are not available: they are not in the cache, and could not be "
                    f"downloaded ({reason}). Give a file of them instead (in settings backbone.weights=FILE, without "
                    "backbone.pretrained=true)."
                ) from error
            raise UserError(f"{name} cannot be built: these settings do not fit it ({reason}).") from error
    if not (hasattr(model, "forward_features") and getattr(model, "feature_info", None)):
        raise UserError(f"{name} does not say what its features are, so it cannot be a backbone here.")
    return model


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
