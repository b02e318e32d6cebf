"""Perturbations of test images and of what a network makes of them, and the table of what each costs.

Those of LGP (docs/methods.md section 1): patch shuffle, token shuffle, band shuffle. Image functions take and return
batches (B, C, H, W) of any range; random numbers come from a generator on the CPU.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.eval.results import CLEAN, signed
from nearfar.ssl.backbones.lgp import LGPPatchEmbed, bands_permuted
from nearfar.ssl.backbones.tokens import check_divides
from nearfar.ssl.errors import UserError


def shuffle_patches(images: Tensor, patch_size: int, generator: torch.Generator) -> Tensor:
    """The images with their patches in another order, each image in its own. Sides are multiples of patch_size."""
    height, width = images.shape[-2:]
    check_divides(height, width, patch_size)
    patches = F.unfold(images, patch_size, stride=patch_size)
    order = _orders(len(images), patches.shape[2], generator).to(images.device)
    shuffled = patches.gather(2, order[:, None].expand_as(patches))
    return F.fold(shuffled, (height, width), patch_size, stride=patch_size)


@contextmanager
def tokens_shuffled(model: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Within this context the patch embedding's tokens reach the network in another order, each image's in its own.

    Positions that are added afterwards stay where they are, as for a patch at a wrong place. Raises UserError for
    a network whose patch embedding does not make a sequence of tokens.
    """
    embeds = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "patch_embed"]
    if len(embeds) != 1:
        raise UserError(f"Token shuffle needs a network with one patch embedding; this one has {len(embeds)}.")

    def shuffle(_: nn.Module, __: Any, tokens: Tensor) -> Tensor:
        if tokens.ndim != 3:
            raise UserError("Token shuffle needs a patch embedding that makes a sequence of tokens, not a feature map.")
        order = _orders(tokens.shape[0], tokens.shape[1], generator).to(tokens.device)
        return tokens.gather(1, order[..., None].expand_as(tokens))

    handle = embeds[0].register_forward_hook(shuffle)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def bands_shuffled(model: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Within this context LGP's wavelet sub-bands reach their projection in another order, the same for all images."""
    embeds = [module for module in model.modules() if isinstance(module, LGPPatchEmbed)]
    bands = 4 ** embeds[0].levels if embeds else 1
    with bands_permuted(model, torch.randperm(bands, generator=generator)):
        yield


def at_resolution(images: Tensor, side: int) -> Tensor:
    """Square images resized to `side` (bicubic, antialiased): what a network sees that runs at another size."""
    return F.interpolate(images, size=(side, side), mode="bicubic", antialias=True, align_corners=False)


def coarsened(images: Tensor, factor: float) -> Tensor:
    """Images shrunk by `factor` and enlarged again to their size: they lose detail and keep their size."""
    size = images.shape[-2:]
    small = [max(1, round(side / factor)) for side in size]
    reduced = F.interpolate(images, size=small, mode="bicubic", antialias=True, align_corners=False)
    return F.interpolate(reduced, size=size, mode="bicubic", antialias=True, align_corners=False)


def flipped(images: Tensor, *, vertical: bool = False) -> Tensor:
    """Left and right exchanged, or top and bottom."""
    return images.flip(-2 if vertical else -1)


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of `sigma` pixels, cut at 3 sigma, edges repeated."""
    if not sigma > 0:
        raise UserError(f"The width of a blur must be positive, not {sigma}.")
    radius = math.ceil(3 * sigma)
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=images.device) / sigma) ** 2)
    kernel = (taps / taps.sum()).to(images.dtype)
    planes = F.pad(images.flatten(0, 1)[:, None], [radius] * 4, mode="replicate")
    planes = F.conv2d(F.conv2d(planes, kernel[None, None, None]), kernel[None, None, :, None])
    return planes.view_as(images)


def _orders(images: int, tokens: int, generator: torch.Generator) -> Tensor:
    """(images, tokens): a random order for each image."""
    return torch.rand(images, tokens, generator=generator).argsort(dim=1)


# The table --------------------------------------------------------------------------------------------------------


def drops(scores: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float | None]]:
    """What each perturbation costs: {perturbation: {mean, std, drop, drop_std}} in points, "clean" first.

    scores: accuracy in percent of every seed, the same seeds under each perturbation, and under "clean". A drop is
    clean minus perturbed, seed by seed, so that its spread is not that of the seeds themselves; the deviations are
    None with one seed. Raises UserError where "clean" or a seed is missing.
    """
    if CLEAN not in scores or not scores[CLEAN]:
        raise UserError(f'A drop needs a score without perturbation, under the name "{CLEAN}".')
    clean = scores[CLEAN]
    table: dict[str, dict[str, float | None]] = {}
    for name in (CLEAN, *(name for name in scores if name != CLEAN)):
        found = scores[name]
        if len(found) != len(clean):
            raise UserError(f'"{name}" has {len(found)} seeds and "{CLEAN}" {len(clean)}; a drop needs the same seeds.')
        if not all(math.isfinite(value) for value in found):
            raise UserError(f'A score under "{name}" is not finite.')
        lost = [a - b for a, b in zip(clean, found, strict=True)]
        table[name] = {
            "mean": statistics.mean(found),
            "std": statistics.stdev(found) if len(found) > 1 else None,
            "drop": statistics.mean(lost),
            "drop_std": statistics.stdev(lost) if len(lost) > 1 else None,
        }
    return table


def drop_table(networks: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Markdown: a line for each network, a column for each perturbation, "accuracy (drop)" with the spread of seeds."""
    tables = {name: drops(scores) for name, scores in networks.items()}
    columns = list(dict.fromkeys(column for table in tables.values() for column in table))
    lines = ["| network | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, table in tables.items():
        cells = [_cell(table[column], column == CLEAN) if column in table else "-" for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: Mapping[str, float | None], clean: bool) -> str:
    mean = f"{row['mean']:.2f}" + (f" ± {row['std']:.2f}" if row["std"] is not None else "")
    if clean:
        return mean
    lost = signed(-(row["drop"] or 0.0), 2) + (f" ± {row['drop_std']:.2f}" if row["drop_std"] is not None else "")
    return f"{mean} ({lost})"
