"""A source -> a .beton (sources/beton.py describes the format), under a temporary name until it is complete.

Not through FFCV's DatasetWriter: it has no field for JPEG bytes that exist, needs to know beforehand how many images
are good, and waits forever when one of its processes dies. FFCV's Reader and Loader read what this writes.
"""

import contextlib
import glob
import hashlib
import json
import os
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from threading import local
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nearfar.ssl.data import libjpeg
from nearfar.ssl.data.decode import FORMATS, decode, is_upright, size_problem
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.data.sources.beton import (
    ABOUT,
    ALLOCATION,
    BYTES,
    FIELD,
    HEADER,
    IMAGE,
    INT,
    JPEG,
    JSON,
    RAW,
    RECORD,
    VERSION,
)
from nearfar.ssl.disk import file_lock, files
from nearfar.ssl.errors import BadImage, UserError

_PAGE = 2**23  # bytes; FFCV wants a sample on one page, and pages of a power of two from 2 MiB
_ABANDONED = 60.0  # seconds without a change after which an unlocked file is nobody's; a new one is locked at once


@dataclass
class WrittenBeton:
    """What became of the images of a source."""

    unchanged: int = 0  # JPEG bytes as they were
    encoded: int = 0  # as new JPEG bytes
    raw: int = 0  # as pixels
    bad: list[tuple[str, str]] = field(default_factory=list)  # name and reason of those left out

    @property
    def images(self) -> int:
        return self.unchanged + self.encoded + self.raw


@dataclass(frozen=True)
class BetonOptions:
    """How images are stored."""

    max_side: int | None = 512  # pixels; a larger image is shrunk (Pillow's antialiased bicubic)
    quality: int = 95  # of JPEGs that are made here
    raw_side: int = 64  # an image that is not a JPEG, and no longer than this, is kept as pixels
    min_side: int = 8  # data.min_side: an image with a shorter side is bad, and none is shrunk below it


@dataclass(frozen=True)
class _Sample:
    """An image ready to be written; `kind` is its counter in WrittenBeton."""

    kind: str
    data: bytes
    height: int
    width: int
    mask: bytes | None


def write_beton(
    source: Source,
    out: str | Path,
    options: BetonOptions = BetonOptions(),
    *,
    stop_at_bad: bool = False,
    workers: int = 1,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> WrittenBeton:
    """Write every image of `source` that can be read, in its order; returns what became of them.

    A JPEG that is upright, RGB or gray, within `max_side` and clean (libjpeg-turbo has no complaint) keeps its bytes.
    All else is decoded, turned upright, shrunk if need be, and encoded anew, or kept as pixels when small. `workers`
    threads do that; the file does not depend on them. `progress` is called with the number of images done.

    Raises UserError where FFCV is missing, `out` exists, no image can be read, or one cannot and `stop_at_bad` is set.
    """
    out = Path(out)
    libjpeg.require("Writing a .beton")
    if out.suffix != ".beton":
        raise UserError(f"{out} must end in .beton, by which the format is recognized.")
    if os.path.exists(out) and not overwrite:
        raise UserError(f"{out} exists already. Remove it, allow overwriting (--force), or choose another name.")
    if not os.path.isdir(out.absolute().parent):
        raise UserError(f"There is no folder {out.parent} to write {out.name} in.")
    try:
        _remove_abandoned(out)
        with files.atomic(out) as partial, partial.open("wb") as file:
            file_lock.acquire(file.fileno())
            return _write(file, source, options, stop_at_bad, workers, progress)
    except OSError as error:  # a folder that is read-only or full, a name that is too long
        raise UserError(f"{out} cannot be written: {error.strerror or error}.") from error
    except MemoryError as error:
        raise UserError(f"There is not enough memory to write {out}: allow fewer --workers.") from error


def _remove_abandoned(out: Path) -> None:
    """Remove what killed processes left of the same file, which may be large; a process that writes holds a lock."""
    for left in out.parent.glob(f"{glob.escape(files.partial_prefix(out))}*"):
        with contextlib.suppress(OSError), left.open("rb") as file:
            if time.time() - left.stat().st_mtime > _ABANDONED and file_lock.acquire(file.fileno()):
                left.unlink()


def _write(
    file: IO[bytes],
    source: Source,
    options: BetonOptions,
    stop_at_bad: bool,
    workers: int,
    progress: Callable[[int], None],
) -> WrittenBeton:
    kinds = {"image": IMAGE, "name": JSON}
    kinds |= {"label": INT} if source.labels is not None else {}
    kinds |= {"mask": BYTES} if _has_masks(source) else {}
    records = np.zeros(len(source), np.dtype([(name, RECORD[kind]) for name, kind in kinds.items()], align=True))
    begin = HEADER.itemsize + len(kinds) * FIELD.itemsize + records.nbytes
    pages = _Pages(file, -(-begin // _PAGE) * _PAGE)
    digest, written, n = hashlib.sha256(), WrittenBeton(), 0
    for i, sample in enumerate(_samples(source, options, "mask" in kinds, workers)):
        if isinstance(sample, BadImage):
            written.bad.append((sample.name, sample.why))
            if stop_at_bad:
                raise UserError(f"{sample}. Repair or remove it, or leave bad images out (--on-bad skip).")
        else:
            entry = {"name": source.name(i), "index": i, "crc": zlib.crc32(sample.data)}
            blocks = [sample.data, json.dumps(entry).encode() + b"\0", *([sample.mask] if sample.mask else [])]
            offsets = pages.put(n, blocks)
            mode = RAW if sample.kind == "raw" else JPEG
            records["image"][n] = (mode, sample.width, sample.height, offsets[0])
            records["name"][n] = (offsets[1], len(blocks[1]))
            if source.labels is not None:
                records["label"][n] = source.labels[i]
            if sample.mask:
                records["mask"][n] = (offsets[2], len(sample.mask))
            digest.update(b"".join(blocks))
            setattr(written, sample.kind, getattr(written, sample.kind) + 1)
            n += 1
        progress(i + 1)
    if n == 0:
        some = "; ".join(f"{name}: {why}" for name, why in written.bad[:5])
        raise UserError(f"None of the {len(source)} images can be read, so there is nothing to write: {some}.")

    about = {"classes": source.classes, "digest": digest.hexdigest(), "bad": written.bad[:1000], **vars(options)}
    block = json.dumps(about).encode()
    offset = pages.put_whole(block)
    table = pages.finish()
    header = np.array([(VERSION, len(kinds), _PAGE, n, table)], HEADER)
    file.seek(0)
    file.write(header.tobytes() + _descriptors(kinds, offset, len(block)) + records.tobytes())
    return written


def _has_masks(source: Source) -> bool:
    """Whether there are masks, by the first image whose mask can be read."""
    for i in range(len(source)):
        with contextlib.suppress(BadImage):
            return source.mask(i) is not None
    return False


def _descriptors(kinds: dict[str, int], about: int, size: int) -> bytes:
    fields = np.zeros(len(kinds), FIELD)
    for row, (name, kind) in zip(fields, kinds.items(), strict=True):
        row["type"] = kind
        row["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
        if name == "name":
            arguments = ABOUT + np.array([about, size], "<u8").tobytes()
            row["arguments"][: len(arguments)] = np.frombuffer(arguments, np.uint8)
    return fields.tobytes()


class _Pages:
    """Blocks of bytes, one after the other; those of a sample on the same page."""

    def __init__(self, file: IO[bytes], begin: int) -> None:
        self.file, self.at = file, begin
        self.allocations: list[tuple[int, int, int]] = []

    def put(self, sample: int, blocks: list[bytes]) -> list[int]:
        """Where each block begins in the file."""
        size = sum(map(len, blocks))
        if self.at % _PAGE + size > _PAGE:
            self.at = self._next_page()
        offsets = []
        self.file.seek(self.at)
        for block in blocks:
            self.file.write(block)
            offsets.append(self.at)
            self.allocations.append((sample, self.at, len(block)))
            self.at += len(block)
        return offsets

    def put_whole(self, block: bytes) -> int:
        """Where a block begins that belongs to no sample and may be longer than a page."""
        offset = self.at
        self.file.seek(offset)
        self.file.write(block)
        self.at += len(block)
        return offset

    def finish(self) -> int:
        """Fill up the last page and write the table; returns where that begins."""
        self.at = self._next_page()
        self.file.seek(self.at)
        self.file.write(np.array(self.allocations, ALLOCATION).tobytes())
        return self.at

    def _next_page(self) -> int:
        return -(-self.at // _PAGE) * _PAGE


def _samples(source: Source, options: BetonOptions, masks: bool, workers: int) -> Iterator[_Sample | BadImage]:
    """Every image of the source in order, prepared in threads a little ahead."""
    of_this_thread = local()

    def prepared(i: int) -> _Sample | BadImage:
        if not hasattr(of_this_thread, "decoder"):
            of_this_thread.decoder = libjpeg.Decoder()
        try:
            return _prepared(source, i, options, masks, of_this_thread.decoder)
        except BadImage as error:
            return error

    with ThreadPoolExecutor(max(1, workers)) as pool:
        ahead: deque[Future[_Sample | BadImage]] = deque()
        try:
            for i in range(len(source)):
                ahead.append(pool.submit(prepared, i))
                if len(ahead) > 4 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _prepared(source: Source, i: int, options: BetonOptions, masks: bool, decoder: libjpeg.Decoder) -> _Sample:
    data = source.encoded(i)
    kept = None if data is None else _clean_size(data, options, decoder)
    if kept is not None and data is not None:
        sample = _Sample("unchanged", data, *kept, _mask(source, i, kept) if masks else None)
        if _fits(sample):
            return sample
    image = source.read(i) if data is None else decode(BytesIO(data), source.name(i))
    if why := size_problem(image.height, image.width, options.min_side):
        raise BadImage(source.name(i), why)
    stored = _stored_size(*image.size, options)
    if stored != image.size:
        image = image.resize(stored, Image.Resampling.BICUBIC)
    size = (image.height, image.width)
    mask = _mask(source, i, size) if masks else None
    if max(size) <= options.raw_side and kept is None:
        return _Sample("raw", image.tobytes(), *size, mask)
    file = BytesIO()
    try:
        image.save(file, "JPEG", quality=options.quality)
    except OSError as error:  # a JPEG has at most 65,500 pixels a side
        raise BadImage(source.name(i), f"{image.width} x {image.height} pixels: {error}") from error
    sample = _Sample("encoded", file.getvalue(), *size, mask)
    if not _fits(sample):
        raise BadImage(source.name(i), f"more than {_PAGE:,} bytes even as a new JPEG: set max_side")
    return sample


def _stored_size(width: int, height: int, options: BetonOptions) -> tuple[int, int]:
    """(width, height) to keep: no side above `max_side`, but neither one shrunk below `min_side`."""
    long = max(width, height)
    if not options.max_side or long <= options.max_side:
        return width, height
    least = min(options.min_side, width, height)
    return max(least, round(width * options.max_side / long)), max(least, round(height * options.max_side / long))


def _fits(sample: _Sample) -> bool:
    return len(sample.data) + len(sample.mask or b"") + 2**14 <= _PAGE  # the rest is left for the name


def _clean_size(data: bytes, options: BetonOptions, decoder: libjpeg.Decoder) -> tuple[int, int] | None:
    """(height, width) of a JPEG that can be kept as it is; None for all else."""
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            if image.format != "JPEG" or image.mode not in ("RGB", "L") or not is_upright(image):
                return None
            if _stored_size(*image.size, options) != image.size:
                return None
            if size_problem(image.height, image.width, options.min_side):
                return None
            height, width = image.height, image.width
        decoder.decode(data, np.empty(height * width * 3, np.uint8), height, width, 3 * width)
        return height, width
    except (libjpeg.JPEGError, MemoryError):
        return None
    except Exception:  # Pillow's decoders raise nearly anything; `decode` will explain it
        return None


def _mask(source: Source, i: int, size: tuple[int, int]) -> bytes | None:
    mask: NDArray[np.uint8] | None = source.mask(i)
    if mask is None:
        raise BadImage(source.name(i), "it has no mask, but other images have one")
    image = Image.fromarray(mask)
    if mask.shape != size:  # the image was shrunk; classes cannot be mixed
        image = image.resize((size[1], size[0]), Image.Resampling.NEAREST)
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
