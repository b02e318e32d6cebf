"""A network with timm's interface, ours or timm's, behind the contract of a backbone."""

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, Format, PatchEmbed
from timm.models import group_parameters
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from nearfar.ssl.backbones.prr import prr as refine
from nearfar.ssl.backbones.timm_grafts import attention_weights, count_heads
from nearfar.ssl.backbones.tokens import Backbone, Tokens, check_size, pad_to_multiple
from nearfar.ssl.backbones.vim import VisionMamba
from nearfar.ssl.backbones.vit import VisionTransformer
from nearfar.ssl.errors import UserError

OURS = (VisionTransformer, VisionMamba)

log = logging.getLogger(__name__)


class Adapter(Backbone):
    """A network with timm's interface as a `Backbone`; the network is `model`, without its classifier.

    Feature maps, NCHW or NHWC, become patch tokens without prefix. A final norm that timm keeps in the head is applied
    to all tokens. `num_heads` is that of the last attention in the network, and for a convolutional network
    embed_dim // 64 (at least 1). `patch_size` is the total stride. Networks with windows of a fixed number (MaxViT,
    GCViT, MLP-Mixer) run at the one size they are made for, and smaller images are padded to it, which the log says.
    """

    compiled: Callable[..., Tensor] | None = None  # timm's forward_features: `nearfar.ssl.learning.compiled` sets it

    def __init__(self, model: nn.Module, arch: dict[str, Any], *, prr: bool = False, mask_token: bool = False) -> None:
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
        self.mask_token = self._make_mask_token() if mask_token and not isinstance(model, OURS) else None
        self._masks: Tensor | None = None  # those of the forward pass that is running
        self._sizes: dict[tuple[int, int], tuple[int, int]] = {}  # size of the images -> size that the network runs at

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Tokens:
        tokens = self._final_tokens(images, masks)
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
        intermediates: Any = self.model.forward_intermediates
        options: dict[str, Any] = {"indices": n, "intermediates_only": True}
        if self.num_prefix and "return_prefix_tokens" in inspect.signature(intermediates).parameters:
            options["return_prefix_tokens"] = True
        out = []
        for found in intermediates(images, **options):
            spatial, prefix = found if isinstance(found, tuple | list) else (found, None)
            patches = spatial.flatten(2).transpose(1, 2)
            if prefix is None:
                prefix = patches[:, :0]
            if norm:
                prefix, patches = self._norm(prefix), self._norm(patches)
            out.append(Tokens(prefix, patches, (spatial.shape[2], spatial.shape[3])))
        return out

    def layers_behind(self) -> dict[str, int]:
        matcher: Any = getattr(self.model, "group_matcher", None)
        if matcher is None:
            raise UserError(
                f"timm does not say which layers {self.arch['name']} has, so its learning rate cannot decay layer by "
                "layer; set optim.layerwise_decay=1."
            )
        found: Any = group_parameters(self.model, matcher(coarse=False), reverse=True)
        layers = {f"model.{name}": layer for name, layer in found.items()}
        last = max(layers.values()) + 1  # timm counts the final norm with the last block
        layers |= {name: last for name in layers if name.startswith("model.norm.")} | {"mask_token": 0}
        return {name: last - layers.get(name, last) for name, _ in self.named_parameters()}

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
        inputs: list[tuple[Tensor, Tensor | None]] = []
        hook = last.register_forward_pre_hook(
            lambda _, args, options: inputs.append((args[0], options.get("rope"))), with_kwargs=True
        )
        try:
            network.forward_features(images)
        finally:
            hook.remove()
        return attention_weights(last, *inputs[0])

    def _final_tokens(self, images: Tensor, masks: Tensor | None = None) -> Tokens:
        """After the final norm, before PRR (but our own models have their PRR inside)."""
        images = self._fit(images)
        network: Any = self.model
        forward: Any = (self.training and self.compiled) or network.forward_features
        if masks is None or isinstance(network, OURS):
            features = forward(images) if masks is None else network.forward_features(images, masks)
        else:
            if self.mask_token is None:
                raise ValueError("patches cannot be hidden: the network was made without mask_token=True")
            height, width = (side // self.patch_size for side in images.shape[-2:])
            self._masks = masks.view(-1, height, width)
            try:
                features = network.forward_features(images)
            finally:
                self._masks = None
        return self._tokens(self.final_norm(features), tuple(images.shape[-2:]))

    def _make_mask_token(self) -> nn.Parameter:
        """A token for timm's patch embedding, and the hook that puts it in place of hidden patches."""
        stem: Any = getattr(self.model, "patch_embed", None)
        if not isinstance(stem, PatchEmbed):
            raise UserError(
                f"{self.arch['name']} has no patch embedding whose tokens could be hidden, so iBOT (loss.ibot_weight) "
                "cannot train it; choose a ViT, DeiT, EVA, Swin, or one of ours, or leave iBOT off."
            )
        stem.register_forward_hook(self._hide)  # a bound method, which copy.deepcopy binds to the copy
        return nn.Parameter(torch.zeros(1, stem.proj.weight.shape[0]))

    def _hide(self, stem: Any, _: Any, tokens: Tensor) -> Tensor:
        """What timm's stem gives, (B, h*w, D), NHWC or NCHW, with the mask token where the patches are hidden.

        A network with stages cuts finer patches than it ends with: all that make up a hidden one are replaced, as in
        SimMIM (section 3.2).
        """
        masks = self._masks
        if masks is None or self.mask_token is None:
            return tokens
        token = self.mask_token[0].to(tokens.dtype)
        first = tokens.ndim == 4 and stem.output_fmt != Format.NHWC
        last = tokens.permute(0, 2, 3, 1) if first else tokens
        cells = last.shape[1] * last.shape[2] if last.ndim == 4 else last.shape[1]
        finer = round((cells / masks[0].numel()) ** 0.5)
        masks = masks.repeat_interleave(finer, 1).repeat_interleave(finer, 2)
        last = torch.where((masks if last.ndim == 4 else masks.flatten(1)).unsqueeze(-1), token, last)
        return last.permute(0, 3, 1, 2) if first else last

    def _fit(self, images: Tensor) -> Tensor:
        """Images of a size that the network runs at: padded to its stride, or to the size it is made for."""
        if self.isotropic:
            check_size(images, self.patch_size)
        images = pad_to_multiple(images, self.patch_size)
        if isinstance(self.model, OURS):
            return images
        if not self.isotropic:  # convolutions keep the layout they are given, and most are faster in this one
            images = images.contiguous(memory_format=torch.channels_last)
        size = (images.shape[-2], images.shape[-1])
        if size not in self._sizes:
            self._sizes[size] = self._running_size(images)
        height, width = self._sizes[size]
        return F.pad(images, (0, width - size[1], 0, height - size[0])) if (height, width) != size else images

    @torch.no_grad()
    def _running_size(self, images: Tensor) -> tuple[int, int]:
        size = (images.shape[-2], images.shape[-1])
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()  # the trial must change neither batch norms nor random numbers
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
            raise UserError(f"{name} does not return a feature map or a token sequence, so it cannot be a backbone.")
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
                f"{name} gives features of shape {tuple(features.shape)}, which is not a {grid[0]}x{grid[1]} grid of "
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
        if (norm is None or isinstance(norm, nn.Identity)) and not hasattr(head, "fc1"):  # not one inside of an MLP
            norm = getattr(head, "norm", None)
        model.head = nn.Identity()
    if isinstance(getattr(model, "attn_pool", None), nn.Module):
        model.attn_pool = None  # type: ignore[assignment]
    return norm if isinstance(norm, nn.Module) else nn.Identity()
