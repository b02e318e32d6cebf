"""`nearfar replay`: a step that was not finite, computed again."""

from __future__ import annotations

import argparse
from pathlib import Path

from nearfar.ssl.errors import UserError


def add_replay(verbs: argparse._SubParsersAction) -> None:
    """Put `replay` among the verbs of the `nearfar` command."""
    replay = verbs.add_parser("replay", help="compute a step that was not finite again, and name what failed first")
    replay.add_argument("record", type=Path, help="RUN/not_finite/step-XXXXXXXXX, or the run's folder for its newest")
    replay.add_argument("--data", help="training images, if they were moved (default: data.path of the run)")
    replay.add_argument("--device", choices=["auto", "cpu", "cuda"], help="where to compute (default: as the run)")
    replay.add_argument(
        "--precision", choices=["auto", "bf16", "fp16", "fp32"], help="in which numbers (default: as the run)"
    )
    replay.set_defaults(verb=run_replay)


def run_replay(arguments: argparse.Namespace) -> None:
    if not arguments.record.exists():
        raise UserError(f"{arguments.record} does not exist. Give a run's folder, or its not_finite/step-XXXXXXXXX.")
    from nearfar.ssl.data import open_source
    from nearfar.ssl.replay import replay, settings_of
    from nearfar.ssl.run import failed_step

    saved = failed_step.read(arguments.record)
    source = open_source(arguments.data or settings_of(saved).data.path)
    for line in replay(saved, source, arguments.device, arguments.precision):
        print(line)
