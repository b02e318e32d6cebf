"""`nearfar features`: the frozen features of images, as a store and, if asked for, as a table."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from nearfar.launch.verbs.command_line import add_model, add_reading
from nearfar.ssl.wording import printable


def add_features(verbs: argparse._SubParsersAction) -> None:
    """Put `features` among the verbs of the `nearfar` command."""
    parser = verbs.add_parser("features", help="write the frozen features of a folder of images")
    add_model(parser)
    parser.add_argument(
        "data", help="images: class folders, a flat folder, a .txt list, an .npz, a .beton or .tar shards"
    )
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--pooling", help="cls, mean, cls+mean or grid (default: head.pooling of the run)")
    parser.add_argument(
        "--format",
        choices=["npy", "csv", "parquet"],
        default="npy",
        help="csv or parquet: also a table of names, labels and features in the folder (default npy: the store alone)",
    )
    add_reading(parser)
    parser.set_defaults(verb=run_features)


def run_features(arguments: argparse.Namespace) -> None:
    from nearfar.eval.features import feature_files
    from nearfar.eval.features.images import Decoding
    from nearfar.eval.features.store import FeatureStore
    from nearfar.launch.computing import by_all_ranks, compute_for
    from nearfar.launch.progress import progress, summed
    from nearfar.launch.scoring.score import Subject, protocol_of
    from nearfar.ssl.data import open_source

    subject, source = Subject.of(arguments.model), open_source(arguments.data)
    layers: list[str] = arguments.layer.split(",") if arguments.layer else []
    given = {"size": arguments.size, "resize": arguments.resize, "pooling": arguments.pooling}
    given["layer"] = layers[0] if layers else None
    if arguments.format != "npy":
        feature_files.check_table(arguments.format, arguments.pooling or subject.run.head.pooling)
    compute = compute_for(subject.backbone, arguments.device)

    def write(decoding: Decoding) -> None:
        placed = subject.on(compute)
        reading = protocol_of(placed, **given).pooled
        with progress(len(source), f"Reading {arguments.data}", Console()) as report:
            decoding = replace(decoding, progress=summed(report))
            if len(layers) < 2:
                stores = {arguments.out: FeatureStore.write(arguments.out, placed.backbone, source, reading, decoding)}
            else:
                found = feature_files.write_layers(arguments.out, placed.backbone, source, reading, layers, decoding)
                stores = {arguments.out / layer: features for layer, features in found.items()}
        for folder, features in stores.items():
            bad = features.manifest["bad"]
            _say(f"{folder}: {features.x.shape} {features.x.dtype}, {len(bad)} unreadable images")
            if arguments.format != "npy":
                _say(str(feature_files.write_table(folder, features, source, arguments.format)))
        for name, why in list(bad.items())[:3]:
            _say(f"Left out: {name}: {why}")

    by_all_ranks(
        write, lambda: [subject.on(compute).backbone], [source], Decoding(workers=arguments.workers), arguments.device
    )


def _say(text: str) -> None:
    Console().print(printable(text), highlight=False, markup=False, soft_wrap=True)
