"""Mixup, cutmix and label smoothing of a step's images, as a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nearfar.ssl.settings.finetune_settings import ClassifierSettings

_STREAM = 0x6D6978  # keeps these draws apart from those of weights and views under the same seed


class Mixing:
    """Images and labels -> mixed images and soft targets, by timm's `Mixup` (Zhang et al. 2018; Yun et al. 2019).

    Every step draws one blend or one box, for all ranks alike, and images are mixed with their neighbor in the batch
    (the first with the second, the third with the fourth, ...), so that the mixed images do not depend on how many
    ranks share a batch. No generator is carried from step to step.
    """

    def __init__(self, settings: ClassifierSettings, classes: int, seed: int) -> None:
        self.settings, self.classes, self.seed = settings, classes, seed
        self._timm: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
        if settings.mixes:
            from timm.data import Mixup

            self._timm = Mixup(
                mixup_alpha=settings.mixup,
                cutmix_alpha=settings.cutmix,
                prob=settings.mix_prob,
                switch_prob=settings.cutmix_prob,
                mode="batch",
                label_smoothing=settings.label_smoothing,
                num_classes=classes,
            )

    def __call__(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Images (B, 3, s, s) and class numbers (B,) of a step -> images, with every pair's two halves apart, and
        targets (B, classes) in their order; B is even where anything is mixed."""
        if self._timm is None:
            return images, smoothed(labels, self.classes, self.settings.label_smoothing)
        # timm mixes the first image with the last, the second with the last but one, ...: neighbors go to such places.
        order = torch.arange(len(images), device=images.device)
        order = torch.cat([order[0::2], order[1::2].flip(0)])
        with _numpy_seeded((self.seed, step, _STREAM)):
            return self._timm(images[order], labels[order])


def smoothed(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Class numbers (B,) -> targets (B, classes): 1 - smoothing for the class, the rest evenly over all."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


class _numpy_seeded:  # noqa: N801  a context, named as what is true within it
    """Within it NumPy's global generator, from which timm draws, is seeded; afterwards it is as it was."""

    def __init__(self, seed: tuple[int, ...]) -> None:
        self._seed = np.random.SeedSequence(seed).generate_state(4)

    def __enter__(self) -> None:
        self._before: Any = np.random.get_state()
        np.random.seed(self._seed)

    def __exit__(self, *_: Any) -> None:
        np.random.set_state(self._before)
