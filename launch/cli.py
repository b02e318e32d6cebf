"""The `nearfar` command. Every verb is a few lines over a function that can be called without it.

Nothing here imports torch, numpy or what needs them before a verb runs: help and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from nearfar.launch import failures
from nearfar.launch.command_line import (
    HelpWithSettings,
    Parser,
    ShowVersion,
    add_settings,
    check_verb,
    refuse_leftover,
)
from nearfar.launch.finetune_verbs import add_finetuning
from nearfar.launch.recipes import bundled, find_recipe
from nearfar.launch.slurm.cli import add_launch
from nearfar.launch.streams import outliving_their_reader
from nearfar.ssl.errors import EXIT_PEER, EXIT_USER, PeerError, UserError

if TYPE_CHECKING:
    from nearfar.ssl.backbones import Backbone

EXIT_BUG = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Exit codes: 0 done (or stopped on request, saved), 1 a bug in nearfar, 2 a mistake of the user's or
    a machine that refused, 3 another rank of the run ended, 130 a hard Ctrl-C."""
    with outliving_their_reader():
        try:
            arguments = parsed(sys.argv[1:] if argv is None else argv)
            logging.basicConfig(format="%(message)s")
            logging.getLogger("nearfar").setLevel(logging.INFO)
            arguments.verb(arguments)
            sys.stdout.flush()
        except UserError as error:
            return _refuse(str(error))
        except PeerError as error:
            return _refuse(str(error), EXIT_PEER)
        except KeyboardInterrupt:
            return 130
        except Exception as error:
            if told := failures.explain(error):
                return _refuse(told)
            print(failures.report_of(error), file=sys.stderr)
            return EXIT_BUG
    return 0


def _refuse(paragraph: str, code: int = EXIT_USER) -> int:
    failures.tell(paragraph)
    return code


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The parsed command line. Raises SystemExit after printing the usage and a hint."""
    parser, words = build_parser(), list(argv)
    check_verb(parser, words, VERBS)
    arguments, left = parser.parse_known_args(words)
    if left:
        refuse_leftover(words, left)
    return arguments


VERBS = ("demo", "pretrain", "replay", "finetune", "predict", "features", "eval", "export", "report", "data", "launch")


def build_parser() -> Parser:
    parser = Parser(
        prog="nearfar",
        description="Self-supervised pretraining for vision, and what the frozen features are worth.",
        epilog="Start with `nearfar demo`. `nearfar VERB --help` explains a verb; `nearfar pretrain --help` lists "
        "every setting.",
    )
    parser.add_argument(
        "--version", action=ShowVersion, nargs=0, help="show the versions of nearfar and what it builds on, and exit"
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    _add_training(verbs)
    add_finetuning(verbs)

    features = verbs.add_parser("features", help="write the frozen features of a folder of images")
    _add_model(features)
    features.add_argument(
        "data", help="images: class folders, a flat folder, a .txt list, an .npz, a .beton or .tar shards"
    )
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
    report.add_argument("run", type=Path, nargs="+", help="run folders, or folders of runs such as a sweep")
    report.add_argument(
        "--format", choices=["markdown", "latex"], help="of several runs: print a table for a paper, and write no page"
    )
    report.add_argument(
        "--out",
        type=Path,
        help="page of a comparison (default: report.html in the folder of runs, else comparison.html)",
    )
    report.set_defaults(verb=run_report)

    data = verbs.add_parser(
        "data", help="write images as a .beton for the ffcv loader; show what one holds; find bad images; look at them"
    )
    _add_data(data.add_subparsers(required=True, metavar="WHAT"))
    add_launch(verbs)
    return parser


def _add_training(verbs: argparse._SubParsersAction) -> None:
    demo = verbs.add_parser("demo", help="pretrain and score on drawn scenes: minutes, no download")
    demo.add_argument("--seed", type=int, default=0, help="seed of scenes, weights and views (default 0)")
    add_settings(demo)
    demo.set_defaults(verb=run_demo)

    pretrain = verbs.add_parser(
        "pretrain",
        help="train a backbone on images without labels; the same command continues it",
        add_help=False,
    )
    pretrain.add_argument("-h", "--help", action=HelpWithSettings, nargs=0, help="show this and every setting")
    pretrain.add_argument("recipe", help=f"a .yaml file, or the name of a bundled one: {', '.join(bundled())}")
    pretrain.add_argument(
        "--dry-run",
        action="store_true",
        help="train nothing: show every setting with its reason, sizes, and an estimate of time, memory and disk",
    )
    add_settings(pretrain)
    pretrain.set_defaults(verb=run_pretrain)

    replay = verbs.add_parser("replay", help="compute a step that was not finite again, and name what failed first")
    replay.add_argument("record", type=Path, help="RUN/not_finite/step-XXXXXXXXX, or the run's folder for its newest")
    replay.add_argument("--data", help="training images, if they were moved (default: data.path of the run)")
    replay.add_argument("--device", choices=["auto", "cpu", "cuda"], help="where to compute (default: as the run)")
    replay.add_argument(
        "--precision", choices=["auto", "bf16", "fp16", "fp32"], help="in which numbers (default: as the run)"
    )
    replay.set_defaults(verb=run_replay)


def run_demo(arguments: argparse.Namespace) -> None:
    from nearfar.launch.demo import demo

    demo(arguments.seed, arguments.settings, Console())


def run_replay(arguments: argparse.Namespace) -> None:
    from nearfar.ssl import failed_step
    from nearfar.ssl.data import open_source
    from nearfar.ssl.replay import replay, settings_of

    saved = failed_step.read(arguments.record)
    source = open_source(arguments.data or settings_of(saved).data.path)
    for line in replay(saved, source, arguments.device, arguments.precision):
        print(line)


def run_pretrain(arguments: argparse.Namespace) -> None:
    from nearfar.ssl import config

    run = config.load(find_recipe(arguments.recipe), arguments.settings)
    config.require_images(run)  # here too: before torch is loaded
    if arguments.dry_run:
        from nearfar.launch.dry_run import dry_run

        dry_run(run, Console())
    else:
        from nearfar.launch.pretrain import run_pretraining

        run_pretraining(run, Console())


def run_features(arguments: argparse.Namespace) -> None:
    from nearfar.eval.images import Decoding
    from nearfar.eval.store import FeatureStore
    from nearfar.launch.computing import by_all_ranks, compute_for
    from nearfar.launch.progress import progress, summed
    from nearfar.launch.score import Subject, protocol_of
    from nearfar.ssl.data import open_source

    subject, source = Subject.of(arguments.model), open_source(arguments.data)
    size, resize, layer, pooling = (getattr(arguments, name) for name in ("size", "resize", "layer", "pooling"))
    compute = compute_for(subject.backbone, arguments.device)

    def write(decoding: Decoding) -> None:
        placed = subject.on(compute)
        reading = protocol_of(placed, size=size, resize=resize, layer=layer, pooling=pooling).pooled
        with progress(len(source), f"Reading {arguments.data}", Console()) as tell:
            decoding = replace(decoding, progress=summed(tell))
            features = FeatureStore.write(arguments.out, placed.backbone, source, reading, decoding)
        bad = features.manifest["bad"]
        print(f"{arguments.out}: {features.x.shape} {features.x.dtype}, {len(bad)} unreadable images")
        for name, why in list(bad.items())[:3]:
            _note(f"Left out: {name}: {why}")

    by_all_ranks(
        write, lambda: [subject.on(compute).backbone], [source], Decoding(workers=arguments.workers), arguments.device
    )


def run_eval(arguments: argparse.Namespace) -> None:
    from nearfar.eval.store import is_store

    tasks = None if arguments.what == "all" else (arguments.what,)
    if is_store(arguments.model):
        _eval_features(arguments, tasks)
    else:
        _eval_model(arguments, tasks)


def _eval_features(arguments: argparse.Namespace, tasks: tuple[str, ...] | None) -> None:
    from nearfar.launch.score import score_features
    from nearfar.ssl.device import choose

    if not arguments.val:
        raise UserError(f"{arguments.model} holds features to learn from: name those to score with --val.")
    score_features(
        arguments.model, Path(arguments.val), tasks=tasks, head=arguments.head, file=arguments.out, console=Console(),
        device=choose(arguments.device, "fp32", 0, "--device ").device,
    )  # fmt: skip


def _eval_model(arguments: argparse.Namespace, tasks: tuple[str, ...] | None) -> None:
    from nearfar.eval.images import Decoding
    from nearfar.launch.computing import by_all_ranks, compute_for
    from nearfar.launch.report import report_run
    from nearfar.launch.score import ScoreOptions, Subject, protocol_of, score, sources, untrained

    subject = Subject.of(arguments.model)
    train, val = sources(subject.run, arguments.train, arguments.val)
    given: dict[str, Any] = {"size": arguments.size, "resize": arguments.resize, "head": arguments.head}
    if arguments.what == "linear" and arguments.layer:
        given["linear_layers"] = tuple(arguments.layer.split(","))
    else:
        given["grid_layer" if arguments.what == "segment" else "layer"] = arguments.layer
    given["grid_size"] = tuple(arguments.grid_size) if arguments.grid_size else None
    compute = compute_for(subject.backbone, arguments.device)

    def score_it(decoding: Decoding) -> None:
        placed = subject.on(compute)
        protocol = protocol_of(placed, **given)
        options = ScoreOptions(arguments.baselines, arguments.out, protocol, arguments.classes, decoding)
        reported = placed.is_run and not arguments.out
        try:
            score(placed, train, val, tasks=tasks, options=options, console=Console())
        except UserError:
            if reported:
                with contextlib.suppress(UserError):  # of the scores that there are; what went wrong first is told
                    report_run(placed.folder, placed)
            raise
        if reported:
            report_run(placed.folder, placed)

    def backbones() -> list[Backbone]:
        placed = subject.on(compute)
        return [placed.backbone, *([untrained(placed)] if arguments.baselines else [])]

    images = [train.source, val.source]
    by_all_ranks(score_it, backbones, images, Decoding(workers=arguments.workers), arguments.device)


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
    from nearfar.eval.compare import runs_in

    given: list[Path] = arguments.run
    if len(given) == 1 and ((given[0] / "config.yaml").exists() or not runs_in(given[0])):
        if arguments.format or arguments.out:
            raise UserError("--format and --out are for several runs: name them, or a folder of runs.")
        from nearfar.launch.report import report_run  # loads torch, which a comparison does not need

        print(report_run(given[0]))
        return
    for folder in given:
        if not (folder / "config.yaml").exists() and not runs_in(folder):
            raise UserError(
                f"{folder} is neither a run nor a folder of runs (no config.yaml in it or one level below)."
            )
    page = given[0] / "report.html" if len(given) == 1 else Path("comparison.html")
    runs = [run for each in given for run in ([each] if (each / "config.yaml").exists() else runs_in(each))]
    _compare(runs, arguments.out or page, arguments.format)


def _compare(runs: list[Path], page: Path, text_format: str | None) -> None:
    from nearfar.eval.compare import compare, comparison_table
    from nearfar.eval.comparison_page import write_comparison
    from nearfar.eval.report import write_report
    from nearfar.eval.seeds import latex, markdown

    found, console = compare(runs), Console()
    if text_format:
        print(latex(found) if text_format == "latex" else markdown(found))
        return
    console.print(comparison_table(found, console))
    for run in runs:
        if not (run / "report.html").exists():
            with contextlib.suppress(UserError):  # the comparison names what cannot be read
                write_report(run)
    for note in found.notes:
        _note(note)
    print(write_comparison(runs, page))


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


def run_look(arguments: argparse.Namespace) -> None:
    from nearfar.launch.data_look import LookOptions, look

    options = LookOptions(
        arguments.most, arguments.clusters, arguments.duplicate, arguments.size, arguments.device, arguments.workers
    )
    look(arguments.source, arguments.weights, arguments.out, options, Console())


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
    evaluate.add_argument(
        "--head", choices=["linear", "mlp"], default="linear", help="head of the segmentation probe (default linear)"
    )
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
        "--most", type=int, default=5000, help="look at this many images, evenly spread, of more (default 5000)"
    )
    look.add_argument("--clusters", type=int, help="number of clusters (default: that of the classes, else 10)")
    look.add_argument(
        "--duplicate", type=float, default=0.98, help="cosine from which images are near duplicates (default 0.98)"
    )
    look.add_argument("--size", type=int, help="side of the image in pixels (default: eval.size of the run)")
    look.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    look.add_argument("--workers", type=int, help="threads or processes that decode images (default: by cores)")
    look.set_defaults(verb=run_look)


def _add_model(parser: argparse.ArgumentParser, also: str = "") -> None:
    parser.add_argument("model", type=Path, help=f"run folder, checkpoint folder or exported .safetensors{also}")


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=int, help="side of the image in pixels (default: eval.size of the run)")
    parser.add_argument("--resize", type=int, help="shorter side before the center crop (default: eval.resize)")
    parser.add_argument(
        "--layer",
        help="final, last-block or blocks-N (default: final; last-block for segmentation, as LocAt reads it); for "
        "`eval linear` also several, as in final,blocks-4, of which held-out training images choose one",
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="where to compute (default auto: a GPU if there is one, else the CPU)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        help="threads or processes that decode images; 0: the main process does (default: by cores and device)",
    )


if __name__ == "__main__":
    sys.exit(main())
