"""Weights from other sources: DINO's own files, timm's, LocAt's and ours, under whatever names, loaded strictly."""

import argparse
import math
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from nearfar.ssl.backbones.lgp import LGPPatchEmbed
from nearfar.ssl.backbones.token_model import resize_positions
from nearfar.ssl.backbones.tokens import Backbone, one_line
from nearfar.ssl.backbones.transformers_layout import in_their_authors_names
from nearfar.ssl.backbones.vit import VisionTransformer
from nearfar.ssl.errors import UserError

State = dict[str, Tensor]

NETWORKS = ("teacher", "model_ema", "state_dict", "model", "student")  # keys of a state inside a file, best first
WRAPPERS = ("module.", "_orig_mod.", "backbone.", "model.")  # prefixes added by what wrapped the network
TEACHER = "learner/teacher.backbone."  # in a checkpoint of ours
HEADS = (
    "head.", "head_dist.", "heads.", "heads_dist.", "aux_head.", "fc.", "classifier.", "classif.", "last_linear.",
    "dino_head.", "ibot_head.", "projection_head.", "mask_token",
)  # fmt: skip
LGP_PARTS = ("local_mix", "bands_proj", "bands_mix", "bands_out", "gate", "fuse", "out", "norm")


@dataclass
class Match:
    """What became of every tensor of a file; printed, it is a table."""

    source: str
    tensors: int = 0
    numbers: int = 0
    adapted: list[str] = field(default_factory=list)  # resampled or rearranged, in words
    fresh: list[str] = field(default_factory=list)  # in the model, not in the file: they keep their initial values
    dropped: list[str] = field(default_factory=list)  # in the file, not in the model

    def __str__(self) -> str:
        rows = [
            ("matched", f"{self.tensors} tensors, {self.numbers:,} numbers"),
            ("adapted", "; ".join(self.adapted) or "-"),
            ("left as initialized", _some(_families(self.fresh)) or "-"),
            ("dropped", _some(_families(self.dropped)) or "-"),
        ]
        return "\n".join([f"weights of {self.source}", *(f"  {what:<20} {how}" for what, how in rows)])


def load_weights(model: nn.Module, path: str | Path) -> Match:
    """Load a file into a backbone of `create`, or into any of our or timm's models, in place.

    Understood are facebookresearch/dino and DINOv2 `.pth` files (teacher before student, `module.backbone.`), timm's
    names (DINO, DINOv2, DINOv3, and whatever else timm itself converts for the model), those of Hugging Face
    transformers for ViT, DINOv2 and DINOv3, LocAt's, and our exports; `.pth` is read without running anything in it.
    Heads are dropped. Everything else must fit, name by name and shape by shape, with three exceptions that the
    returned table names: positions are resampled to the model's grid, as the code that they come from does it; GAug,
    LGP and a mask token start fresh where the file has none of them; and learned positions are dropped where LGP or
    rotary positions replace them. timm's models resample as timm does, whoever's weights they hold; for a file's own
    numbers at every size load it into ours, made with the `pos_size` (224 for DINO's) and `pos_antialias` of its table.

    Raises:
        UserError: the file cannot be read safely, holds no network, or belongs to another architecture.
    """
    path = weights_in(Path(path))
    network: nn.Module = model.model if isinstance(model, Backbone) else model  # type: ignore[assignment]
    own = dict(network.state_dict())
    state, match = read_state(path), Match(path.name)
    state = _unwrapped(state, match)
    try:
        state = _renamed(state, network, own, match)
    except UserError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError) as error:
        # timm's converters presume the architecture that they are for
        raise UserError(_other_architecture(path, network, one_line(str(error), 200))) from None
    if isinstance(model, Backbone):  # a final norm that timm keeps in its head lives beside the network
        kept = getattr(model, "final_norm", nn.Identity()).state_dict()
        for prefix in ("fc_norm.", "head.norm.", "final_norm."):
            if kept and all(prefix + key in state for key in kept):
                own |= {prefix + key: tensor for key, tensor in kept.items()}
    for name in [name for name in state if name.startswith(HEADS) and name not in own]:
        match.dropped.append(name)
        del state[name]

    lgp = [n for n, m in network.named_modules() if isinstance(m, LGPPatchEmbed)]
    new = [f"{n}.{part}" for n in lgp for part in LGP_PARTS if not any(key.startswith(f"{n}.bands") for key in state)]
    if not any(".gaug." in key for key in state):
        match.fresh += [key for key in own if ".gaug." in key]
    match.fresh += [key for key in own if key not in state and key.startswith(tuple(new))]
    match.fresh += [key for key in own if key not in state and key == "mask_token"]
    if problems := misfits(own, state, match.fresh):
        raise UserError(_other_architecture(path, network, "; ".join(problems)))
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)
    match.tensors, match.numbers = len(state), sum(tensor.numel() for tensor in state.values())
    return match


def read_state(path: Path) -> State:
    """The tensors of the best network in a `.safetensors` file or a pickled one, by name; those of Hugging Face
    transformers' ViT, DINOv2 and DINOv3 under their authors' names.

    A pickled file is read by torch's restricted reader, which runs nothing; the one class allowed beside tensors is
    argparse.Namespace, which DINO stores its settings in.

    Raises:
        UserError: no such file, not a file of weights, damaged, or no dense tensors of numbers in it.
    """
    path = weights_in(path)
    if not path.is_file():
        raise UserError(f"There is no file of weights {path}: it does not exist.")
    try:
        if path.suffix == ".safetensors":
            found: Any = _teacher_of(load_file(path))
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file can hold anything, and the readers raise whatever it leads them to
        text = " ".join(str(error).split())
        message, _, _ = text.rpartition("WeightsUnpickler error: ")[2].partition(
            " Check the documentation of torch.load"
        )
        reason = one_line(message, 200).rstrip(".") or type(error).__name__
        if type(error).__name__ == "UnpicklingError" and re.search(r"Unsupported (global|class)|allowed global", text):
            raise UserError(
                f"{path} holds more than tensors, and reading it could run code, so it was not read ({reason}). Save "
                "its state_dict alone, best as .safetensors."
            ) from None
        raise UserError(
            f"The weights in {path} cannot be read: {reason}. It is damaged, or not a file of weights "
            "(.safetensors, or a .pth or .pt of torch.save)."
        ) from None
    for _ in range(len(NETWORKS)):  # nested at most this deep; a crafted file may contain itself
        states = [found[key] for key in NETWORKS if key in found] if isinstance(found, Mapping) else []
        inner = next((state for state in states if isinstance(state, Mapping)), None)
        if inner is None:
            break
        found = inner
    named = found.items() if isinstance(found, Mapping) else ()
    tensors = {k: v for k, v in named if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no network: there are no named tensors in it.")
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_complex():
            raise UserError(f"{one_line(name, 100)} in {path} is not a dense tensor of real numbers.")
    return in_their_authors_names(tensors)


def weights_in(path: Path) -> Path:
    """The file of weights that is meant by the folder of a run, a checkpoint or an export; other paths as they are."""
    path = path.expanduser()
    if not path.is_dir():
        return path
    checkpoints = sorted(path.glob("checkpoints/step-?????????/tensors.safetensors"))
    for file in (
        path / "teacher.safetensors",
        path / "classifier.safetensors",
        path / "tensors.safetensors",
        path / "model.safetensors",  # of a folder exported for timm or transformers
        *checkpoints[-1:],
    ):
        if file.is_file():
            return file
    raise UserError(f"There are no weights in {path}: it is not the folder of a run, a checkpoint or an export.")


def _teacher_of(state: State) -> State:
    """The teacher's backbone out of a whole checkpoint; any other file's tensors as they are."""
    inside = {key.removeprefix(TEACHER): value for key, value in state.items() if key.startswith(TEACHER)}
    return inside or state


def _unwrapped(state: State, match: Match) -> State:
    """Names without the prefixes of DDP, of a compiled module or of a pair of backbone and head."""
    stripped = True
    while stripped:
        stripped = False
        for wrapper in WRAPPERS:
            inside = {k.removeprefix(wrapper): v for k, v in state.items() if k.startswith(wrapper)}
            outside = [key for key in state if not key.startswith(wrapper)]
            aside = {k: state[k] for k in outside if k.startswith("final_norm.")}  # of our own exports
            if inside and all(key.startswith(HEADS) or key in aside for key in outside):
                match.dropped += [key for key in outside if key not in aside]
                state, stripped = inside | aside, True
    return state


def _renamed(state: State, network: nn.Module, own: State, match: Match) -> State:
    """Names and layouts of other code bases in ours or timm's."""
    antialias = antialiased(state) or getattr(network, "pos_antialias", False)
    # Blocks in chunks, as DINOv2 saves them; networks with stages have such names of their own.
    state = {k if k in own else re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", k): v for k, v in state.items()}
    if isinstance(network, VisionTransformer) and "register_tokens" in state:
        state["reg_token"] = state.pop("register_tokens")
    for key in [key for key in state if re.search(r"\.attn\..*(var|alpha)", key) and ".gaug." not in key]:
        part = re.sub(r"\.attn\..*(var|alpha).*\.(weight|bias)$", r".attn.gaug.\1.\2", key)  # LocAt's predictors
        if part in own and own[part].shape == state[key].shape:
            state[part] = state.pop(key)
    for name, module in network.named_modules():
        if isinstance(module, LGPPatchEmbed):
            for kind in ("weight", "bias"):
                if f"{name}.{kind}" in state:  # the convolution that LGP replaced
                    state[f"{name}.proj.{kind}"] = state.pop(f"{name}.{kind}")
    _fit_positions(state, network, own, antialias, match)
    _leave_out_attention_biases(state, own, match)
    return _converted(state, network, own, match)


def _fit_positions(state: State, network: nn.Module, own: State, antialias: bool, match: Match) -> None:
    """Learned positions left out where the network has none, and resampled where its table has another size."""
    positions = state.get("pos_embed")
    if positions is not None and "pos_embed" not in own:
        has_rope = any(hasattr(module, "rope") and module.rope is not None for module in network.modules())
        if has_rope or any(isinstance(module, LGPPatchEmbed) for module in network.modules()):
            match.dropped.append("pos_embed")
            del state["pos_embed"]
    elif positions is not None and isinstance(network, VisionTransformer):
        state["pos_embed"] = _fitted(positions, network, antialias, match)


def _leave_out_attention_biases(state: State, own: State, match: Match) -> None:
    """Drop biases of attention that change nothing where the network has none, as most of timm's DINOv3 have none.

    Raises:
        UserError: they change something, and timm would drop them in silence.
    """
    if any(re.search(r"\.attn\.(qkv\.bias|q_bias|q_proj\.bias)$", name) for name in own):
        return
    biases = [name for name in state if name.endswith(".attn.qkv.bias")]
    for name in [name for name in biases if name.replace("bias", "weight") in own]:
        if has_query_or_value_bias(name, state[name]):
            raise UserError(
                f"{match.source} has biases of queries and values ({name}), and this network has none: choose the one "
                "that has them (timm calls DINOv3's so with _qkvb at the end: timm/vit_small_patch16_dinov3_qkvb)."
            )
        match.dropped.append(name)
        del state[name]


def has_query_or_value_bias(name: str, tensor: Tensor) -> bool:
    """Is it a bias of attention that changes what it computes? That of keys does not: softmax takes it out again."""
    if name.endswith((".q_bias", ".v_bias")):
        return True  # written for networks that have them
    if not name.endswith(".attn.qkv.bias") or tensor.ndim != 1 or len(tensor) % 3:
        return False
    query, _, value = tensor.chunk(3)
    return bool(query.any() or value.any())


def antialiased(state: Mapping[str, Tensor]) -> bool:
    """Do the learned positions of a file of weights reach other sizes antialiased, exactly to the size?

    As in timm, whose own weights come with a classifier, and in DINOv2 with registers (docs/methods.md, section 5); in
    DINO, DINOv2 without registers and our own networks, registers or not, they do not. A file without positions: no.
    """
    if "pos_embed" not in state or state["pos_embed"].ndim != 3:
        return False
    rows = state["pos_embed"].shape[1]
    return "head.weight" in state or "register_tokens" in state or math.isqrt(rows) ** 2 == rows  # timm: no row for CLS


def _converted(state: State, network: nn.Module, own: State, match: Match) -> State:
    """By timm's own knowledge of other layouts of this model, where the names or shapes are not those it has."""
    convert: Callable[..., State] | None = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if convert is not None and any(key not in state or state[key].shape != own[key].shape for key in own):
        shapes = {key: tuple(value.shape) for key, value in state.items()}
        state = convert(state, network)
        match.adapted += [
            f"{key} {shapes[key]} to {tuple(value.shape)}"
            for key, value in state.items()
            if key in shapes and shapes[key] != tuple(value.shape)
        ]
    return state


def _fitted(positions: Tensor, network: VisionTransformer, antialias: bool, match: Match) -> Tensor:
    """Learned positions (1, [1+] h*w, D) of a square grid, on the grid of our ViT's table, with a row for CLS."""
    own = network.pos_embed
    if own is None or positions.ndim != 3 or positions.shape[::2] != own.shape[::2]:
        return positions  # `misfits` will report them
    side = math.isqrt(positions.shape[1])
    if side * side == positions.shape[1]:  # networks that add nothing to CLS, such as DINOv2's with registers in timm
        positions = F.pad(positions, (0, 0, 1, 0))
        match.adapted.append("pos_embed: a row of zeros for CLS")
    side, grid = math.isqrt(positions.shape[1] - 1), network.pos_grid
    if side * side != positions.shape[1] - 1 or (side, side) == grid:
        return positions
    table = resize_positions(positions[:, 1:].float(), (side, side), grid, antialias)
    way = "as timm does" if antialias else f"as DINO does (exact at this size; for all sizes set pos_size, here {side} "
    way += "" if antialias else "patches)"
    match.adapted.append(f"pos_embed: {side}x{side} resampled to {grid[0]}x{grid[1]} {way}")
    return torch.cat([positions[:, :1], table.to(positions.dtype)], 1)


def misfits(own: Mapping[str, Tensor], given: Mapping[str, Tensor], fresh: Collection[str] = ()) -> list[str]:
    """What keeps tensors `given` from loading strictly into those of a model: [] when every name and shape agrees.

    `fresh` names those of the model that need not be given. Floating point goes into floating point only.
    """
    problems = []
    if missing := sorted(own.keys() - given.keys() - set(fresh)):
        problems.append(f"missing: {_some(missing)}")
    if extra := sorted(given.keys() - own.keys()):
        problems.append(f"unexpected: {_some(extra)}")
    both = [key for key in own if key in given]
    misshapen = [
        f"{key} {tuple(given[key].shape)} instead of {tuple(own[key].shape)}"
        for key in both
        if given[key].shape != own[key].shape
    ]
    if misshapen:
        problems.append(f"misshapen: {_some(misshapen)}")
    kinds = [
        f"{key} {given[key].dtype} instead of {own[key].dtype}"
        for key in both
        if given[key].is_floating_point() != own[key].is_floating_point()
    ]
    if kinds:
        problems.append(f"of another type: {_some(kinds)}")
    return problems


def _other_architecture(path: Path, network: nn.Module, problems: str) -> str:
    return (
        f"The weights in {path} belong to another architecture than this {type(network).__name__}: {problems}. Choose "
        "the backbone they were trained with."
    )


def _families(names: Iterable[str]) -> list[str]:
    """Names with their numbers as *, each once, in order: blocks.*.attn.gaug.var.weight."""
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(one_line(name, 120) for name in names[:most]) + (
        f" and {len(names) - most} more" if len(names) > most else ""
    )
