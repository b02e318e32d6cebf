"""The `nearfar` command. Every verb is a few lines over a function that can be called without it."""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from nearfar.launch.recipes import bundled, find_recipe
from nearfar.launch.slurm.cli import add_launch
from nearfar.ssl.errors import EXIT_PEER, PeerError, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Exit codes: 0 done (or stopped on request, saved), 2 a mistake of the user's, 3 another
    rank of the run ended, 130 a hard Ctrl-C."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("nearfar").setLevel(logging.INFO)
    try:
        arguments.verb(arguments)
    except UserError as error:
        return _refuse(str(error))
    except PeerError as error:
        return _refuse(str(error), EXIT_PEER)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" at {error.filename}" if error.filename else ""
        return _refuse(
            f"No space left on the disk{where}. Checkpoints saved before are intact: free some space and start the "
            "same command again."
        )
    except KeyboardInterrupt:
        return 130
    return 0


def _refuse(paragraph: str, code: int = 2) -> int:
    Console(stderr=True).print(f"nearfar: {paragraph}", highlight=False, markup=False, soft_wrap=True)
    return code


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nearfar",
        description="Self-supervised pretraining for vision, and what the frozen features are worth.",
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    demo = verbs.add_parser("demo", help="pretrain and score on drawn scenes, in minutes, without a download")
    demo.add_argument("--seed", type=int, default=0, help="of scenes, weights and views (default 0)")
    _add_settings(demo)
    demo.set_defaults(verb=run_demo)

    pretrain = verbs.add_parser(
        "pretrain",
        help="train a backbone on images without labels; the same command continues it",
        add_help=False,
    )
    pretrain.add_argument("-h", "--help", action=_HelpWithSettings, nargs=0, help="show this and every setting")
    pretrain.add_argument("recipe", help=f"a .yaml file, or the name of a bundled one: {', '.join(bundled())}")
    _add_settings(pretrain)
    pretrain.set_defaults(verb=run_pretrain)

    features = verbs.add_parser("features", help="write the frozen features of a folder of images")
    _add_model(features)
    features.add_argument("data", help="images: class folders, a flat folder, a .txt list or an .npz")
    features.add_argument("out", type=Path, help="folder to write")
    _add_reading(features)
    features.add_argument("--pooling", help="cls, mean, cls+mean or grid (default: head.pooling of the run)")
    features.set_defaults(verb=run_features)

    _add_eval(verbs)

    export = verbs.add_parser("export", help="write the teacher backbone as one self-describing safetensors file")
    _add_model(export)
    export.add_argument("out", type=Path, help="file to write, NAME.safetensors")
    export.set_defaults(verb=run_export)

    report = verbs.add_parser("report", help="write report.html: of a run, or a comparison of several")
    report.add_argument("run", type=Path, help="run folder, or a folder of runs such as a sweep")
    report.set_defaults(verb=run_report)

    data = verbs.add_parser("data", help="write images as a .beton for the ffcv loader; look into one; find bad images")
    _add_data(data.add_subparsers(required=True, metavar="WHAT"))
    add_launch(verbs)
    return parser


def run_demo(arguments: argparse.Namespace) -> None:
    from nearfar.launch.demo import demo

    demo(arguments.seed, arguments.settings, Console())


def run_pretrain(arguments: argparse.Namespace) -> None:
    from nearfar.launch.pretrain import pretrain
    from nearfar.ssl import config

    pretrain(config.load(find_recipe(arguments.recipe), arguments.settings), Console())


def run_features(arguments: argparse.Namespace) -> None:
    from nearfar.eval.features import Decoding
    from nearfar.eval.store import FeatureStore
    from nearfar.launch.progress import progress, summed
    from nearfar.launch.score import Subject, protocol_of
    from nearfar.ssl.data import open_source

    subject, source = Subject.of(arguments.model), open_source(arguments.data)
    size, resize, layer, pooling = (getattr(arguments, name) for name in ("size", "resize", "layer", "pooling"))
    reading = protocol_of(subject, size=size, resize=resize, layer=layer, pooling=pooling).pooled
    with progress(len(source), f"Reading {arguments.data}", Console()) as tell:
        decoding = Decoding(workers=arguments.workers, progress=summed(tell))
        features = FeatureStore.write(arguments.out, subject.backbone, source, reading, decoding)
    bad = features.manifest["bad"]
    print(f"{arguments.out}: {features.x.shape} {features.x.dtype}, {len(bad)} unreadable images")
    for name, why in list(bad.items())[:3]:
        _note(f"Left out: {name}: {why}")


def run_eval(arguments: argparse.Namespace) -> None:
    from nearfar.eval.features import Decoding
    from nearfar.launch.report import report_run
    from nearfar.launch.score import ScoreOptions, Subject, protocol_of, score, score_features, sources

    tasks = None if arguments.what == "all" else (arguments.what,)
    if (arguments.model / "manifest.json").is_file() and not (arguments.model / "tensors.safetensors").is_file():
        if not arguments.val:
            raise UserError(f"{arguments.model} holds features to learn from: name those to score with --val.")
        score_features(
            arguments.model, Path(arguments.val), tasks=tasks, head=arguments.head, file=arguments.out,
            console=Console(),
        )  # fmt: skip
        return
    subject = Subject.of(arguments.model)
    train, val = sources(subject.run, arguments.train, arguments.val)
    given = {"size": arguments.size, "resize": arguments.resize, "head": arguments.head}
    given["grid_layer" if arguments.what == "segment" else "layer"] = arguments.layer
    given["grid_size"] = tuple(arguments.grid_size) if arguments.grid_size else None
    options = ScoreOptions(
        arguments.baselines,
        arguments.out,
        protocol_of(subject, **given),
        arguments.classes,
        Decoding(workers=arguments.workers),
    )
    try:
        score(subject, train, val, tasks=tasks, options=options, console=Console())
    finally:
        if subject.is_run and not arguments.out:
            report_run(subject.folder, subject)


def run_export(arguments: argparse.Namespace) -> None:
    from nearfar.ssl import checkpoint

    if arguments.out.suffix != ".safetensors":
        raise UserError(
            f"{arguments.out} would hold safetensors, whatever its name says: name it "
            f"{arguments.out.with_suffix('.safetensors')}."
        )
    state = checkpoint.about(arguments.model)
    checkpoint.export(arguments.out, checkpoint.load(arguments.model), state)
    print(f"{arguments.out}: {state['arch']['name']} of step {state['step']}")


def run_report(arguments: argparse.Namespace) -> None:
    from nearfar.eval.compare import compare, runs_in, table, write_comparison
    from nearfar.eval.report import write_report

    if (arguments.run / "config.yaml").exists() or not (runs := runs_in(arguments.run)):
        from nearfar.launch.report import report_run  # loads torch, which a comparison does not need

        print(report_run(arguments.run))
        return
    found, console = compare(runs), Console()
    console.print(table(found, console))
    for run in runs:
        if not (run / "report.html").exists():
            with contextlib.suppress(UserError):  # the comparison names what cannot be read
                write_report(run)
    for note in found.notes:
        _note(note)
    print(write_comparison(arguments.run))


def _note(text: str) -> None:
    Console().print(text, highlight=False, markup=False, soft_wrap=True)


def run_beton(arguments: argparse.Namespace) -> None:
    from nearfar.launch import data_verbs
    from nearfar.ssl.data.beton_writer import BetonOptions

    options = BetonOptions(arguments.max_side or None, arguments.quality, arguments.raw_side, arguments.min_side)
    stop = arguments.on_bad == "stop"
    data_verbs.beton(
        arguments.source, arguments.out, options,
        stop_at_bad=stop, workers=arguments.workers, overwrite=arguments.force, console=Console(),
    )  # fmt: skip


def run_info(arguments: argparse.Namespace) -> None:
    from nearfar.launch import data_verbs

    data_verbs.info(arguments.file, Console())


def run_check(arguments: argparse.Namespace) -> None:
    from nearfar.launch import data_verbs

    data_verbs.check(arguments.source, min_side=arguments.min_side, workers=arguments.workers, console=Console())


def _add_eval(verbs: argparse._SubParsersAction) -> None:
    evaluate = verbs.add_parser(
        "eval",
        help="score frozen features: knn, linear, segment or all that the images allow",
        description="Score frozen features. k-NN and linear probe need labels: class folders, or a list with a label "
        "after a tab. Segmentation needs masks: 8-bit PNGs of class numbers from 0, 255 = ignore, in a folder `masks` "
        "beside `images`, with the images' names. Scores are added to results.json; none is ever removed.",
    )
    evaluate.add_argument("what", choices=["knn", "linear", "segment", "all"])
    _add_model(evaluate, ", or features to learn from, as `nearfar features` writes them")
    evaluate.add_argument("--train", help="images to learn from (default: data.path of the run)")
    evaluate.add_argument("--val", help="images, or features, to score (default: data.val of the run)")
    evaluate.add_argument("--baselines", action="store_true", help="also score the untrained network and raw pixels")
    evaluate.add_argument("--head", choices=["linear", "mlp"], default="linear", help="of the segmentation probe")
    evaluate.add_argument(
        "--classes",
        type=int,
        help="number of mask classes (default: a classes.txt beside `images`, or what masks hold)",
    )
    evaluate.add_argument(
        "--grid-size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="size of the whole image for segmentation, in pixels (default: that of the first image)",
    )
    evaluate.add_argument("--out", type=Path, help="results file (default: results.json beside the weights)")
    _add_reading(evaluate)
    evaluate.set_defaults(verb=run_eval)


def _add_data(verbs: argparse._SubParsersAction) -> None:
    beton = verbs.add_parser("beton", help="write the images of a source as one .beton file")
    beton.add_argument("source", help="images: class folders, a flat folder, a .txt list, an .npz or .tar shards")
    beton.add_argument("out", type=Path, help="file to write, NAME.beton")
    beton.add_argument("--max-side", type=int, default=512, help="shrink longer images to this (0: never; default 512)")
    beton.add_argument("--quality", type=int, default=95, help="of JPEGs that have to be made (default 95)")
    beton.add_argument(
        "--raw-side", type=int, default=64, help="keep images up to this side as pixels, JPEGs aside (default 64)"
    )
    beton.add_argument("--min-side", type=int, default=8, help="data.min_side of the runs to come (default 8)")
    beton.add_argument("--on-bad", choices=["skip", "stop"], default="skip", help="a bad image: leave it out, or stop")
    beton.add_argument("--force", action="store_true", help="write over a file that is there")
    beton.add_argument("--workers", type=int, default=2, help="threads (default 2)")
    beton.set_defaults(verb=run_beton)
    info = verbs.add_parser("info", help="tell what a .beton holds")
    info.add_argument("file", type=Path)
    info.set_defaults(verb=run_info)
    check = verbs.add_parser("check", help="decode every image and list those that cannot be used")
    check.add_argument("source", help="images, as for beton, or a .beton")
    check.add_argument("--min-side", type=int, default=8, help="data.min_side of the runs to come (default 8)")
    check.add_argument("--workers", type=int, default=2, help="threads (default 2)")
    check.set_defaults(verb=run_check)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings, such as train.epochs=20")


def _add_model(parser: argparse.ArgumentParser, also: str = "") -> None:
    parser.add_argument("model", type=Path, help=f"run folder, checkpoint folder or exported .safetensors{also}")


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=int, help="side of the image in pixels (default: eval.size of the run)")
    parser.add_argument("--resize", type=int, help="shorter side before the center crop (default: eval.resize)")
    parser.add_argument(
        "--layer", help="final, last-block or blocks-N (default: final; last-block for segmentation, as LocAt reads it)"
    )
    parser.add_argument("--workers", type=int, default=0, help="decoding processes (default 0: in this one)")


class _HelpWithSettings(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        print(parser.format_help() + "\n" + _settings_help())
        parser.exit()


def _settings_help() -> str:
    from nearfar.ssl import config

    width = shutil.get_terminal_size().columns
    lines = ["settings (key=value, or sections of the recipe; 'derived' follows the data and the length of the run):"]
    for setting in config.settings():
        default = "derived" if setting.default is None else setting.default
        lines.append(f"  {setting.key}={default}"[: width - 2])
        lines.append(f"      {setting.description} [{setting.type}]")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
