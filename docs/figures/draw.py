"""Draws the figures of the README from the code they explain: `python docs/figures/draw.py`."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image

from nearfar.ssl.backbones import GaugBias, LGPPatchEmbed, prr

HERE = Path(__file__).resolve().parent
INK, SOFT, BLUE, ORANGE = "#1f2933", "#9aa5b1", "#2b6cb0", "#dd6b20"


def picture(side: int = 128) -> np.ndarray:
    """A gray scene (side, side) within [0, 1]: a disk, stripes, a slope."""
    y, x = np.mgrid[:side, :side] / side
    scene = 0.25 + 0.35 * x
    scene[(x - 0.33) ** 2 + (y - 0.36) ** 2 < 0.05] = 0.95
    stripes = (y > 0.62) & (x > 0.45)
    scene[stripes] = 0.5 + 0.4 * np.sign(np.sin(2 * np.pi * 16 * x[stripes]))
    return scene.clip(0, 1)


def grid_lines(axes: Axes, side: int, step: int, color: str) -> None:
    at = np.arange(0, side + 1, step) - 0.5
    axes.hlines(at, -0.5, side - 0.5, color=color, lw=0.6)
    axes.vlines(at, -0.5, side - 0.5, color=color, lw=0.6)


def bare(axes: Axes, title: str = "") -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=9, color=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str = INK, width: float = 1.2
) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=color, lw=width))


def box(
    axes: Axes, x: float, y: float, width: float, height: float, text: str, below: str = "", face: str = "white"
) -> None:
    shape = "round,pad=0.02,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, fc=face, ec=INK, lw=1))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8.5, color=INK)
    if below:
        axes.text(
            x + width / 2, y - 0.13, below, ha="center", va="top", fontsize=6.5, color="#52606d", family="monospace"
        )


def draw_lgp() -> Figure:
    """An image, its Haar packet of two levels (16 sub-bands), and how both become tokens."""
    scene = picture()
    embed = LGPPatchEmbed(4, 8, levels=2)
    images = torch.from_numpy(np.repeat(scene[None, None], 3, 1)).float()
    bands = embed.packet_of(images)[0, ::3].numpy()  # (16, 32, 32), one color
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.1), width_ratios=[1, 1, 1.35])
    axes[0].imshow(scene, cmap="gray", vmin=0, vmax=1)
    grid_lines(axes[0], 128, 16, BLUE)
    bare(axes[0], "local: patches")
    rows = [np.hstack([band / np.abs(band).max() for band in bands[i : i + 4]]) for i in range(0, 16, 4)]
    axes[1].imshow(np.vstack(rows), cmap="gray", vmin=-0.6, vmax=0.6)
    grid_lines(axes[1], 128, 32, ORANGE)
    bare(axes[1], "global: 16 wavelet sub-bands")
    flow = axes[2]
    flow.set(xlim=(0, 3.4), ylim=(0, 3))
    bare(flow)
    box(flow, 0.1, 2.0, 0.9, 0.5, "local", face="#ebf4fb")
    box(flow, 0.1, 0.6, 0.9, 0.5, "global", face="#fdf1e7")
    box(flow, 1.45, 1.3, 0.75, 0.5, "gate")
    box(flow, 2.55, 1.3, 0.75, 0.5, "tokens")
    arrow(flow, (1.05, 2.2), (1.5, 1.82))
    arrow(flow, (1.05, 0.9), (1.45, 1.3))
    arrow(flow, (2.25, 1.55), (2.52, 1.55))
    flow.text(1.82, 0.98, "one share for\neach channel", ha="center", va="top", fontsize=7, color=INK)
    flow.text(2.92, 1.17, "3x3 convolutions;\nno position\nembedding", ha="center", va="top", fontsize=7, color=INK)
    figure.tight_layout()
    return figure


def draw_gaug() -> Figure:
    """The bias that three queries add to their attention, by the module itself."""
    grid = (14, 14)
    module = GaugBias(4, grid)
    wishes = [("as every layer starts", (3, 3), (1.0, 1.0), 0.69), ("wide", (9, 4), (9.0, 9.0), 1.4)]
    wishes.append(("along a row", (8, 9), (0.6, 14.0), 1.8))
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.9))
    for ax, (title, (row, column), variance, strength) in zip(axes, wishes, strict=True):
        with torch.no_grad():  # biases that make the predictor answer so, whatever the query
            share = torch.tensor(variance) / module.ceiling
            module.var.weight.zero_()
            module.alpha.weight.zero_()
            module.var.bias.copy_(torch.log(share / (1 - share)) + module.shift)
            module.alpha.bias.fill_(float(np.log(np.expm1(strength))))
            bias = module(torch.zeros(1, 1, 196, 4), grid)[0, 0, row * 14 + column].view(grid)
        ax.imshow(bias.numpy(), cmap="Blues", vmin=0, vmax=1.8)
        grid_lines(ax, 14, 1, "white")
        ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, ec=ORANGE, lw=2))
        bare(ax, f"{title}\nvariance {variance[0]:g} x {variance[1]:g}, strength {strength:g}")
    figure.tight_layout()
    return figure


def draw_prr() -> Figure:
    """Where the gradient of a loss on CLS arrives among the last layer's tokens, without and with PRR."""
    torch.manual_seed(0)
    tokens = torch.nn.functional.layer_norm(torch.randn(1, 50, 64), (64,))
    reach = []
    for refine in (False, True):
        x = tokens.clone().requires_grad_()
        y = prr(x, 4) if refine else x
        y[:, 0].square().sum().backward()
        assert x.grad is not None
        reach.append(x.grad[0].norm(dim=-1).numpy())
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.9))
    for ax, norms, title in zip(
        axes, reach, ("without PRR the gradient reaches CLS only", "with PRR it reaches every patch"), strict=True
    ):
        ax.imshow(np.sqrt(norms[1:].reshape(7, 7)), cmap="Oranges", vmin=0, vmax=1.2 * np.sqrt(reach[1][1:].max()))
        grid_lines(ax, 7, 1, "#e4e7eb")
        ax.add_patch(Rectangle((-2.3, 2.5), 1, 1, fc="#dd6b20" if norms[0] > 0 else "white", ec=INK))
        ax.text(-1.8, 4.1, "CLS", ha="center", fontsize=8, color=INK)
        for row in range(7) if norms[1:].any() else ():
            arrow(ax, (-1.25, 3), (-0.55, row), SOFT, 0.8)
        ax.text(-3.6, 3, "loss", ha="center", va="center", fontsize=8, color=INK)
        arrow(ax, (-3.1, 3), (-2.35, 3))
        ax.set(xlim=(-4.2, 6.6), ylim=(6.6, -0.6))
        bare(ax, title)
    figure.tight_layout()
    return figure


def draw_flow() -> Figure:
    """What an image goes through, and the files that do it."""
    figure, axes = plt.subplots(figsize=(9.4, 2.7))
    axes.set(xlim=(0, 11.3), ylim=(-0.05, 3.0))
    bare(axes)
    box(axes, 0.1, 1.9, 1.3, 0.7, "images", "data/sources/", "#f5f7fa")
    box(axes, 0.1, 0.4, 1.3, 0.7, "plan of views", "data/views.py", "#f5f7fa")
    box(axes, 2.2, 1.15, 1.35, 0.7, "batch of views", "data/loaders/", "#f5f7fa")
    box(axes, 4.35, 1.9, 1.3, 0.7, "student", "backbones/ heads/", "#ebf4fb")
    box(axes, 4.35, 0.4, 1.3, 0.7, "teacher", "learning/dino.py", "#ebf4fb")
    box(axes, 6.4, 1.15, 1.0, 0.7, "loss", "learning/losses", "#ebf4fb")
    box(axes, 8.1, 1.15, 1.2, 0.7, "checkpoint", "checkpoint.py", "#fdf1e7")
    box(axes, 10.0, 1.9, 1.2, 0.7, "features", "eval/features/", "#f0f8f1")
    box(axes, 10.0, 0.4, 1.2, 0.7, "scores", "eval/", "#f0f8f1")
    arrow(axes, (1.45, 2.2), (2.2, 1.7))
    arrow(axes, (1.45, 0.8), (2.2, 1.3))
    arrow(axes, (3.6, 1.7), (4.32, 2.15))
    arrow(axes, (3.6, 1.3), (4.32, 0.85))
    arrow(axes, (5.7, 2.15), (6.42, 1.75))
    arrow(axes, (5.7, 0.85), (6.42, 1.25))
    arrow(axes, (7.45, 1.5), (8.05, 1.5))
    arrow(axes, (9.35, 1.65), (9.97, 2.1))
    arrow(axes, (10.6, 1.62), (10.6, 1.14))
    axes.text(3.9, 2.28, "all views", ha="center", fontsize=7, color=INK)
    axes.text(3.85, 0.72, "global\nviews", ha="center", fontsize=7, color=INK, va="center")
    axes.add_patch(
        FancyArrowPatch(
            (6.95, 1.9), (5.68, 2.42), connectionstyle="arc3,rad=0.35", arrowstyle="-|>", mutation_scale=9, color=BLUE
        )
    )
    axes.text(6.55, 2.75, "gradient", ha="center", fontsize=7, color=BLUE)
    axes.add_patch(FancyArrowPatch((4.6, 1.62), (4.6, 1.14), arrowstyle="-|>", mutation_scale=9, color=BLUE, ls="--"))
    axes.text(4.72, 1.4, "moving average", fontsize=7, color=BLUE, va="center")
    figure.tight_layout()
    return figure


def main() -> None:
    for name, draw in {"lgp": draw_lgp, "gaug": draw_gaug, "prr": draw_prr, "flow": draw_flow}.items():
        figure = draw()
        buffer = BytesIO()
        figure.savefig(buffer, dpi=110, facecolor="white")
        # 256 colors do for a drawing, and keep it small.
        Image.open(buffer).convert("RGB").quantize(256).save(HERE / f"{name}.png", optimize=True)
        plt.close(figure)


if __name__ == "__main__":
    main()
