"""A site's defaults and the flags over them."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from nearfar.launch.slurm import resources
from nearfar.launch.slurm.resources import Resources
from nearfar.ssl.errors import UserError


@pytest.fixture(autouse=True)
def _no_site_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def test_flags_win_over_the_site_and_the_site_over_the_defaults(tmp_path: Path) -> None:
    site = tmp_path / "config" / "nearfar" / "slurm.yaml"
    site.parent.mkdir(parents=True)
    site.write_text(
        "partition: gpu\nhours: 12\ngpus_per_node: 4\nsetup: [module load cuda]\nextra: {gres: 'gpu:a100:4'}\n"
    )
    found = resources.load(None, {"hours": 1.5, "nodes": 2})
    assert (found.partition, found.hours, found.minutes, found.world) == ("gpu", 1.5, 90, 8)
    assert found.setup == ["module load cuda"] and found.extra == {"gres": "gpu:a100:4"}
    other = tmp_path / "other.yaml"
    other.write_text("partition: cpu\ncpu: true\n")
    assert resources.load(other, {}).partition == "cpu"


def test_processes() -> None:
    def world(**given: int | bool) -> int:
        return resources.check(dict(given), "here").world

    assert world(cpu=True) == 1
    assert world(cpu=True, nodes=3, tasks_per_node=2) == 6
    assert world(gpus_per_node=8, nodes=2) == 16
    assert world(gpus_per_node=8, tasks_per_node=1) == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "Say --gpus-per-node 8"),
        ({"cpu": True, "gpus_per_node": 2}, "choose one"),
        ({"cpu": True, "nodes": 0, "hours": -1}, "nodes=0 is not possible: it should be 1 or more; hours=-1"),
        ({"gpus_per_node": "a100"}, "write a number, or type:number such as a100:8"),
        ({"gpus_per_node": 0}, "write a number"),
        ({"cpu": True, "extra": {"signal": "USR1@5"}}, "not through extra: signal (use signal_delay"),
        ({"cpu": True, "extra": {"requeue": False}}, "a job goes on by being requeued"),
        ({"cpu": True, "extra": {"ntasks_per_node": 4}}, "ntasks-per-node (use tasks_per_node)"),
        ({"cpu": True, "partitoin": "x"}, "partitoin is unknown (did you mean partition?)"),
    ],
)
def test_what_cannot_be_is_told(given: dict[str, object], words: str) -> None:
    with pytest.raises(UserError) as caught:
        resources.load(None, dict(given))
    assert words in str(caught.value)


def test_site_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no site file"):
        resources.load(tmp_path / "none.yaml", {"cpu": True})
    (tmp_path / "list.yaml").write_text("- gpu\n")
    with pytest.raises(UserError, match="must hold lines such as"):
        resources.load(tmp_path / "list.yaml", {"cpu": True})
    (tmp_path / "bad.yaml").write_text("a: [\n")
    with pytest.raises(UserError, match="not valid YAML"):
        resources.load(tmp_path / "bad.yaml", {"cpu": True})


def test_every_field_but_those_of_the_file_is_a_flag() -> None:
    parser = argparse.ArgumentParser()
    resources.add_flags(parser)
    assert resources.given(parser.parse_args([])) == {}
    words = ["--nodes", "2", "--cpu", "--hours", "0.5", "--mem-gb", "12", "--mail", "a@b", "--signal-delay", "9"]
    assert resources.given(parser.parse_args(words)) == {
        "nodes": 2, "cpu": True, "hours": 0.5, "mem_gb": 12.0, "mail": "a@b", "signal_delay": 9,
    }  # fmt: skip
    flags = {name.replace("-", "_") for action in parser._actions for name in (action.dest,)} - {"help"}
    assert flags == set(Resources.model_fields) - set(resources.FILE_ONLY)


@pytest.mark.parametrize(
    ("gpus", "gres", "one", "one_gres"),
    [(8, None, 1, None), ("a100:8", None, "a100:1", None), (4, "gpu:a100:4,ssd:2", 1, "gpu:a100:1,ssd:2"),
     ("8", "gpu:8", 1, "gpu:1")],
)  # fmt: skip
def test_typed_gpus_keep_their_type_in_the_evaluation(
    gpus: int | str, gres: str | None, one: int | str, one_gres: str | None
) -> None:
    share = resources.check({"gpus_per_node": gpus, "nodes": 2, "extra": {"gres": gres} if gres else {}}, "here")
    assert share.tasks == resources.gpu_count(gpus)
    small = share.one_process(4.0)
    assert (small.nodes, small.tasks, small.gpus_per_node, small.hours) == (1, 1, one, 4.0)
    assert small.extra.get("gres") == one_gres
