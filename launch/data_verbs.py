"""`nearfar data beton | info | check`: write a .beton, tell what is in one, find the images that cannot be used."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from rich.console import Console

from nearfar.launch.progress import progress
from nearfar.ssl.data import libjpeg
from nearfar.ssl.data.beton_writer import Form, Written, write_beton
from nearfar.ssl.data.sources.beton import TYPE_NAMES, BetonSource
from nearfar.ssl.data.sources.files import Source, open_source
from nearfar.ssl.errors import BadImage, UserError

_SHOWN = 20  # bad images listed on the screen


def beton(
    source: str, out: Path, form: Form, *, stop_at_bad: bool, workers: int, overwrite: bool, console: Console
) -> Written:
    """Write the images of a path as a .beton; bad ones are listed. Raises UserError as `write_beton`."""
    images = open_source(source)
    with progress(len(images), f"Writing {out.name}", console) as done:
        written = write_beton(
            images, out, form, stop_at_bad=stop_at_bad, workers=workers, overwrite=overwrite, progress=done
        )
    _list(written.bad, console)
    console.print(
        f"{out}: {written.images:,} images ({written.unchanged:,} JPEGs as they were, {written.encoded:,} encoded, "
        f"{written.raw:,} as pixels), {out.stat().st_size / 2**20:,.1f} MiB; {len(written.bad):,} left out as bad",
        highlight=False,
        soft_wrap=True,
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
        about = source.about
        lines.append(
            f"written  max_side {about.get('max_side')}, quality {about.get('quality')}, raw_side "
            f"{about.get('raw_side')}; {len(about.get('bad', [])):,} bad images left out"
        )
    lines += [f"first    {source.name(0)}", f"print    {source.fingerprint}"]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def check(path: str, *, workers: int, console: Console) -> None:
    """Decode every image (and mask) and list those that cannot be used; raises UserError if there are any."""
    source = open_source(path)
    bad = []
    with (
        progress(len(source), f"Checking {path}", console) as done,
        ThreadPoolExecutor(max(1, workers)) as pool,
    ):
        for i, problem in enumerate(pool.map(lambda i: _problem(source, i), range(len(source)))):
            bad += [problem] if problem else []
            done(i + 1)
    _list(bad, console)
    if bad:
        raise UserError(f"{len(bad):,} of the {len(source):,} images in {path} cannot be used.")
    console.print(f"{path}: all {len(source):,} images can be read", highlight=False, soft_wrap=True)


def _problem(source: Source, i: int) -> tuple[str, str] | None:
    try:
        source.read(i)
        source.mask(i)
        if isinstance(source, BetonSource) and not source.raw(i) and libjpeg.available():
            height, width = source.size[i].tolist()  # as the ffcv loader will decode it
            pixels = np.empty(3 * height * width, np.uint8)
            libjpeg.Decoder().decode(source.stored(i), pixels, height, width, 3 * width)
    except BadImage as error:
        return error.name, error.why
    except libjpeg.JPEGError as error:
        return source.name(i), str(error)
    return None


def _list(bad: list[tuple[str, str]], console: Console) -> None:
    for name, why in bad[:_SHOWN]:
        console.print(f"bad  {name}: {why}", highlight=False, markup=False, soft_wrap=True)
    if len(bad) > _SHOWN:
        console.print(f"bad  ... and {len(bad) - _SHOWN:,} more", highlight=False)
