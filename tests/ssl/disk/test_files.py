"""Files are whole or not there, follow the umask, and leave nothing beside them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nearfar.ssl.disk import files


@pytest.fixture(params=[0o022, 0o002, 0o027])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_text_is_written_whole_and_follows_the_umask(tmp_path: Path, umask: int) -> None:
    files.write_text(tmp_path / "a.json", "é\n")
    files.write_text(tmp_path / "a.json", "ö\n")
    assert (tmp_path / "a.json").read_bytes() == "ö\n".encode()
    assert mode(tmp_path / "a.json") == 0o666 & ~umask
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_library_that_makes_private_files_follows_the_umask_too(tmp_path: Path, umask: int) -> None:
    with files.atomic(tmp_path / "w.safetensors") as partial:
        save_file({"a": torch.ones(2)}, partial)
        partial.chmod(0o600)
    assert mode(tmp_path / "w.safetensors") == 0o666 & ~umask
    assert load_file(tmp_path / "w.safetensors")["a"].tolist() == [1, 1]


def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a", "old")
    with pytest.raises(ZeroDivisionError), files.atomic(tmp_path / "a") as partial:
        partial.write_text(str(1 / 0))
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_a_folder_appears_whole_takes_the_place_of_an_old_one_and_follows_the_umask(tmp_path: Path, umask: int) -> None:
    for text in ("one", "two"):
        with files.atomic_folder(tmp_path / "f") as partial:
            (partial / "in").mkdir()
            (partial / "in" / "it").write_text(text)
            assert not (tmp_path / "f").exists() or (tmp_path / "f" / "in" / "it").read_text() == "one"
    assert (tmp_path / "f" / "in" / "it").read_text() == "two" and os.listdir(tmp_path) == ["f"]
    assert mode(tmp_path / "f") == 0o777 & ~umask


def test_an_error_leaves_the_old_folder_and_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "it").write_text("old")
    with pytest.raises(ZeroDivisionError), files.atomic_folder(tmp_path / "f") as partial:
        (partial / "it").write_text(str(1 / 0))
    assert (tmp_path / "f" / "it").read_text() == "old" and os.listdir(tmp_path) == ["f"]


def test_a_name_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    for name in ("n" * 255, "é" * 127):
        files.write_text(tmp_path / name, "x")
        assert (tmp_path / name).read_text() == "x"


def test_a_missing_folder_is_the_systems_own_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.write_text(tmp_path / "gone" / "a", "x")


def test_what_killed_processes_left_is_swept_up_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / f"{files.PARTIAL}a").mkdir()
    (tmp_path / f"{files.PARTIAL}b").touch()
    (tmp_path / "c").touch()
    files.remove_partial(tmp_path)
    assert os.listdir(tmp_path) == ["c"]
