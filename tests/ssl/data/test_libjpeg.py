from __future__ import annotations

import contextlib
import gc
import io
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from PIL import Image

from nearfar.ssl.data import libjpeg

pytestmark = pytest.mark.skipif(not libjpeg.available(), reason="FFCV is not installed")


def jpeg(height: int = 48, width: int = 70, **options: bool | int) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", **options)
    return file.getvalue()


def decoded(data: bytes, height: int = 48, width: int = 70, pitch: int | None = None) -> NDArray[Any]:
    pitch = pitch or 3 * width
    out = np.zeros(height * pitch, np.uint8)
    libjpeg.Decoder().decode(data, out, height, width, pitch)
    return out.reshape(height, pitch)[:, : 3 * width].reshape(height, width, 3)


@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"quality": 20}]
)
def test_pixels_are_those_of_pillow(options: dict[str, Any]) -> None:
    data = jpeg(**options)
    expected = np.asarray(Image.open(io.BytesIO(data)))
    assert np.abs(decoded(data).astype(int) - expected).max() <= 2  # equal where Pillow has the same library
    assert np.abs(decoded(data, pitch=216).astype(int) - expected).max() <= 2
    assert libjpeg.Decoder().size(data) == (48, 70)


def test_gray_becomes_rgb() -> None:
    file = io.BytesIO()
    Image.open(io.BytesIO(jpeg())).convert("L").save(file, "JPEG")
    pixels = decoded(file.getvalue())
    assert (pixels[..., :1] == pixels).all()
    assert np.abs(pixels[..., 0].astype(int) - np.asarray(Image.open(file))).max() <= 2


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.9, 0.99])
def test_missing_bytes_are_an_error(share: float) -> None:
    data = jpeg()
    with pytest.raises(libjpeg.JPEGError):
        decoded(data[: int(len(data) * share)])


def test_mangled_bytes_are_an_error_or_an_image_but_nothing_else() -> None:
    data, rng, noticed = jpeg(), np.random.default_rng(0), 0
    for _ in range(200):
        damaged = bytearray(data)
        for offset in rng.integers(0, len(data), 5):
            damaged[offset] = rng.integers(0, 256)
        try:
            decoded(bytes(damaged))
        except libjpeg.JPEGError:
            noticed += 1
    assert noticed > 100


@pytest.mark.parametrize("size", [(47, 70), (48, 71), (96, 140), (24, 35)])
def test_another_size_than_promised_is_an_error(size: tuple[int, int]) -> None:
    with pytest.raises(libjpeg.JPEGError, match="header says 70 x 48"):
        decoded(jpeg(), *size)


def test_a_buffer_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        libjpeg.Decoder().decode(jpeg(), np.zeros(100, np.uint8), 48, 70, 210)


def test_decoders_are_freed() -> None:
    data = jpeg(400, 400)
    decoded(data, 400, 400)
    before = psutil.Process().memory_info().rss
    for _ in range(500):
        decoded(data, 400, 400)
    gc.collect()
    assert psutil.Process().memory_info().rss - before < 30 * 2**20


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libjpeg, "_library", lambda: None)
    assert not libjpeg.available()
    with pytest.raises(libjpeg.UserError, match=r"It needs FFCV.*apt-get install"):
        libjpeg.require("It")


def test_after_any_error_the_next_good_file_is_decoded() -> None:
    """One byte of the header at a time; before, some 597 of the 600 made the decoder refuse all that followed."""
    good, decoder, errors = jpeg(), libjpeg.Decoder(), 0
    expected = decoded(good).reshape(-1)
    for at in range(0, 600, 7):
        damaged = bytearray(good)
        damaged[at] ^= 0xFF
        out = np.zeros_like(expected)
        try:
            decoder.decode(bytes(damaged), out, 48, 70, 210)
        except libjpeg.JPEGError:
            errors += 1
        with contextlib.suppress(libjpeg.JPEGError):
            decoder.size(good[: at % 20])
        decoder.decode(good, out, 48, 70, 210)
        np.testing.assert_array_equal(out, expected)
    assert errors > 20
