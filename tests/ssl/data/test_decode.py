from __future__ import annotations

import contextlib
import io
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from nearfar.ssl.data.decode import decode, decode_path, size_problem
from nearfar.ssl.errors import BadImage


def scene(height: int = 24, width: int = 40, channels: int = 3, top: int = 256) -> NDArray[Any]:
    """Smooth, so that JPEG keeps it."""
    y, x = np.mgrid[:height, :width]
    planes = [(y * 4 + x * (c + 1)) % 200 for c in range(channels)]
    return (np.stack(planes, -1) * (top // 256)).astype(np.uint8 if top == 256 else np.uint16)


def stored(image: Image.Image, kind: str = "PNG", **options: Any) -> Any:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def read(file: Any) -> NDArray[Any]:
    image = decode(file, "it")
    assert image.mode == "RGB"
    return np.asarray(image)


def test_plain_rgb_is_untouched() -> None:
    np.testing.assert_array_equal(read(stored(Image.fromarray(scene()))), scene())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    """Oracle: the definition of the eight orientations, row 0 and column 0 on top / right / bottom / left."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    a = scene()
    upright = {
        1: a,
        2: a[:, ::-1],
        3: a[::-1, ::-1],
        4: a[::-1],
        5: a.transpose(1, 0, 2),
        6: a.transpose(1, 0, 2)[:, ::-1],
        7: a.transpose(1, 0, 2)[::-1, ::-1],
        8: a.transpose(1, 0, 2)[::-1],
    }[orientation]
    np.testing.assert_array_equal(read(stored(Image.fromarray(a), exif=exif)), upright)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind: str) -> None:
    deep = (np.arange(24 * 40).reshape(24, 40) * 68).astype(np.uint16)
    pixels = read(stored(Image.fromarray(deep), kind))
    np.testing.assert_array_equal(pixels[..., 0], np.rint(deep / 257).astype(np.uint8))
    assert pixels.max() > 250


def test_sixteen_bit_color_png_is_scaled() -> None:
    """Pillow cannot write one, so by hand."""
    deep = scene(4, 5, 3, 65536)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0))
    png += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    np.testing.assert_allclose(read(io.BytesIO(png)), deep / 257, atol=1)


def test_gray_cmyk_palette_and_alpha_become_rgb_without_a_warning() -> None:
    color, one = Image.fromarray(scene()), Image.fromarray(scene(channels=1)[..., 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(read(stored(one)), np.repeat(scene(channels=1), 3, -1))
        np.testing.assert_array_equal(read(stored(one.convert("1"))), np.asarray(one.convert("1").convert("RGB")))
        assert np.abs(read(stored(color.convert("CMYK"), "JPEG", quality=95)).astype(int) - scene()).mean() < 6
        palette = color.quantize(32)
        expected = np.asarray(palette.convert("RGB"))
        np.testing.assert_array_equal(read(stored(palette)), expected)
        np.testing.assert_array_equal(read(stored(palette, transparency=bytes(range(32)))), expected)
        np.testing.assert_array_equal(read(stored(palette, "GIF", transparency=3)), expected)
        alpha = np.concatenate([scene(), scene(channels=1)], -1)
        np.testing.assert_array_equal(read(stored(Image.fromarray(alpha))), scene())
        np.testing.assert_array_equal(read(stored(one.convert("LA"))), np.repeat(scene(channels=1), 3, -1))


def test_pixels_without_a_known_range_are_refused() -> None:
    with pytest.raises(BadImage, match="floating-point"):
        decode(stored(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"), "it")
    with pytest.raises(BadImage, match="beyond 16 bits"):
        decode(stored(Image.fromarray(np.full((8, 8), 70000, np.int32)), "TIFF"), "it")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_files_are_bad(kind: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = stored(Image.fromarray(noise), kind).getvalue()
    with pytest.raises(BadImage, match="it: "):
        decode(io.BytesIO(data[: int(len(data) * share)]), "it")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF"])
def test_damaged_files_are_read_or_bad_but_nothing_else(kind: str) -> None:
    data = bytearray(stored(Image.fromarray(scene(16, 16)), kind).getvalue())
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged = data.copy()
        for offset in rng.integers(0, len(data), 3):
            damaged[offset] = rng.integers(0, 256)
        with contextlib.suppress(BadImage):
            assert decode(io.BytesIO(damaged), "it").mode == "RGB"


def test_each_reason_is_told(tmp_path: Path) -> None:
    def why(name: str) -> str:
        with pytest.raises(BadImage) as caught:
            decode_path(str(tmp_path / name), name)
        assert caught.value.name == name
        return caught.value.why

    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("these are words, not pixels")
    (tmp_path / "folder.jpg").mkdir()
    assert "zero bytes" in why("empty.jpg")
    assert "not an image" in why("text.jpg")
    assert why("missing.jpg") == "no such file"
    assert why("folder.jpg") == "not a regular file"
    os.mkfifo(tmp_path / "pipe.jpg")
    assert why("pipe.jpg") == "not a regular file"  # and no waiting for a writer


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    file = stored(Image.fromarray(scene(30, 30)))
    for limit in (800, 300):  # where Pillow warns, and where it refuses
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        file.seek(0)
        with pytest.raises(BadImage, match="pixels"):
            decode(file, "it")


@pytest.mark.parametrize("kind", ["EPS", "PCX", "TGA", "SGI", "IM", "ICO", "JPEG2000", "AVIF"])
def test_formats_that_are_not_meant_are_bad_whatever_their_name(kind: str) -> None:
    """Pillow knows them by their content, and would start Ghostscript for the first."""
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow has no {kind}")
    with pytest.raises(BadImage, match="it: not an image of a known format"):
        decode(stored(Image.fromarray(scene()), kind), "it")


def test_the_rule_of_sizes() -> None:
    assert size_problem(8, 3000, 8) is None
    assert size_problem(5, 3000, 8) == "3000 x 5 pixels, below data.min_side = 8"
    assert size_problem(1, 1, 2) == "1 x 1 pixels, below data.min_side = 2"
    assert "safe" in str(size_problem(65535, 65535, 8))
