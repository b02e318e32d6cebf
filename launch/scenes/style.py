"""How the demo's scenes look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Range = tuple[float, float]

BACKGROUNDS = {"noise": 0.25, "even": 0.05, "grating": 0.25, "gradient": 0.15, "blobs": 0.15, "checks": 0.15}
"""Kinds of background and how often each is drawn."""


@dataclass(frozen=True)
class Style:
    """How scenes look.

    Attributes:
        digit_height: height of the digit before rotation, as a share of the frame.
        aspect: factor on the digit's width (log-uniform).
        rotation: largest rotation either way, in degrees.
        shear: largest horizontal shear either way, in widths per height.
        shift: share of the room around the digit that its place uses; 0 = always centered, 1 = anywhere.
        polarity: share of scenes with light ink on a dark background.
        contrast: difference between the mean luminances of ink and background, of 1.
        texture: strength of the textures of background and ink; 0 = flat colors, 1 = half ranges of up to
            45 % and 20 % of the contrast.
        color: saturation; 0 = gray scenes, 1 = as saturated as the luminance allows.
        clutter: most pieces of clutter in a scene (the number is uniform in 0..clutter).
        noise: standard deviation of the pixel noise, of 1.
        backgrounds: kinds of BACKGROUNDS to draw from.

    Raises:
        ValueError: an unknown background, or a range out of bounds.
    """

    digit_height: Range = (0.55, 0.8)
    aspect: Range = (0.8, 1.2)
    rotation: float = 15.0
    shear: float = 0.2
    shift: float = 0.75
    polarity: float = 0.5
    contrast: Range = (0.4, 0.75)
    texture: float = 1.0
    color: float = 1.0
    clutter: int = 4
    noise: float = 0.02
    backgrounds: Sequence[str] = tuple(BACKGROUNDS)

    def __post_init__(self) -> None:
        for name, limit in (("digit_height", 1.0), ("contrast", 0.8)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= limit:
                raise ValueError(f"{name} is (low, high) with 0 < low <= high <= {limit}, not {(low, high)}")
        if not (0 <= self.polarity <= 1 and 0 <= self.texture <= 1):
            raise ValueError(f"polarity and texture lie in 0..1, not {self.polarity} and {self.texture}")
        if not self.backgrounds or not set(self.backgrounds) <= BACKGROUNDS.keys():
            raise ValueError(f"backgrounds are some of {', '.join(BACKGROUNDS)}, not {self.backgrounds}")


DEFAULT = Style()
