"""`nearfar data beton | info | check | look`: their flags, and the functions that do them."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console


def add_data(verbs: argparse._SubParsersAction) -> None:
    """Put `data` among the verbs of the `nearfar` command."""
    data = verbs.add_parser(
        "data", help="write images as a .beton for the ffcv loader; show what one holds; find bad images; look at them"
    )
    _add_data(data.add_subparsers(required=True, metavar="WHAT"))


def run_beton(arguments: argparse.Namespace) -> None:
    from nearfar.launch import data_sets
    from nearfar.ssl.data.beton_writer import BetonOptions

    options = BetonOptions(arguments.max_side or None, arguments.quality, arguments.raw_side, arguments.min_side)
    stop = arguments.on_bad == "stop"
    data_sets.beton(
        arguments.source, arguments.out, options,
        stop_at_bad=stop, workers=arguments.workers, overwrite=arguments.force, console=Console(),
    )  # fmt: skip


def run_info(arguments: argparse.Namespace) -> None:
    from nearfar.launch import data_sets

    data_sets.info(arguments.file, Console())


def run_check(arguments: argparse.Namespace) -> None:
    from nearfar.launch import data_sets

    data_sets.check(arguments.source, min_side=arguments.min_side, workers=arguments.workers, console=Console())


def run_look(arguments: argparse.Namespace) -> None:
    from nearfar.launch.scoring.data_look import LookOptions, look

    options = LookOptions(
        arguments.max_images,
        arguments.clusters,
        arguments.duplicate_cosine,
        arguments.size,
        arguments.device,
        arguments.workers,
    )
    look(arguments.source, arguments.weights, arguments.out, options, Console())


def _add_data(verbs: argparse._SubParsersAction) -> None:
    beton = verbs.add_parser("beton", help="write the images of a source as one .beton file")
    beton.add_argument("source", help="images: class folders, a flat folder, a .txt list, an .npz or .tar shards")
    beton.add_argument("out", type=Path, help="file to write, NAME.beton")
    beton.add_argument("--max-side", type=int, default=512, help="shrink longer images to this (0: never; default 512)")
    beton.add_argument("--quality", type=int, default=95, help="quality of JPEGs that have to be encoded (default 95)")
    beton.add_argument(
        "--raw-side", type=int, default=64, help="keep images up to this side as pixels, JPEGs aside (default 64)"
    )
    beton.add_argument("--min-side", type=int, default=8, help="data.min_side of the runs to come (default 8)")
    beton.add_argument(
        "--on-bad",
        choices=["skip", "stop"],
        default="skip",
        help="what to do at a bad image: leave it out (default), or stop",
    )
    beton.add_argument("--force", action="store_true", help="overwrite an existing file")
    beton.add_argument("--workers", type=int, default=2, help="threads (default 2)")
    beton.set_defaults(verb=run_beton)
    info = verbs.add_parser("info", help="show what a .beton holds")
    info.add_argument("file", type=Path)
    info.set_defaults(verb=run_info)
    check = verbs.add_parser("check", help="decode every image and list those that cannot be used")
    check.add_argument("source", help="images, as for beton, or a .beton")
    check.add_argument("--min-side", type=int, default=8, help="data.min_side of the runs to come (default 8)")
    check.add_argument("--workers", type=int, default=2, help="threads (default 2)")
    check.set_defaults(verb=run_check)
    _add_look(verbs)


def _add_look(verbs: argparse._SubParsersAction) -> None:
    look = verbs.add_parser(
        "look", help="write a page with a map of the images by features, clusters, near duplicates and outliers"
    )
    look.add_argument("source", help="images, as for beton, or a .beton; labels are shown, not needed")
    look.add_argument(
        "--weights", type=Path, required=True, help="run folder, checkpoint folder or exported .safetensors"
    )
    look.add_argument("--out", type=Path, default=Path("look.html"), help="page to write (default look.html)")
    look.add_argument(
        "--max-images", type=int, default=5000, help="look at this many images, evenly spread, of more (default 5000)"
    )
    look.add_argument("--clusters", type=int, help="number of clusters (default: that of the classes, else 10)")
    look.add_argument(
        "--duplicate-cosine",
        type=float,
        default=0.98,
        help="cosine from which images are near duplicates (default 0.98)",
    )
    look.add_argument("--size", type=int, help="side of the image in pixels (default: eval.size of the run)")
    look.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    look.add_argument("--workers", type=int, help="threads or processes that decode images (default: by cores)")
    look.set_defaults(verb=run_look)
