"""What sbatch is told."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nearfar.launch.slurm import executor, records, snapshot
from nearfar.launch.slurm.executor import JobOptions
from nearfar.launch.slurm.resources import Resources

CPU = Resources(cpu=True)


def directives(script: str) -> dict[str, str]:
    """--key=value of every #SBATCH line; an oracle that reads the script as sbatch does."""
    found = {}
    for line in script.splitlines():
        if line.startswith("#SBATCH "):
            (word,) = shlex.split(line.removeprefix("#SBATCH "))
            key, _, value = word.removeprefix("--").partition("=")
            found[key] = value
    return found


def test_the_script_says_what_was_asked_for(tmp_path: Path) -> None:
    share = Resources(
        nodes=2, gpus_per_node=8, cpus_per_task=6, mem_gb=1.5, hours=24, partition="gpu", account="lab", qos="high",
        constraint="a100", exclude="n1,n2", mail="me@x", setup=["module load cuda"], extra={"reservation": "r"},
    )  # fmt: skip
    home = tmp_path / "a b" / "cluster" / "now"
    script = executor.executor(home, share, JobOptions("mine", signal_delay=77)).script()
    assert directives(script) == {
        "job-name": "mine", "nodes": "2", "ntasks-per-node": "8", "gpus-per-node": "8", "cpus-per-task": "6",
        "mem": "1536M", "time": "1440", "partition": "gpu", "account": "lab", "qos": "high", "constraint": "a100",
        "exclude": "n1,n2", "mail-user": "me@x", "mail-type": "END,FAIL,REQUEUE", "reservation": "r",
        "signal": "USR2@77", "requeue": "", "kill-on-invalid-dep": "yes", "open-mode": "append",
        "output": f"{home}/log/%j_0_log.out", "wckey": "submitit",
    }  # fmt: skip
    lines = script.splitlines()
    assert lines.index("module load cuda") < lines.index("export SRUN_CPUS_PER_TASK=6")
    srun = next(line for line in lines if line.startswith("srun"))
    assert "--kill-on-bad-exit=1" in srun and shlex.split(srun)[-1] == f"{home}/log"


def test_arrays_and_what_follows(tmp_path: Path) -> None:
    array = directives(executor.executor(tmp_path, CPU, JobOptions("s", parallel=2)).script(5))
    assert array["array"] == "0-4%2" and array["output"].endswith("%A_%a_0_log.out")
    after = directives(executor.executor(tmp_path, CPU, JobOptions("s", after="afterok:7")).script())
    assert after["dependency"] == "afterok:7" and "gpus-per-node" not in after


def test_the_lines_before_srun_put_the_snapshot_first_on_the_import_path(tmp_path: Path) -> None:
    """Run by a real shell, from a folder with a space in its name, over an import path that holds another nearfar."""
    home = tmp_path / "it's here"
    snapshot.copy_code(home / "code")
    script = executor.executor(home, CPU, JobOptions("s")).script()
    setup = [line for line in script.splitlines() if line.startswith("export ")]
    code = "import nearfar.ssl.config, nearfar.launch.cli, os; print(nearfar.ssl.config.__file__)"
    output = subprocess.run(
        ["bash", "-c", "\n".join([*setup, f"{shlex.quote(sys.executable)} -c '{code}'; echo $SRUN_CPUS_PER_TASK"])],
        capture_output=True, text=True, check=True, cwd="/",
    ).stdout.split("\n")  # fmt: skip
    assert output[0] == str(home / "code" / "nearfar" / "ssl" / "config.py") and output[1] == "8"


def test_signals_are_ignored_until_python_answers_them(tmp_path: Path) -> None:
    made = executor.executor(tmp_path, CPU, JobOptions("s"))
    code = "import signal; print(signal.getsignal(signal.SIGUSR2), signal.getsignal(signal.SIGTERM))"
    output = subprocess.run(["bash", "-c", f"{made.python} -c '{code}'"], capture_output=True, text=True, check=True)
    assert output.stdout.split() == ["1", "1"] or output.stdout.count("SIG_IGN") == 2


def test_the_signal_comes_early_enough(tmp_path: Path) -> None:
    day, minute = Resources(cpu=True, hours=24), Resources(cpu=True, hours=1 / 60)
    assert executor.signal_delay(tmp_path, day) == executor.UNMEASURED_DELAY
    assert executor.signal_delay(tmp_path, minute) == 30
    assert executor.signal_delay(tmp_path, Resources(cpu=True, signal_delay=44)) == 44
    assert executor.signal_delay(tmp_path, Resources(cpu=True, hours=1 / 60, signal_delay=99)) == 59

    # two seconds a step; ten steps a line; one line took 30 s more, and between two lines the job was restarted
    times = [0, 20, 40, 90, 110, 5000, 5020]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": 10 * k, "loss": 1, "time": 1000.0 + t}) + "\n" for k, t in enumerate(times))
        + '{"step": 60, "knn_top1": 5}\n'
    )
    with records.locked(tmp_path):
        (tmp_path / "cluster" / "attempts.jsonl").write_text(
            '{"begins": {"job": "1", "restart": 1, "step": 40, "reached": 40, "host": "n", "time": 5900.0}}\n'
        )
    assert executor.longest_pause(tmp_path) == pytest.approx(32)
    assert executor.signal_delay(tmp_path, day) == 60 + 64
    for step, seconds in ((10, 3.0), (20, 4.5)):
        checkpoint = tmp_path / "checkpoints" / f"step-{step:09d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_text(json.dumps({"files": {"a": {"bytes": 1}}, "seconds": seconds}))
    assert executor.signal_delay(tmp_path, day) == 60 + 73


def test_srun_gets_the_environment_and_the_sites_own_arguments(tmp_path: Path) -> None:
    share = Resources(cpu=True, srun_args=["--container-image=a b"], python="apptainer exec img.sif python3")
    script = executor.executor(tmp_path, share, JobOptions("s", "eval")).script()
    (line,) = [line for line in script.splitlines() if line.startswith("srun")]
    words = shlex.split(line)
    assert "--export=ALL" in words and "--container-image=a b" in words
    assert words[words.index("apptainer") :][:4] == ["apptainer", "exec", "img.sif", "python3"]
    assert f"apptainer exec img.sif python3 -m nearfar.launch.slurm.requeue_after_failure {tmp_path} eval" in script


def _run_batch(script: str, tmp_path: Path, srun: str) -> tuple[int, str]:
    """The exit code of a batch script run by a real shell, and the words that `srun` and Python were called with."""
    calls = tmp_path / "calls"
    for name, body in {"srun": srun, "fake-python": "exit 0"}.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f'#!/bin/bash\necho "{name} $@" >> {shlex.quote(str(calls))}\n{body}\n')
        file.chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
    ended = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, check=False)
    return ended.returncode, calls.read_text()


@pytest.mark.parametrize("code", [0, 137])
def test_the_batch_script_looks_after_a_failure_and_ends_as_srun_did(tmp_path: Path, code: int) -> None:
    made = executor.executor(tmp_path / "it's", Resources(cpu=True, python="fake-python"), JobOptions("s"))
    ended, calls = _run_batch(made.script(), tmp_path, f"exit {code}")
    assert ended == code
    requeued = f"fake-python -m nearfar.launch.slurm.requeue_after_failure {tmp_path}/it's train {code}" in calls
    assert requeued is (code != 0)


def test_setup_of_every_node_runs_before_training_and_its_failure_ends_the_job(tmp_path: Path) -> None:
    share = Resources(cpu=True, nodes=3, python="fake-python", node_setup=["cp -r /big '/a b'", "echo done"])
    script = executor.executor(tmp_path, share, JobOptions("s")).script()
    ended, calls = _run_batch(script, tmp_path, "exit 5")
    staging, _, rest = calls.partition("fake-python")
    assert ended == 5 and calls.count("srun") == 1 and "-m nearfar.launch.slurm.requeue_after_failure" in rest
    assert staging == (
        "srun --export=ALL --ntasks-per-node=1 --ntasks=3 bash -c set -e\ncp -r /big '/a b'\necho done\n"
    )
    ended, calls = _run_batch(script, tmp_path, "exit 0")
    assert ended == 0 and "submitit.core._submit" in calls


def test_submitit_still_has_what_is_used_of_it(tmp_path: Path) -> None:
    """Its version is bounded in pyproject.toml, since two of these names are private; here is what to look at first."""
    import inspect

    import submitit
    from submitit.slurm import slurm

    used = {
        "command", "folder", "map_count", "setup", "teardown", "srun_args", "additional_parameters", "signal_delay_s",
        "stderr_to_stdout", "array_parallelism", "dependency", "gpus_per_node",
    }  # fmt: skip
    assert used <= set(inspect.signature(slurm._make_sbatch_string).parameters), "Executor.script"
    assert isinstance(slurm.SlurmExecutor._submitit_command_str, property), "Executor.script"
    assert {"python"} <= set(inspect.signature(slurm.SlurmExecutor.__init__).parameters), "Executor.__init__"
    assert {"paths", "global_rank", "num_tasks", "hostnames", "job_id"} <= set(dir(submitit.JobEnvironment)) | {
        "job_id", "paths"
    }  # fmt: skip
    lines = slurm._make_sbatch_string("COMMAND", tmp_path, setup=["FIRST"], teardown=["LAST"]).split("\n")
    assert lines.index("FIRST") < next(k for k, line in enumerate(lines) if line.endswith("COMMAND"))
    assert lines.index("LAST") > next(k for k, line in enumerate(lines) if line.endswith("COMMAND"))
