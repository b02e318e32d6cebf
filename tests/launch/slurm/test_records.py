"""What a run folder remembers of its jobs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nearfar.launch.slurm import records
from nearfar.launch.slurm.records import AttemptEnd, Ending, Job
from nearfar.ssl.errors import UserError


def saved(run: Path, step: int) -> None:
    (run / "checkpoints" / f"step-{step:09d}").mkdir(parents=True)


def test_jobs_are_kept_in_order_and_replaced_by_id_and_submission(run: Path) -> None:
    places = [run / "first", run / "second"]
    one, two = (Job(job="7", kind="train", name="a", submission=home, config=home / "a.yaml") for home in places)
    records.record_jobs(run, one)
    records.record_jobs(run, two)  # the same id, on another cluster
    records.record_jobs(run, one.model_copy(update={"cancelled": True}))
    assert [(job.submission.name, job.cancelled) for job in records.jobs(run)] == [("first", True), ("second", False)]
    assert records.latest_job(run, "train") == two and records.latest_job(run, "eval") is None
    assert two.log == run / "second" / "log" / "7_0_log.out"


def test_steps_come_from_names_and_from_the_last_whole_line(run: Path) -> None:
    assert records.saved_step(run) == 0 and records.reached_step(run) == 0
    saved(run, 20)
    saved(run, 5)
    (run / "checkpoints" / ".writing-step-000000099").mkdir()
    (run / "checkpoints" / "step-000000030.damaged").mkdir()
    (run / "checkpoints" / "step-best-copy").mkdir()  # nine characters, and no number
    (run / "metrics.jsonl").write_text('{"step": 21, "loss": 1}\n{"step": 22}\n{"step": 23, "lo')
    assert records.saved_step(run) == 20 and records.reached_step(run) == 22
    assert records.last_metrics(run, "loss") == {"step": 21, "loss": 1}


def test_restarts_count_only_while_nothing_is_saved(run: Path) -> None:
    for restart in range(3):
        records.begin_attempt(run, "1", restart, tries=3)
    saved(run, 10)
    for restart in range(3, 6):
        assert records.begin_attempt(run, "1", restart, tries=3).step == 10
    with pytest.raises(UserError, match="3 attempts of job 1 all began at step 10"):
        records.begin_attempt(run, "1", 6, tries=3)
    records.begin_attempt(run, "2", 0, tries=3)  # submitted again


def test_tries_are_attempts_and_not_restarts(run: Path) -> None:
    """SLURM also counts restarts before anything of ours ran; a silent death counts where the batch script told it."""
    records.begin_attempt(run, "1", 0, tries=3)
    records.begin_attempt(run, "1", 7, tries=3)
    records.end_attempt(run, AttemptEnd(job="1", restart=8, why="killed", infrastructure=True))
    assert records.fruitless_attempts(run, "1") == {0, 7, 8}
    with pytest.raises(UserError, match=r"No progress: 3 attempts.* The last one: killed\."):
        records.begin_attempt(run, "1", 9, tries=3)


def test_attempts_of_an_evaluation_count_until_a_score_is_added(run: Path) -> None:
    (run / "results.json").write_text('{"untrained": {"knn_top1": 1.5}}')
    for restart in range(2):
        records.begin_attempt(run, "1", restart, tries=2, kind="eval")
    (run / "results.json").write_text('{"untrained": {"knn_top1": 1.5}, "trained": {"knn_top1": 2.5}}')
    records.begin_attempt(run, "1", 2, tries=2, kind="eval")
    records.begin_attempt(run, "1", 3, tries=2, kind="eval")
    with pytest.raises(UserError, match="2 attempts of job 1 added no score"):
        records.begin_attempt(run, "1", 4, tries=2, kind="eval")
    assert records.attempts(run) == [] and len(records.attempts(run, "eval")) == 5


def test_a_run_that_is_preempted_for_weeks_goes_on(run: Path) -> None:
    for restart in range(200):
        records.begin_attempt(run, "1", restart, tries=1)
        saved(run, restart + 1)
    assert [(attempt.restart, attempt.step, attempt.lost) for attempt in records.attempts(run)] == [
        (restart, restart, 0) for restart in range(200)
    ]
    assert records.fruitless_attempts(run, "1") == set()


def test_steps_that_were_lost(run: Path) -> None:
    saved(run, 10)
    (run / "metrics.jsonl").write_text('{"step": 13}\n')
    assert records.begin_attempt(run, "1", 1, tries=3).lost == 3


def test_a_line_that_a_dying_node_cut_off_costs_only_itself(run: Path) -> None:
    records.begin_attempt(run, "1", 0, tries=3)
    with (run / "cluster" / "attempts.jsonl").open("a") as handle:
        handle.write('{"ends": {"job"')
    records.begin_attempt(run, "1", 1, tries=3)
    records.end_attempt(run, AttemptEnd(job="1", restart=1, why="finished"))
    assert [attempt.restart for attempt in records.attempts(run)] == [0, 1]
    assert [ending.why for ending in records.attempt_ends(run)] == ["finished"]


def test_the_first_rank_to_say_why_is_believed_and_a_new_attempt_takes_the_word_back(run: Path) -> None:
    assert records.read_ending(run) is None
    records.write_ending(run, "train", Ending(state="failed", job="1", why="mine"))
    records.write_ending(run, "train", Ending(state="failed", job="1", why="lost the other"))
    found = records.read_ending(run)
    assert found is not None and found.why == "mine" and found.time > 0
    records.write_ending(run, "train", Ending(state="failed", job="2", why="later"))
    assert json.loads((run / "ending.json").read_text())["why"] == "later"
    records.begin_attempt(run, "2", 1, tries=3)
    assert records.read_ending(run) is None


def test_files_that_are_none_are_told(run: Path) -> None:
    (run / "ending.json").write_text("{")
    with pytest.raises(UserError, match=r"ending.json cannot be read"):
        records.read_ending(run)
    (run / "cluster" / "jobs.json").write_text("[1]")
    with pytest.raises(UserError, match=r"jobs.json cannot be read"):
        records.jobs(run)
