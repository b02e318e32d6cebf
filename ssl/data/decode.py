"""An image file -> an upright 8-bit RGB Pillow image, or the reason why not. Alpha is dropped, as in torchvision."""

import os
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from nearfar.ssl.errors import BadImage

_ORIENTATION = 0x0112
# The formats accepted. Pillow would recognize others by their content, and start Ghostscript for an EPS.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


def decode(file: str | Path | IO[bytes], name: str) -> Image.Image:
    """Decode a file into an upright RGB image, 16-bit gray scaled (not clipped) to 8 bits. Raises BadImage."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            if why := size_problem(image.height, image.width, min_side=1):
                raise BadImage(name, why)
            image.load()
            return upright(image, name)
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything, from SyntaxError up
        raise BadImage(name, _reason(error, file)) from error


def upright(image: Image.Image, name: str) -> Image.Image:
    """A loaded image turned by its EXIF orientation, 8-bit RGB. Raises BadImage."""
    if not is_upright(image):
        return _rgb(ImageOps.exif_transpose(image), name)
    return _rgb(image, name)


def size_problem(height: int, width: int, min_side: int) -> str | None:
    """Why an image of this size, in pixels, is bad; None where it is not. The one rule of loaders and writers."""
    if min(height, width) < min_side:
        return f"{width} x {height} pixels, below data.min_side = {min_side}"
    if Image.MAX_IMAGE_PIXELS and height * width > Image.MAX_IMAGE_PIXELS:
        return f"{width} x {height} pixels are more than Pillow considers safe"
    return None


def is_upright(image: Image.Image) -> bool:
    """Whether an image needs no turning by its EXIF orientation."""
    return bool(image.getexif().get(_ORIENTATION, 1) == 1)


def _reason(error: Exception, file: str | Path | IO[bytes]) -> str:
    if isinstance(file, str | Path) and os.path.isfile(file) and os.path.getsize(file) == 0:
        return "the file is empty (zero bytes)"
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    return str(error) or type(error).__name__


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # convert() would clip at 255
        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise BadImage(name, f"integer pixels from {pixels.min()} to {pixels.max()}, beyond 16 bits")
        return Image.fromarray(np.rint(pixels / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadImage(name, "floating-point pixels, whose range is unknown")
    if "transparency" in image.info:  # Pillow warns where it goes straight to RGB
        image = image.convert("RGBA")
    return image.convert("RGB")


def decode_path(path: str, name: str) -> Image.Image:
    """As `decode`, for a path: only regular files are opened."""
    _regular(path, name)
    return decode(path, name)


def read_path(path: str, name: str) -> bytes:
    """The bytes of a regular file. Raises BadImage."""
    _regular(path, name)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BadImage(name, str(error)) from error


def _regular(path: str, name: str) -> None:
    if not os.path.isfile(path):  # a missing file, or a pipe, on which open() would hang
        raise BadImage(name, "no such file" if not os.path.exists(path) else "not a regular file")
