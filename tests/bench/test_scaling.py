"""The plan past one machine: its formulas by hand, and the page that shows them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def scaling(load_bench: Callable[[str], Any]) -> Any:
    return load_bench("scaling")


def test_by_hand(scaling: Any) -> None:
    """Round numbers: 10 parameters, 1 token, 100 FLOP/s, two nodes of two GPUs."""
    cluster = scaling.Cluster(
        images=800, epochs=2, per_gpu=4, backbone=10, head=0, prototypes=0, student_tokens=1, teacher_tokens=1,
        image_bytes=5, node_gpus=2, gpu_flops=100, utilization=0.8, nvlink=40, network=10, latency=0.5,
        node_mtbf=2000, restart=10, jitter=0, loader=0.1, disk=16,
    )  # fmt: skip
    found = scaling.needs(cluster, 4)
    assert found.batch == 16 and found.steps == 100
    assert found.step == pytest.approx(4 * (60 + 20) / 80)
    # 40 bytes: half of them twice within a node, half of them twice between the two, and the latency
    assert found.gradients == pytest.approx(40 / 40 + 40 / 10 + 0.5)
    assert found.images_a_second == pytest.approx(16 / (4 + 5.5 + 0.5))
    assert found.efficiency == pytest.approx(0.4) and found.hours == pytest.approx(1000 / 3600)
    assert found.loader_cores == pytest.approx(1.6 / 4 / 0.1) and found.reads == pytest.approx(8)
    assert found.checkpoint == 160 and found.writing == 10 and found.mtbf == 1000
    assert found.interval == pytest.approx((2 * 10 * 1000) ** 0.5)
    assert found.lost == pytest.approx(10 / found.interval + (found.interval / 2 + 10) / 1000)


def test_one_gpu_talks_to_nobody(scaling: Any) -> None:
    found = scaling.needs(scaling.Cluster(), 1)
    assert found.gradients == found.center == found.waiting == 0 and found.efficiency == 1


def test_the_page_shows_what_the_script_prints(scaling: Any) -> None:
    assert scaling.table(scaling.Cluster(), scaling.GPUS) in (ROOT / "docs" / "scaling.md").read_text()
