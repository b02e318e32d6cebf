"""The `nearfar` command. Every verb is a few lines over a function that can be called without it.

Nothing here imports torch, numpy or what needs them before a verb runs: help and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from nearfar.launch import failures
from nearfar.launch.slurm.cli import add_launch
from nearfar.launch.streams import outliving_their_reader
from nearfar.launch.verbs.adapt import ADAPT
from nearfar.launch.verbs.command_line import (
    Parser,
    ShowVersion,
    check_verb,
    refuse_leftover,
)
from nearfar.launch.verbs.data import add_data
from nearfar.launch.verbs.demo import add_demo
from nearfar.launch.verbs.distill import DISTILL
from nearfar.launch.verbs.eval import add_eval
from nearfar.launch.verbs.export import add_export
from nearfar.launch.verbs.features import add_features
from nearfar.launch.verbs.finetune import FINETUNE, add_predict
from nearfar.launch.verbs.paths import require_paths
from nearfar.launch.verbs.replay import add_replay
from nearfar.launch.verbs.report import add_report
from nearfar.launch.verbs.training_verb import PRETRAIN
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
            if message := failures.explain(error):
                return _refuse(message)
            print(failures.report_of(error), file=sys.stderr)
            return EXIT_BUG
    return 0


def _refuse(paragraph: str, code: int = EXIT_USER) -> int:
    failures.print_paragraph(paragraph)
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
    add_demo(verbs)
    PRETRAIN.add_to(verbs)
    ADAPT.add_to(verbs)
    add_replay(verbs)
    DISTILL.add_to(verbs)
    FINETUNE.add_to(verbs)
    add_predict(verbs)
    add_features(verbs)
    add_eval(verbs)
    add_export(verbs)
    add_report(verbs)
    add_data(verbs)
    add_launch(verbs)
    return parser


if __name__ == "__main__":
    sys.exit(main())
