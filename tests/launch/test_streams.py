"""A closed pipe ends nothing: what was printed before arrives, what comes after goes nowhere, and nobody complains."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import os, sys
from rich.console import Console
from nearfar.launch.streams import outliving_their_reader
with outliving_their_reader():
    print("first", flush=True)
    sys.stdin.readline()  # the reader has gone
    for i in range(5_000):
        print("later", i)
        Console().print("through rich", i)
    sys.stdout.flush()
    print("survived", file=sys.stderr)
"""


def test_a_program_goes_on_when_the_reader_of_its_output_has_left() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdin and child.stdout and child.stderr
    assert child.stdout.readline() == "first\n"
    child.stdout.close()
    child.stdin.write("\n")
    child.stdin.close()
    output = child.stderr.read()
    assert child.wait(60) == 0 and output == "survived\n"


def test_characters_that_the_terminal_lacks_are_shown_and_not_raised() -> None:
    code = "from nearfar.launch.streams import outliving_their_reader as o\nwith o(): print('caf\\xe9 \\udce9')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={"PYTHONIOENCODING": "ascii"}, check=True, timeout=60
    )
    assert done.stdout == b"caf\\xe9 \\udce9\n" and done.stderr == b""


def test_without_any_standard_output_there_is_no_error() -> None:
    code = "from nearfar.launch.streams import outliving_their_reader as o\nwith o(): print('x')"
    done = subprocess.run([f'{sys.executable} -c "{code}" >&-'], shell=True, capture_output=True, timeout=60)
    assert done.returncode == 0 and done.stderr == b""
