"""`nearfar launch`: its flags, and what each does."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from nearfar.eval.results import TASKS
from nearfar.launch.recipes import bundled
from nearfar.launch.slurm import resources
from nearfar.launch.verbs.adapt import ADAPT
from nearfar.launch.verbs.command_line import Parser
from nearfar.launch.verbs.distill import DISTILL
from nearfar.launch.verbs.finetune import FINETUNE
from nearfar.launch.verbs.training_verb import PRETRAIN, TrainingVerb
from nearfar.ssl.errors import UserError
from nearfar.ssl.settings.messages import nearest

if TYPE_CHECKING:
    from nearfar.ssl.settings.finetune_settings import FinetuneRun
    from nearfar.ssl.settings.run import Run

CLUSTERS = ("auto", "slurm", "local", "debug")
CONTROLS = ("status", "cancel", "logs", "resubmit")
TRAINING = (PRETRAIN, ADAPT, DISTILL, FINETUNE)


def add_launch(verbs: Any) -> None:
    """Put `launch` among the verbs of the `nearfar` command."""
    verbs.add_parser("launch", help="train on a SLURM cluster: submit, status, logs, cancel, resubmit")
    verbs.choices["launch"] = LaunchParser()  # in its place: what follows is one of TRAINING, of CONTROLS, or a recipe


class LaunchParser(Parser):
    """Delegates to the parser for the word after `launch`; settings may stand before or after the flags."""

    def __init__(self) -> None:
        super().__init__(prog="nearfar launch")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        words = list(args or [])
        if words[:1] and words[0] in CONTROLS:
            return control_parser(words[0]).parse_args(words[1:], namespace), []
        named = next((verb for verb in TRAINING if words[:1] == [verb.name]), None)
        if named is None:
            return submit_parser(PRETRAIN, "nearfar launch").parse_known_intermixed_args(words, namespace)
        return submit_parser(named, f"nearfar launch {named.name}").parse_known_intermixed_args(words[1:], namespace)


def submit_parser(training: TrainingVerb, prog: str) -> argparse.ArgumentParser:
    """Of what `training` takes, and of the flags of a job."""
    others = " | ".join(verb.name for verb in TRAINING)
    parser = Parser(
        prog=prog,
        description=f"Train as `nearfar {training.name}` does, as a job that survives preemption, time limits and dead "
        f"nodes, or as an array of jobs. `nearfar launch {others}` takes what that verb takes; without one it is "
        "pretrain.",
        epilog="Afterwards: nearfar launch " + " | ".join(f"{verb} RUN" for verb in CONTROLS),
    )
    training.add_subject(parser)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings, such as train.epochs=20")
    parser.add_argument(
        "--cluster",
        choices=CLUSTERS,
        default="auto",
        help="slurm; local: processes of this machine, in the foreground; debug: what a job does, in this process; "
        "auto (default): slurm where it is installed, else local",
    )
    parser.add_argument("--site", type=Path, help="YAML with defaults for these flags (~/.config/nearfar/slurm.yaml)")
    parser.add_argument("--dry-run", action="store_true", help="print what sbatch would be given, and submit nothing")
    parser.add_argument("--then", metavar="eval=A,B", help=f"score the run when it is finished: {', '.join(TASKS)}")
    parser.add_argument("--sweep", nargs="+", metavar="key=a,b", help="a run for every combination, as one array")
    parser.add_argument("--parallel", type=int, help="runs of a sweep at the same time (default: all)")
    resources.add_flags(parser)
    parser.set_defaults(verb=run_launch, training=training)
    return parser


def control_parser(verb: str) -> argparse.ArgumentParser:
    parser = Parser(prog=f"nearfar launch {verb}")
    parser.add_argument(
        "run",
        type=Path,
        nargs="?" if verb == "status" else None,
        default=Path("runs"),
        help="folder of a run or a sweep",
    )
    if verb == "status":
        parser.add_argument("--json", action="store_true", help="print a list of objects for other programs")
    if verb == "logs":
        parser.add_argument(
            "-f", "--follow", action="store_true", help="keep printing until the job has left the queue"
        )
        parser.add_argument("--eval", action="store_true", help="show the log of the evaluation, not of the training")
    if verb == "resubmit":
        resources.add_flags(parser)
    actions = {"status": run_status, "cancel": run_cancel, "logs": run_logs, "resubmit": run_resubmit}
    parser.set_defaults(verb=actions[verb])
    return parser


def run_launch(arguments: argparse.Namespace) -> None:
    from nearfar.launch.slurm import queue

    cluster = arguments.cluster
    if cluster == "auto":
        cluster = "slurm" if queue.installed() or arguments.dry_run else "local"
    then = evaluations(arguments.then)
    folder, runs = _runs(arguments)
    if then and not all(run.data.val for run in runs):
        raise UserError("--then eval=... needs labeled images: set data.val=.")
    if arguments.parallel is not None and (not arguments.sweep or arguments.parallel < 1):
        raise UserError("--parallel is the number of runs of a --sweep at the same time: 1 or more.")
    if cluster == "slurm":
        _launch_on_slurm(arguments, folder, runs, then)
        return
    from nearfar.launch.slurm import local_cluster

    given, debug, console = resources.given(arguments), cluster == "debug", Console()
    if arguments.dry_run:
        local_cluster.describe_runs(runs, given, then, console)
    else:
        local_cluster.launch(runs, given, then, debug=debug, console=console)


def _runs(arguments: argparse.Namespace) -> tuple[Path, list[Run | FinetuneRun]]:
    """The folder of the run or the sweep, and the runs."""
    from nearfar.launch.slurm import sweep

    training: TrainingVerb = arguments.training
    if training is PRETRAIN:
        _refuse_misspelled_verb(arguments.recipe, known=bool(arguments.start_from))
    recipe, settings = training.recipe_and_settings(arguments)
    if not arguments.sweep:
        run = training.load(recipe, settings)
        return run.path, [run]
    folder, runs = sweep.runs(lambda more: training.load(recipe, [*settings, *more]), arguments.sweep)
    if (folder / "config.yaml").exists():
        raise UserError(f"{folder} holds a run; a sweep needs a folder of its own: choose another name=.")
    return folder, runs


def _refuse_misspelled_verb(recipe: str, known: bool) -> None:
    known = known or recipe in bundled() or recipe in bundled(supervised=True) or Path(recipe).exists()
    if not known and (near := nearest(recipe, [*CONTROLS, *(verb.name for verb in TRAINING)])):
        raise UserError(f"`nearfar launch` has no verb '{recipe}', and it is no recipe; did you mean {near}?")


def _launch_on_slurm(
    arguments: argparse.Namespace, folder: Path, runs: list[Run | FinetuneRun], then: tuple[str, ...]
) -> None:
    from nearfar.launch.slurm import checks

    share = resources.load(arguments.site, resources.given(arguments))
    placed = [checks.placed(run, share) for run in runs]
    from nearfar.launch.slurm import submission  # loads torch

    runs = [submission.for_cluster(run, share) for run in placed]
    requested = submission.Submission(folder.expanduser().absolute(), runs, share, then, arguments.parallel)
    if arguments.dry_run:
        submission.describe_jobs(requested, Console())
    else:
        submission.submit(requested, Console())


def run_status(arguments: argparse.Namespace) -> None:
    from nearfar.launch.slurm import control, status

    found = status.statuses(control.run_folders(arguments.run))
    if arguments.json:
        print(status.as_json(found))
    elif len(found) == 1:
        print("\n".join(status.lines_of_one(found[0])))
    else:
        print("\n".join(status.lines_of_several(found, Console().width)))


def run_cancel(arguments: argparse.Namespace) -> None:
    from nearfar.launch.slurm import control

    control.cancel(control.run_folders(arguments.run), Console())


def run_logs(arguments: argparse.Namespace) -> None:
    from nearfar.launch.slurm import control

    runs = control.run_folders(arguments.run)
    if len(runs) > 1:
        raise UserError(f"{arguments.run} holds {len(runs)} runs: name one of them, such as {runs[0]}.")
    control.logs(runs[0], arguments.follow, "eval" if arguments.eval else "train")


def run_resubmit(arguments: argparse.Namespace) -> None:
    from nearfar.launch.slurm import control

    control.resubmit(control.run_folders(arguments.run), resources.given(arguments), Console())


def evaluations(text: str | None) -> tuple[str, ...]:
    """`eval=knn,linear` -> ("knn", "linear")."""
    if text is None:
        return ()
    what, sign, names = text.partition("=")
    chosen = tuple(names.split(","))
    if what != "eval" or not sign or not set(chosen) <= set(TASKS):
        raise UserError(f"--then {text}: write eval= and any of {', '.join(TASKS)}, separated by commas.")
    return chosen
