"""Sides of images in whole patches. Imports nothing."""


def whole_patches(side: float, patch: int) -> int:
    """The multiple of `patch` that is nearest to a side in pixels, at least one."""
    return max(1, round(side / patch)) * patch
