"""Images that are not where a path says: told with what is there instead, before anything slow is imported."""

from __future__ import annotations

import os
from pathlib import Path

from nearfar.ssl.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def require_path(path: str | Path) -> None:
    """Raises UserError where nothing is at a path, with what the nearest folder that exists holds."""
    path = Path(os.path.expanduser(path))
    if not os.path.exists(path):  # Path.exists raises for a name too long to be one
        parent = next(folder for folder in path.absolute().parents if os.path.isdir(folder))
        raise UserError(f"There is nothing at {path}. The nearest folder that exists is {parent}: {found_in(parent)}")


def found_in(root: Path) -> str:
    """What lies in a folder, for a message about what does not."""
    try:
        names = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(root))
    except OSError as error:
        return f"what it holds cannot be read ({error.strerror})."
    if not names:
        return "the folder is empty."
    return (
        f"it holds {', '.join(names[:5])}{f' and {len(names) - 5} more' * (len(names) > 5)}. Images are files "
        f"that end in {', '.join(SUFFIXES)}."
    )
