"""`nearfar data look`: one page of what a network's features say about a data set, with labels or without."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from nearfar.eval.data_look import FEWEST, look_at
from nearfar.eval.features.extraction import extract
from nearfar.eval.features.images import Decoding
from nearfar.eval.pages.look_page import LookInputs, look_page
from nearfar.eval.pages.page import write_page
from nearfar.launch.computing import compute_for
from nearfar.launch.progress import progress, summed
from nearfar.launch.scoring.score import Subject, protocol_of
from nearfar.ssl.data import open_source
from nearfar.ssl.data.labels import class_descriptions
from nearfar.ssl.data.sources.base import Source, spread
from nearfar.ssl.errors import UserError
from nearfar.ssl.wording import counted, printable

_MOST_CLUSTERS = 50


@dataclass(frozen=True)
class LookOptions:
    """max_images: looked at, evenly spread where there are more. clusters: None = as many as classes, or 10.
    duplicate_cosine: from which on two images are near duplicates."""

    max_images: int = 5000
    clusters: int | None = None
    duplicate_cosine: float = 0.98
    size: int | None = None
    device: str = "auto"
    workers: int | None = None


def look(path: str, weights: Path, out: Path, options: LookOptions, console: Console) -> Path:
    """Read features of the images at a path, and write the page.

    Raises:
        UserError: no images, no weights, too few readable images, options out of range, or the page cannot be written.
    """
    _check(options)
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"The page cannot be written to {out}: name a file in a folder that exists, such as look.html.")
    subject, source = Subject.of(weights), open_source(path)
    subject = subject.on(compute_for(subject.backbone, options.device))
    seen = spread(source, options.max_images)
    if len(seen) < len(source):
        _say(f"Looking at {len(seen):,} of {len(source):,} images, evenly spread (--max-images).", console)
    with progress(len(seen), f"Reading {path}", console) as report:
        decoding = Decoding(workers=options.workers, progress=summed(report))
        features = extract(subject.backbone, seen, protocol_of(subject, size=options.size).pooled, decoding)
    found = look_at(features.x, clusters=options.clusters or _classes(seen), duplicate=options.duplicate_cosine)
    step = "" if subject.step is None else f", step {subject.step:,}"
    network = f"{subject.backbone.arch['name']} ({weights}{step})"
    bad, descriptions = features.manifest["bad"], class_descriptions(path)
    looked = LookInputs(path, seen, features.index, len(source), network, bad, descriptions)
    write_page(out, look_page(looked, found, options.duplicate_cosine))
    _say(
        f"{len(found.center)} clusters, {counted(found.duplicates, 'pair')} of near duplicates (cosine "
        f"{options.duplicate_cosine:g} or more), {len(looked.bad):,} unreadable images: {out}",
        console,
    )
    if found.doubt:
        _say(found.doubt, console)
    return out


def _check(options: LookOptions) -> None:
    if options.max_images < FEWEST:
        raise UserError(f"A look at a data set needs at least {FEWEST} images, not --max-images {options.max_images}.")
    if options.clusters is not None and not 2 <= options.clusters <= _MOST_CLUSTERS:
        raise UserError(f"--clusters must be between 2 and {_MOST_CLUSTERS}, not {options.clusters}.")
    if not 0 < options.duplicate_cosine <= 1:
        raise UserError(f"--duplicate-cosine is a cosine above 0 and at most 1, not {options.duplicate_cosine}.")


def _classes(source: Source) -> int:
    if source.labels is None:
        return 10
    return min(max(2, len(np.unique(source.labels))), 20)


def _say(line: str, console: Console) -> None:
    console.print(printable(line), highlight=False, markup=False, soft_wrap=True)
