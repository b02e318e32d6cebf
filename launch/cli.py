"""The `nearfar` command. Every verb is a few lines over a function that can be called without it.

Nothing here imports torch, numpy or what needs them before a verb runs: help and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from nearfar.launch import failures
from nearfar.launch.slurm.cli import add_launch
from nearfar.launch.streams import outliving_their_reader
from nearfar.launch.verbs.adapt import ADAPT
from nearfar.launch.verbs.command_line import (
    Parser,
    ShowVersion,
    add_model,
    add_reading,
    add_settings,
    check_verb,
    refuse_leftover,
    require_paths,
)
from nearfar.launch.verbs.distill import DISTILL
from nearfar.launch.verbs.eval import add_eval
from nearfar.launch.verbs.export import add_export
from nearfar.launch.verbs.features import add_features
from nearfar.launch.verbs.finetune import FINETUNE, add_predict
from nearfar.launch.verbs.training import PRETRAIN
from nearfar.ssl.errors import EXIT_PEER, EXIT_USER, PeerError, UserError

EXIT_BUG = 1
# Spin iterations before an idle thread of libgomp (torch's on Linux) sleeps: about half a millisecond. Its own
# 300,000 outlast the time slice of whatever else wants the core (docs/performance.md).
SPINS = "10000"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Exit codes: 0 done (or stopped on request, saved), 1 a bug in nearfar, 2 a mistake of the user's or
    a machine that refused, 3 another rank of the run ended, 130 a hard Ctrl-C."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS  # read when torch is loaded; processes started from here inherit it
    with outliving_their_reader():
        try:
            arguments = parsed(sys.argv[1:] if argv is None else argv)
            logging.basicConfig(format="%(message)s")
            logging.getLogger("nearfar").setLevel(logging.INFO)
            require_paths(arguments)
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


VERBS = (
    "demo", "pretrain", "adapt", "replay", "distill", "finetune", "predict", "features", "eval", "export", "report",
    "data", "launch",
)  # fmt: skip


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
    DISTILL.add_to(verbs)
    FINETUNE.add_to(verbs)
    add_predict(verbs)

    features = verbs.add_parser("features", help="write the frozen features of a folder of images")
    add_model(features)
    add_features(features)
    add_reading(features)

    add_eval(verbs)

    add_export(verbs)

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

    PRETRAIN.add_to(verbs)
    ADAPT.add_to(verbs)

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
    if not arguments.record.is_dir():
        raise UserError(f"{arguments.record} does not exist. Give a run's folder, or its not_finite/step-XXXXXXXXX.")
    from nearfar.ssl.data import open_source
    from nearfar.ssl.replay import replay, settings_of
    from nearfar.ssl.run import failed_step

    saved = failed_step.read(arguments.record)
    source = open_source(arguments.data or settings_of(saved).data.path)
    for line in replay(saved, source, arguments.device, arguments.precision):
        print(line)


def run_report(arguments: argparse.Namespace) -> None:
    from nearfar.eval.pages.compare import runs_in
    from nearfar.eval.run_files import require_run

    given: list[Path] = arguments.run
    for run in given:
        require_run(run)
    if len(given) == 1 and ((given[0] / "config.yaml").exists() or not runs_in(given[0])):
        if arguments.format or arguments.out:
            raise UserError("--format and --out are for several runs: name them, or a folder of runs.")
        from nearfar.launch.scoring.report import report_run  # loads torch, which a comparison does not need

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
    from nearfar.eval.pages.compare import compare, comparison_table
    from nearfar.eval.pages.comparison_page import write_comparison
    from nearfar.eval.pages.report import write_report
    from nearfar.eval.pages.seeds import latex, markdown

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
    from nearfar.launch.verbs import data as data_verbs
    from nearfar.ssl.data.beton_writer import BetonOptions

    options = BetonOptions(arguments.max_side or None, arguments.quality, arguments.raw_side, arguments.min_side)
    stop = arguments.on_bad == "stop"
    data_verbs.beton(
        arguments.source, arguments.out, options,
        stop_at_bad=stop, workers=arguments.workers, overwrite=arguments.force, console=Console(),
    )  # fmt: skip


def run_info(arguments: argparse.Namespace) -> None:
    from nearfar.launch.verbs import data as data_verbs

    data_verbs.info(arguments.file, Console())


def run_check(arguments: argparse.Namespace) -> None:
    from nearfar.launch.verbs import data as data_verbs

    data_verbs.check(arguments.source, min_side=arguments.min_side, workers=arguments.workers, console=Console())


def run_look(arguments: argparse.Namespace) -> None:
    from nearfar.launch.scoring.data_look import LookOptions, look

    options = LookOptions(
        arguments.most, arguments.clusters, arguments.duplicate, arguments.size, arguments.device, arguments.workers
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


if __name__ == "__main__":
    sys.exit(main())
