"""A .beton written, what is in one, and the images of a data set that cannot be used."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from rich.console import Console

from nearfar.launch.progress import progress
from nearfar.ssl.data import libjpeg, open_source
from nearfar.ssl.data.beton_writer import BetonOptions, WrittenBeton, write_beton
from nearfar.ssl.data.decode import size_problem
from nearfar.ssl.data.sources.base import Source, passed_over
from nearfar.ssl.data.sources.beton import TYPE_NAMES, BetonSource
from nearfar.ssl.data.sources.files import kinds_of
from nearfar.ssl.errors import BadImage, UserError
from nearfar.ssl.wording import printable

_SHOWN = 20  # bad images listed on the screen


def beton(
    source: str, out: Path, options: BetonOptions, *, stop_at_bad: bool, workers: int, overwrite: bool, console: Console
) -> WrittenBeton:
    """Write the images of a path as a .beton; bad ones are listed. Raises UserError as `write_beton`."""
    images = open_source(source)
    with progress(len(images), f"Writing {out.name}", console) as done:
        written = write_beton(
            images, out, options, stop_at_bad=stop_at_bad, workers=workers, overwrite=overwrite, progress=done
        )
    _list(written.bad, console)
    _list_passed_over(images, console)
    _say(
        f"{out}: {written.images:,} images ({written.unchanged:,} JPEGs as they were, {written.encoded:,} encoded, "
        f"{written.raw:,} as pixels), {out.stat().st_size / 2**20:,.1f} MiB; {len(written.bad):,} left out as bad",
        console,
    )
    return written


def info(path: Path, console: Console) -> None:
    """What a .beton holds."""
    source = BetonSource(path)
    height, width = source.size[:, 0], source.size[:, 1]
    raw = int(source.records["image"]["mode"].sum())
    lines = [
        f"{path}: {len(source):,} images, {path.stat().st_size / 2**20:,.1f} MiB",
        f"fields   {', '.join(f'{name} ({TYPE_NAMES[kind]})' for name, kind in source.fields.items())}",
        f"kept     {len(source) - raw:,} as JPEG, {raw:,} as pixels",
        f"size     width {width.min()} to {width.max()}, height {height.min()} to {height.max()}, "
        f"mean {width.mean():.0f} x {height.mean():.0f} pixels",
    ]
    if source.labels is not None:
        named = f", named {', '.join(source.classes[:5])} ..." if source.classes else ""
        lines.append(f"labels   {len(np.unique(source.labels)):,} classes{named}")
    if source.about:
        about, left_out = source.about, source.about.get("bad", [])
        lines.append(
            f"written  max_side {about.get('max_side')}, quality {about.get('quality')}, raw_side "
            f"{about.get('raw_side')}; {len(left_out) if isinstance(left_out, list) else '?'} bad images left out"
        )
    lines += [f"first    {source.name(0)}", f"print    {source.fingerprint}"]
    for line in lines:
        _say(line, console)


def check(path: str, *, min_side: int, workers: int, console: Console) -> None:
    """List the images (and masks) that a run with this `data.min_side` cannot use; raises UserError if there are any.

    Files that are skipped because of their type are counted and named, and are no error.
    """
    source = open_source(path)
    bad = []
    try:
        with (
            progress(len(source), f"Checking {path}", console) as done,
            ThreadPoolExecutor(max(1, workers)) as pool,
        ):
            for i, problem in enumerate(pool.map(lambda i: _problem(source, i, min_side), range(len(source)))):
                bad += [problem] if problem else []
                done(i + 1)
    except MemoryError as error:
        raise UserError(f"There is not enough memory to check {path}: allow fewer --workers.") from error
    _list(bad, console)
    _list_passed_over(source, console)
    if bad:
        raise UserError(f"{len(bad):,} of the {len(source):,} images in {path} cannot be used.")
    _say(f"{path}: all {len(source):,} images can be read", console)


def _problem(source: Source, i: int, min_side: int) -> tuple[str, str] | None:
    try:
        image = source.read(i)
        if why := size_problem(image.height, image.width, min_side):
            return source.name(i), why
        source.mask(i)
        if isinstance(source, BetonSource) and not source.raw(i) and libjpeg.available():
            height, width = source.size[i].tolist()  # as the ffcv loader will decode it
            pixels = np.empty(3 * height * width, np.uint8)
            libjpeg.Decoder().decode(source.checked(i), pixels, height, width, 3 * width)
    except BadImage as error:
        return error.name, error.why
    except libjpeg.JPEGError as error:
        return source.name(i), str(error)
    return None


def _list(bad: list[tuple[str, str]], console: Console) -> None:
    for name, why in bad[:_SHOWN]:
        _say(f"bad  {name}: {why}", console)
    if len(bad) > _SHOWN:
        _say(f"bad  ... and {len(bad) - _SHOWN:,} more", console)


def _list_passed_over(source: Source, console: Console) -> None:
    if names := passed_over(source):
        _say(f"skipped because of their type  {kinds_of(names)}", console)


def _say(line: str, console: Console) -> None:
    console.print(printable(line), highlight=False, markup=False, soft_wrap=True)
