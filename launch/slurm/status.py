"""The state of submitted runs, from the queue and the run folders. Imports no torch: it must answer at once."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nearfar.launch.slurm import queue, records
from nearfar.launch.slurm.queue import QueueEntry
from nearfar.launch.slurm.records import Attempt, AttemptEnd, Ending, Job
from nearfar.ssl.errors import UserError

_EPOCHS = re.compile(r"^train:[\s\S]*?\bepochs: *(\d+)", re.MULTILINE)  # to parse 64 YAML files takes a second


class Status(NamedTuple):
    """One run, as the queue and its folder tell together."""

    run: Path
    job: Job | None
    state: str
    why: str
    step: int
    steps: int | None
    loss: float | None
    last_step_at: float | None  # time.time() of the last line of metrics
    nodes: str
    seconds_left: float | None  # of this attempt, until the time limit
    attempts: list[Attempt]
    evaluation: str

    @property
    def lost(self) -> int:
        return sum(attempt.lost for attempt in self.attempts)


def statuses(runs: Sequence[Path]) -> list[Status]:
    """The state of each run. One query to the queue for all of them; where that fails, the folders alone are read."""
    last = {run: (records.latest_job(run, "train"), records.latest_job(run, "eval")) for run in runs}
    ids = [job.job for jobs in last.values() for job in jobs if job]
    try:
        found, trouble = queue.entries(ids), ""
    except UserError as error:
        found, trouble = {}, str(error)
    return [_status(run, *last[run], found, trouble) for run in runs]


def _status(run: Path, training: Job | None, scoring: Job | None, found: dict[str, QueueEntry], trouble: str) -> Status:
    metrics, ending = records.last_metrics(run, "loss"), records.read_ending(run)
    entry = found.get(training.job) if training else None
    attempts, ends = records.attempts(run), records.attempt_ends(run)
    state, why = combined(training, entry, ending, last_end(training, attempts, ends), trouble)
    evaluation, problem = "", ""
    scored = records.read_ending(run, "eval")
    if scoring and not (scored and scored.job == "none"):
        begun, over = records.attempts(run, "eval"), records.attempt_ends(run, "eval")
        evaluation, problem = combined(scoring, found.get(scoring.job), scored, last_end(scoring, begun, over), trouble)
    elif scored:
        evaluation, problem = scored.state, scored.why
    if evaluation == "failed":  # not where it was given up because training did not end well
        why = " ".join(part for part in (why, f"Evaluation: {problem}") if part)
    running = entry if entry and entry.active and training and entry.name == training.name else None
    return Status(
        run=run,
        job=training,
        state=state,
        why=why,
        step=max(records.saved_step(run), int(metrics.get("step", 0))),
        steps=_steps(run, metrics, ending),
        loss=metrics.get("loss"),
        last_step_at=metrics.get("time"),
        nodes=running.nodes if running else "",
        seconds_left=running.seconds_left if running else None,
        attempts=[attempt for attempt in attempts if training and attempt.job == training.job],
        evaluation=evaluation,
    )


def last_end(job: Job | None, attempts: Sequence[Attempt], ends: Sequence[AttemptEnd]) -> AttemptEnd | None:
    """What ended the job's newest attempt; None while that goes on, or where nobody could say."""
    begun = max((attempt.restart for attempt in attempts if job and attempt.job == job.job), default=0)
    last = next((end for end in reversed(ends) if job and end.job == job.job), None)
    return last if last and last.restart >= begun else None


def combined(
    job: Job | None, entry: QueueEntry | None, ending: Ending | None, last: AttemptEnd | None, trouble: str
) -> tuple[str, str]:
    """State and reason, from the queue while the job is in it, from the run's own records after that."""
    ending = ending if ending and (job is None or ending.job == job.job) else None
    recorded = last.why if last else ""
    why = ending.why if ending else recorded
    if entry and job and entry.name not in ("", job.name):
        entry = None  # another job: a new cluster counts from 1 again
    if entry and entry.active:
        return entry.state.lower(), ", ".join(part for part in (_waiting(entry), recorded) if part)
    if job and job.cancelled and not (ending and ending.state == "finished"):
        return "cancelled", ending.why if ending else ""
    if ending:
        return ending.state, why
    if job is None:
        return "not submitted", ""
    if entry:
        return entry.state.lower(), why or _WITHOUT_RECORD.get(entry.state, "it left no record of why: see the log")
    return "unknown", why or trouble or (
        "SLURM has forgotten the job, and it left no ending.json: killed, or never started"
    )  # fmt: skip


_WITHOUT_RECORD = {
    "OUT_OF_MEMORY": "it ran out of memory (--mem-gb)",
    "TIMEOUT": "its time limit ended it before it could save: an earlier signal (--signal-delay) or more --hours help",
    "NODE_FAIL": "a node failed, and SLURM was not to requeue it",
    "PREEMPTED": "SLURM preempted it without bringing it back: `nearfar launch resubmit` continues it",
    "CANCELLED": "cancelled, or what it depends on did not end well",
}


def _waiting(entry: QueueEntry) -> str:
    return entry.reason if entry.state == "PENDING" else ""


def _steps(run: Path, metrics: dict[str, Any], ending: Ending | None) -> int | None:
    if ending and ending.steps:
        return ending.steps
    file = run / "config.yaml"
    if not metrics.get("epoch") or not file.exists():
        return None
    epochs = _EPOCHS.search(file.read_text())
    return round(metrics["step"] / metrics["epoch"] * int(epochs[1])) if epochs else None


def as_json(all_of_them: Iterable[Status]) -> str:
    """A list with an object for each run; times in seconds."""
    now = time.time()
    return json.dumps(
        [
            {
                "run": str(status.run),
                "job": status.job.job if status.job else None,
                "verb": status.job.verb if status.job else None,
                "state": status.state,
                "why": status.why,
                "nodes": status.nodes,
                "seconds_left": status.seconds_left,
                "step": status.step,
                "steps": status.steps,
                "loss": status.loss,
                "seconds_since_last_step": None if status.last_step_at is None else round(now - status.last_step_at, 1),
                "attempts": len(status.attempts),
                "steps_lost": status.lost,
                "evaluation": status.evaluation,
                "log": str(status.job.log) if status.job else None,
            }
            for status in all_of_them
        ],
        indent=1,
    )


def lines_of_one(status: Status) -> Iterator[str]:
    """Everything about a run, a line each."""
    for label, value in _fields(status):
        yield f"{label:<11} {value}"


def _fields(status: Status) -> Iterator[tuple[str, str]]:
    yield "run", str(status.run)
    yield "state", status.state
    if status.why:
        yield "because", status.why
    if status.job:
        yield "job", f"{status.job.job} ({status.job.name}), runs nearfar {status.job.verb}"
        lost = f", {status.lost} steps done again" if status.lost else ""
        yield "attempts", f"{len(status.attempts)}{lost}"
    if status.nodes:
        yield "nodes", status.nodes
    if status.seconds_left is not None:
        yield "time left", short_duration(status.seconds_left)
    yield "step", f"{status.step}" + (f" of {status.steps}" if status.steps else "") + _age(status, ", ", " ago")
    if status.loss is not None:
        yield "loss", f"{status.loss:.4f}"
    if status.evaluation:
        yield "evaluation", status.evaluation
    if status.job:
        yield "log", str(status.job.log)


_COLUMNS = ("run", "state", "step", "loss", "last", "left", "nodes", "scores")
_WIDTHS = {"state": 11, "step": 15, "loss": 7, "last": 6, "left": 6, "nodes": 14, "scores": 9}


def lines_of_several(all_of_them: Sequence[Status], width: int) -> Iterator[str]:
    """A line for each run within `width` columns, its reason below it, and the totals."""
    rows = [_row(status) for status in all_of_them]
    shown = [name for name in _COLUMNS if any(row[name] for row in rows)]
    sizes = {name: min(_WIDTHS.get(name, width), max(len(name), *(len(row[name]) for row in rows))) for name in shown}
    taken = sum(sizes[name] + 2 for name in shown if name != "run")
    sizes["run"] = max(12, min(sizes["run"], width - taken))
    yield _line(dict(zip(shown, shown, strict=True)), sizes)
    for status, row in zip(all_of_them, rows, strict=True):
        yield _line(row, sizes)
        if status.why:
            yield "  " + _cut(status.why, width - 2)
    states = Counter(status.state for status in all_of_them)
    scored = Counter(status.evaluation for status in all_of_them if status.evaluation)
    lost = sum(status.lost for status in all_of_them)
    line = f"{len(all_of_them)} runs: {_counted(states)}"
    line += f"; evaluations: {_counted(scored)}" if scored else ""
    yield line + (f"; {lost} steps done again" if lost else "")


def _row(status: Status) -> dict[str, str]:
    return {
        "run": status.run.name,
        "state": status.state,
        "step": f"{status.step}/{status.steps}" if status.steps else str(status.step),
        "loss": "" if status.loss is None else f"{status.loss:.3f}",
        "last": _age(status) if status.nodes else "",
        "left": "" if status.seconds_left is None else short_duration(status.seconds_left),
        "nodes": status.nodes,
        "scores": status.evaluation,
    }


def _line(row: dict[str, str], sizes: dict[str, int]) -> str:
    return "  ".join(f"{_cut(row[name], size):<{size}}" for name, size in sizes.items()).rstrip()


def _cut(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 2] + ".."


def _counted(states: Counter[str]) -> str:
    return ", ".join(f"{count} {state}" for state, count in states.most_common())


def _age(status: Status, before: str = "", after: str = "") -> str:
    if status.last_step_at is None or not status.nodes:
        return ""
    return f"{before}{short_duration(time.time() - status.last_step_at)}{after}"


def short_duration(seconds: float) -> str:
    """`7s`, `12m`, `3h20m`, `2d5h`: at most six characters for anything below 100 days."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600}h"
