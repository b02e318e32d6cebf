"""`train.compile`: what the blocks of student and teacher compute, through torch.compile.

Our networks are compiled a block at a time. All blocks share one function of fixed shapes, so there is one graph for
each size of view (two where stochastic depth spares the first block), and one for the teacher. Drop-path is drawn
outside of it. A network of timm is compiled whole, again one graph for each size of view. Only the passes of training
are compiled: scores read other sizes, uncompiled. Names of weights stay as they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch

from nearfar.ssl.backbones import Backbone
from nearfar.ssl.backbones.adapter import Adapter
from nearfar.ssl.backbones.vim import VimBlock, VisionMamba
from nearfar.ssl.backbones.vit import Block as VitBlock
from nearfar.ssl.backbones.vit import VisionTransformer
from nearfar.ssl.errors import UserError

CompileSetting = bool | Literal["auto"]


def switch_on(
    backbones: Iterable[Backbone], setting: CompileSetting, device: torch.device, warnings: list[str]
) -> bool:
    """Compile what `backbones` do in training, as `train.compile` says. Are they compiled?

    auto: on CUDA, if there is a compiler; where there is none, `warnings` gets a line about it.

    Raises:
        UserError: asked for, and there is no compiler.
    """
    if setting is False or (setting == "auto" and device.type != "cuda"):
        return False
    if reason := compiler_missing(device):
        if setting == "auto":
            warnings.append(f"Nothing is compiled (train.compile=auto), so steps are slower: {reason}.")
            return False
        raise UserError(
            f"train.compile=true, but {reason}. Install one (Debian and Ubuntu: apt-get install g++), or set "
            "train.compile=false."
        )
    torch._dynamo.reset()  # graphs of a run before this one in the same process would count against the limit
    for backbone in backbones:
        compile_backbone(backbone, device)
    return True


def compile_backbone(backbone: Backbone, device: torch.device, backend: str = "inductor") -> None:
    """Compile what `backbone` does in training mode. The first pass of each size then takes seconds to minutes."""
    if not isinstance(backbone, Adapter):
        raise UserError(f"train.compile does not know how to compile a {type(backbone).__name__}; set it to false.")
    model: Any = backbone.model
    if isinstance(model, VisionTransformer):
        model.compiled = _compile(VitBlock.residuals, backend, whole=True)
    elif isinstance(model, VisionMamba):
        model.compiled = _compile(VimBlock.residual, backend, whole=device.type != "cuda")  # kernels split the graph
    else:
        backbone.compiled = _compile(model.forward_features, backend, whole=False)


def _compile(function: Callable[..., Any], backend: str, whole: bool) -> Callable[..., Any]:
    """whole: anything that would split the graph, or pass the limit of recompilations, is an error and not slowness."""
    # torch's own random numbers instead of inductor's: drop-path inside of timm's networks draws as it does uncompiled.
    options: dict[str, Any] | None = {"fallback_random": True} if backend == "inductor" else None
    return torch.compile(function, dynamic=False, fullgraph=whole, backend=backend, options=options)


def compiler_missing(device: torch.device) -> str:
    """Why torch.compile cannot work on this device, in words; "" if it can."""
    if device.type == "cuda":
        from nearfar.ssl.backbones.attention import cuda_compiler_missing

        return (why := cuda_compiler_missing()) and f"torch.compile does not work on this GPU ({why})"
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        chosen = os.environ.get("CXX")
        return "torch.compile needs a C++ compiler, and there is none" + (f" at CXX={chosen}" if chosen else "")
    return ""
