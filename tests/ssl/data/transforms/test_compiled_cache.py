"""Processes that compile the crops at once, into an empty cache: numba's tables of types stay whole.

Compiled functions that took a named tuple, and several cached ones that called each other, ended in a KeyError deep in
numba, in some process that read what another had just written (compiled_crops.py, loaders/ffcv.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("numba")

VIEWS = """
    import sys
    from concurrent.futures import ThreadPoolExecutor
    import numpy as np
    from nearfar.ssl.data.transforms.compiled_crops import make_scratch, make_views

    def views(seed: int) -> int:
        scratch = make_scratch(24, 24, 16)
        scratch.pixels[:] = np.random.default_rng(0).integers(0, 2**63, len(scratch.pixels))
        out, yes = np.zeros(3 * 16 * 16, np.uint8), np.ones(1, bool)
        make_views(
            tuple(scratch), 24, 24, np.array([[0, 0, 24, 24]], np.int32), yes, np.array([16]), np.array([0]), out,
            True, yes, np.full((1, 4), 0.5, np.float32), np.array([[0, 1, 2, 3]], np.uint8), yes,
            np.ones(1, np.float32), yes, 128,
        )
        return int(out.astype(np.int64) @ np.arange(len(out)))

    first = views(0)  # as the loader: compiled before there are threads
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(views, range(16))) == {first}
    print(first)
"""


@pytest.mark.long
def test_processes_that_compile_side_by_side_compute_the_same(tmp_path: Path) -> None:
    """Three rounds: into an empty cache, from a full one, and both at once."""
    code = textwrap.dedent(VIEWS)

    def start(cache: str) -> subprocess.Popen[str]:
        env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / cache)}
        return subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)

    outputs = set()
    for caches in (("one", "one", "one"), ("one", "one"), ("one", "two", "two")):
        processes = [start(cache) for cache in caches]
        outputs |= {process.communicate(timeout=300)[0] for process in processes}
        assert [process.returncode for process in processes] == [0] * len(processes)
    assert len(outputs) == 1 and next(iter(outputs)).strip().isdecimal()
    assert list((tmp_path / "one").rglob("*.nbi"))
