"""JPEG bytes -> RGB pixels by the libjpeg-turbo that FFCV is linked against, called through ctypes (without the GIL).

Not through FFCV's own `imdecode`: that one takes the fast, inexact DCT (up to 21 gray levels from Pillow on photos,
to which this is equal), reports an error but not which, trusts the size it is given, and keeps two decoders for every
thread that ever called it.
"""

import ctypes
import weakref
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nearfar.ssl.errors import UserError

_RGB = 0
_ACCURATE_DCT, _STOP_ON_WARNING, _LIMIT_SCANS = 4096, 8192, 32768  # the last against endless progressive files
_FLAGS = _ACCURATE_DCT | _STOP_ON_WARNING | _LIMIT_SCANS


class JPEGError(Exception):
    """What is wrong with the bytes."""


@cache
def _library() -> ctypes.CDLL | None:
    spec = find_spec("ffcv")  # finds without importing: FFCV pulls in OpenCV and all of its own loader
    if spec is None or not spec.submodule_search_locations:
        return None
    for folder in spec.submodule_search_locations:
        for suffix in EXTENSION_SUFFIXES:
            file = Path(folder) / f"_libffcv{suffix}"
            if file.is_file():
                try:
                    return _declare(ctypes.CDLL(str(file)))
                except OSError:  # its system libraries are missing
                    return None
    return None


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    handle, data, size, number = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_int
    library.tjInitDecompress.restype = handle
    library.tjInitDecompress.argtypes = []
    library.tjDestroy.argtypes = [handle]
    library.tjGetErrorStr2.restype = ctypes.c_char_p
    library.tjGetErrorStr2.argtypes = [handle]
    library.tjDecompressHeader3.argtypes = [handle, data, size, *[ctypes.POINTER(number)] * 4]
    library.tjDecompress2.argtypes = [handle, data, size, data, *[number] * 5]
    return library


def available() -> bool:
    """Whether FFCV and the libraries it needs are installed."""
    return _library() is not None


def require(what: str) -> None:
    """Raises UserError where FFCV is missing. `what`: what needs it, the subject of the message."""
    if not available():
        raise UserError(
            f"{what} needs FFCV, which is not installed here, or whose system libraries are missing. On Debian "
            "and Ubuntu: apt-get install libturbojpeg0-dev libopencv-dev pkg-config, then pip install 'nearfar[ffcv]'."
        )


class Decoder:
    """One decompressor; not for two threads at a time. Freed with the object.

    After an error it is replaced: libjpeg-turbo leaves it in the middle of the damaged file's header, and then
    refuses every good file that follows.
    """

    def __init__(self) -> None:
        library = _library()
        if library is None:
            raise RuntimeError("FFCV is not installed")
        self._library = library
        self._open()

    def _open(self) -> None:
        self._handle = self._library.tjInitDecompress()
        if not self._handle:
            raise MemoryError("libjpeg-turbo gave no decompressor")
        self._free = weakref.finalize(self, self._library.tjDestroy, self._handle)

    def size(self, jpeg: bytes) -> tuple[int, int]:
        """(height, width) in pixels, from the header. Raises JPEGError."""
        width, height, sampling, space = (ctypes.c_int() for _ in range(4))
        pointers = [ctypes.byref(number) for number in (width, height, sampling, space)]
        if self._library.tjDecompressHeader3(self._handle, jpeg, len(jpeg), *pointers):
            raise self._error()
        return height.value, width.value

    def decode(self, jpeg: bytes, out: NDArray[np.uint8], height: int, width: int, pitch: int) -> None:
        """Decode an image of a known size into contiguous `out`, whose rows begin `pitch` bytes apart.

        Raises JPEGError for anything but a clean file of this size: libjpeg's warnings (bytes missing, codes that do
        not exist) are errors here, since what it makes up in their place is not the image.
        """
        found = self.size(jpeg)
        if found != (height, width):
            raise JPEGError(f"its JPEG header says {found[1]} x {found[0]} pixels instead of {width} x {height}")
        if pitch < 3 * width or out.nbytes < height * pitch:
            raise ValueError(f"{width} x {height} pixels do not fit into {out.nbytes} bytes")
        address = out.ctypes.data
        if self._library.tjDecompress2(self._handle, jpeg, len(jpeg), address, width, pitch, height, _RGB, _FLAGS):
            raise self._error()

    def _error(self) -> JPEGError:
        text: bytes = self._library.tjGetErrorStr2(self._handle)
        self._free()
        self._open()
        return JPEGError(text.decode("utf-8", "replace").strip() or "libjpeg-turbo cannot decode it")
