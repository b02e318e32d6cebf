"""What a run folder remembers of its jobs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nearfar.launch.slurm import records
from nearfar.launch.slurm.records import Done, Job
from nearfar.ssl.errors import UserError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with records.locked(tmp_path):
        return tmp_path


def saved(run: Path, step: int) -> None:
    (run / "checkpoints" / f"step-{step:09d}").mkdir(parents=True)


def test_jobs_are_kept_in_order_and_replaced_by_id_and_submission(run: Path) -> None:
    places = [run / "first", run / "second"]
    one, two = (Job(job="7", kind="train", name="a", home=home, config=home / "a.yaml") for home in places)
    records.record(run, one)
    records.record(run, two)  # the same id, on another cluster
    records.record(run, one.model_copy(update={"cancelled": True}))
    assert [(job.home.name, job.cancelled) for job in records.jobs(run)] == [("first", True), ("second", False)]
    assert records.latest(run, "train") == two and records.latest(run, "eval") is None
    assert two.log == run / "second" / "log" / "7_0_log.out"


def test_steps_come_from_names_and_from_the_last_whole_line(run: Path) -> None:
    assert records.saved_step(run) == 0 and records.reached_step(run) == 0
    saved(run, 20)
    saved(run, 5)
    (run / "checkpoints" / ".writing-step-000000099").mkdir()
    (run / "checkpoints" / "step-000000030.damaged").mkdir()
    (run / "metrics.jsonl").write_text('{"step": 21, "loss": 1}\n{"step": 22}\n{"step": 23, "lo')
    assert records.saved_step(run) == 20 and records.reached_step(run) == 22
    assert records.last_metrics(run, "loss") == {"step": 21, "loss": 1}


def test_restarts_count_only_while_nothing_is_saved(run: Path) -> None:
    for restart in range(3):
        records.begin(run, "1", restart, tries=3)
    saved(run, 10)
    for restart in range(3, 6):
        assert records.begin(run, "1", restart, tries=3).step == 10
    with pytest.raises(UserError, match="3 attempts of job 1 all began at step 10"):
        records.begin(run, "1", 6, tries=3)
    records.begin(run, "2", 0, tries=3)  # submitted again


def test_attempts_that_died_before_they_could_say_so_count(run: Path) -> None:
    records.begin(run, "1", 0, tries=3)
    records.begin(run, "1", 2, tries=3)
    with pytest.raises(UserError, match="No progress"):
        records.begin(run, "1", 3, tries=3)


def test_a_run_that_is_preempted_for_weeks_goes_on(run: Path) -> None:
    for restart in range(200):
        records.begin(run, "1", restart, tries=1)
        saved(run, restart + 1)


def test_steps_that_were_lost(run: Path) -> None:
    saved(run, 10)
    (run / "metrics.jsonl").write_text('{"step": 13}\n')
    assert records.begin(run, "1", 1, tries=3).lost == 3


def test_a_line_that_a_dying_node_cut_off_costs_only_itself(run: Path) -> None:
    records.begin(run, "1", 0, tries=3)
    with (run / "cluster" / "attempts.jsonl").open("a") as handle:
        handle.write('{"ends": {"job"')
    records.begin(run, "1", 1, tries=3)
    records.end(run, "1", 1, "finished")
    assert [attempt.restart for attempt in records.attempts(run)] == [0, 1]
    assert [ending["why"] for ending in records.endings(run)] == ["finished"]


def test_the_first_rank_to_say_why_is_believed_and_a_new_attempt_takes_the_word_back(run: Path) -> None:
    assert records.outcome(run) is None
    records.settle(run, "train", Done(state="failed", job="1", why="mine"))
    records.settle(run, "train", Done(state="failed", job="1", why="lost the other"))
    found = records.outcome(run)
    assert found is not None and found.why == "mine" and found.time > 0
    records.settle(run, "train", Done(state="failed", job="2", why="later"))
    assert json.loads((run / "done.json").read_text())["why"] == "later"
    records.begin(run, "2", 1, tries=3)
    assert records.outcome(run) is None


def test_files_that_are_none_are_told(run: Path) -> None:
    (run / "done.json").write_text("{")
    with pytest.raises(UserError, match=r"done.json cannot be read"):
        records.outcome(run)
    (run / "cluster" / "jobs.json").write_text("[1]")
    with pytest.raises(UserError, match=r"jobs.json cannot be read"):
        records.jobs(run)
