"""YAML within bounds: what a recipe needs is read as PyYAML reads it, and hostile files cost a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from nearfar.ssl.disk import bounded_files
from nearfar.ssl.errors import UserError

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
DEEP_BY_ALIAS = "l0: &l0 [1]\n" + "".join(f"l{i}: &l{i} [*l{i - 1}]\n" for i in range(1, 90))


@pytest.mark.parametrize("text", ["", "a: 1", "a: [1, 2.5, x, true, null]", "a: &x {b: 1}\nc: *x\nd: {<<: *x}", "1e-4"])
def test_ordinary_yaml_is_what_pyyaml_says(text: str) -> None:
    assert bounded_files.parse_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "more than 10,000 values"),
        (DEEP_BY_ALIAS, "levels deep"),
        ("[" * 100_000, "levels deep"),
        ("{a: " * 5_000, "levels deep"),
        ("- " * 5_000, "levels deep"),
        ("a: &a [*a]", "contains itself"),
        ("a: " + "9" * 5_000, "4300 digits"),
        ("x" * (2**20 + 1), "characters"),
        ("[" + "1," * 20_000 + "]", "more than 10,000 values"),
        ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("? [a]\n: b", "unhashable"),
    ],
)
def test_hostile_yaml_is_refused_in_a_sentence(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(yaml.YAMLError, match=message):
        bounded_files.parse_yaml(text)
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"The recipe .*bad\.yaml is not valid YAML") as caught:
        bounded_files.read_yaml(file, "recipe")
    assert len(str(caught.value)) < 1_000 and "\n" not in str(caught.value)


def test_what_is_no_text_and_what_holds_no_sections(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(b"name: caf\xe9\n")
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 9\)"):
        bounded_files.read_yaml(file, "recipe")
    file.write_text("[" + "long, " * 1_000 + "]")
    with pytest.raises(UserError, match="must hold lines") as caught:
        bounded_files.read_yaml(file, "site file", "lines")
    assert len(str(caught.value)) < 500
    file.write_bytes(b"\xef\xbb\xbfname: x\n")  # as some editors begin a file
    assert bounded_files.read_yaml(file, "recipe") == {"name": "x"}
