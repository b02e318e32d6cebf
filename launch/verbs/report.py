"""`nearfar report`: the page of a run, or of several beside each other."""

from __future__ import annotations

import argparse
import contextlib
import sys
from functools import partial
from pathlib import Path

from rich.console import Console

from nearfar.ssl.errors import UserError


def add_report(verbs: argparse._SubParsersAction) -> None:
    """Put `report` among the verbs of the `nearfar` command."""
    report = verbs.add_parser("report", help="write report.html: of a run, or a comparison of several")
    report.add_argument("run", type=Path, nargs="+", help="run folders, or folders of runs such as a sweep")
    report.add_argument(
        "--format", choices=["markdown", "latex"], help="of several runs: print tables for a paper, and write no page"
    )
    report.add_argument(
        "--out",
        type=Path,
        help="page of a comparison (default: report.html in the folder of runs, else comparison.html)",
    )
    report.set_defaults(verb=run_report)


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

        print(report_run(given[0], say=partial(print, file=sys.stderr)))
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
    from nearfar.eval.pages.paper_tables import latex, markdown
    from nearfar.eval.pages.report import write_report

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
