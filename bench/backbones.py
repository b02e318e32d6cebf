"""How fast LGP, GAug and PRR are, against the plain ViT and against the published ways of computing them.

    python bench/backbones.py [--model small] [--batch 8] [--rounds 6] [--threads 1] [--device cpu] [--clock wall]

`--clock cpu` counts the process's own CPU seconds instead, for machines that others use at the same time.

Every ratio comes from one run: the variants take turns within each round, and the fastest round of each counts. Prints
Markdown: img/s of forward and of forward + backward, in float32 and under bfloat16 autocast; then the LGP embedding
against the explicit pytorch_wavelets recursion; then multiply-adds of one image beside the published increments.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nearfar.ssl.backbones import GaugBias, LGPPatchEmbed, VisionTransformer
from nearfar.ssl.backbones.attention import attend
from nearfar.ssl.backbones.lgp import pointwise
from nearfar.ssl.backbones.vit import WIDTHS, Attention, PatchEmbed

PUBLISHED = {"tiny": 0.07, "small": 0.24, "base": 0.82}  # G multiply-adds LGP adds (docs/methods.md section 1)


class MaterializedGaug(GaugBias):
    """The published way: distances and an exponential for every pair of patches, per head."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], seen: Tensor | None = None) -> Tensor:
        height, width = grid
        prefix = q.shape[2] - height * width
        positions = torch.cartesian_prod(torch.arange(height), torch.arange(width)).to(q.device)
        squared = (positions[:, None] - positions).square().float()  # (h*w, h*w, 2)
        with torch.autocast(q.device.type, enabled=False):
            patches = q[:, :, prefix:].float()
            variance = self.ceiling * torch.sigmoid(self.var(patches) - self.shift)
            exponent = squared[..., 0] / (variance[..., :1] + self.eps) + squared[..., 1] / (
                variance[..., 1:] + self.eps
            )
            bias = F.softplus(self.alpha(patches)) * torch.exp(-0.5 * exponent)
        return attend(q, k, v, F.pad(bias, (prefix, 0, prefix, 0)).to(q.dtype))


class RecursiveLGP(LGPPatchEmbed):
    """The published way: one 2-D wavelet transform at a time down the tree, then a 1x1 projection."""

    def __init__(self, patch_size: int, embed_dim: int) -> None:
        super().__init__(patch_size, embed_dim)
        from pytorch_wavelets import DWTForward

        self.transform = DWTForward(J=1, wave="haar", mode="periodization")

    def project(self, images: Tensor) -> tuple[Tensor, Tensor]:
        packets = [images]
        for _ in range(self.levels):
            children = []
            for packet in packets:
                low, high = self.transform(packet)
                children += [low, *high[0].unbind(2)]
            packets = children
        return self.proj(images), pointwise(torch.cat(packets, 1), self.bands_proj)


def variants(size: str) -> dict[str, nn.Module]:
    width, heads = WIDTHS[size]
    common: dict[str, Any] = {"embed_dim": width, "num_heads": heads, "num_classes": 0}
    made: dict[str, nn.Module] = {
        name: VisionTransformer(**common, **{switch: True for switch in switches.split()})
        for name, switches in {
            "plain": "", "LGP": "lgp", "GAug": "gaug", "PRR": "prr", "GAug + PRR": "gaug prr", "all": "lgp gaug prr",
        }.items()
    }  # fmt: skip
    recursive = VisionTransformer(**common, lgp=True)
    recursive.patch_embed = RecursiveLGP(16, width)
    made["LGP, recursive packet"] = recursive
    materialized = VisionTransformer(**common, gaug=True, prr=True)
    for module in materialized.modules():
        if isinstance(module, Attention):
            module.gaug = MaterializedGaug(width // heads, materialized.grid_size)
    made["GAug + PRR, materialized exp"] = materialized
    return made


def measure(
    models: dict[str, Callable[..., Any]], images: Tensor, rounds: int, bf16: bool, clock: Callable[[], float]
) -> dict[str, tuple[float, float]]:
    """Seconds of forward and of forward + backward, the fastest of `rounds` turns."""
    best = {name: (float("inf"), float("inf")) for name in models}
    wait: Callable[[], None] = torch.cuda.synchronize if images.is_cuda else lambda: None
    for _ in range(rounds + 1):  # the first is for warming up, and counts only where it is the fastest
        for name, model in models.items():
            wait()
            start = clock()
            with torch.autocast(images.device.type, torch.bfloat16) if bf16 else nullcontext():
                tokens = getattr(model, "forward_features", model)(images)
            wait()
            middle = clock()
            tokens.float().square().mean().backward()
            wait()
            end = clock()
            best[name] = (min(best[name][0], middle - start), min(best[name][1], end - start))
    return best


def multiply_adds(model: nn.Module) -> float:
    """G multiply-adds of one more 224 px image; what a forward pass spends once, on folding weights, stays out."""
    found = []
    for batch in (1, 2):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.randn(batch, 3, 224, 224))
        found.append(counter.get_total_flops() / 2e9)
    return found[1] - found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="small", choices=WIDTHS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    models = {name: model.to(args.device) for name, model in variants(args.model).items()}
    images = torch.randn(args.batch, 3, 224, 224, device=args.device)
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    print(f"ViT-{args.model} at 224, batch {args.batch}, {args.device}, torch {torch.__version__},")
    print(f"{args.threads} thread(s), {args.clock} seconds, fastest of {args.rounds + 1} rounds\n")
    print("| model | precision | forward img/s | x plain | forward + backward img/s | x plain |")
    print("|---|---|--:|--:|--:|--:|")
    for bf16 in (False, True):
        seconds = measure(dict(models), images, args.rounds, bf16, clock)
        for name, (forward, both) in seconds.items():
            plain = seconds["plain"]
            print(
                f"| {name} | {'bf16' if bf16 else 'float32'} | {args.batch / forward:.1f} | {forward / plain[0]:.2f} "
                f"| {args.batch / both:.1f} | {both / plain[1]:.3f} |",
                flush=True,
            )
    width = WIDTHS[args.model][0]
    whole, folded, recursive = (
        stem.to(args.device) for stem in (PatchEmbed(16, width), LGPPatchEmbed(16, width), RecursiveLGP(16, width))
    )
    packet = folded.packet_of(images)
    stems: dict[str, Callable[..., Any]] = {
        "plain patch embedding": whole,
        "both projections of a packet at hand": lambda x: torch.cat(
            [folded.proj(x), pointwise(packet, folded.bands_proj)], 1
        ),
        "packet and both projections, folded": lambda x: torch.cat(folded.project(x), 1),
        "packet and both projections, recursive": lambda x: torch.cat(recursive.project(x), 1),
        "whole LGP, folded": folded,
        "whole LGP, recursive": recursive,
    }
    seconds = measure(stems, images, args.rounds, False, clock)
    print("\n| embedding alone, float32 | forward img/s | forward + backward img/s | times the recursive |")
    print("|---|--:|--:|--:|")
    for name, (forward, both) in seconds.items():
        slow = seconds["whole LGP, recursive" if "whole" in name else "packet and both projections, recursive"][1]
        print(f"| {name} | {args.batch / forward:.0f} | {args.batch / both:.0f} | {slow / both:.1f} |")
    print("\n| ViT | plain G multiply-adds | with LGP | more | published |\n|---|--:|--:|--:|--:|")
    for size, (width, heads) in WIDTHS.items():
        counts = [
            multiply_adds(VisionTransformer(embed_dim=width, num_heads=heads, num_classes=0, lgp=lgp).eval())
            for lgp in (False, True)
        ]
        print(f"| {size} | {counts[0]:.3f} | {counts[1]:.3f} | +{counts[1] - counts[0]:.3f} | +{PUBLISHED[size]} |")


if __name__ == "__main__":
    main()
