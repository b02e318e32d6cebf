"""Ranks of a job share an extraction: the same bits in the same order as one process, and each does its part."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from nearfar.eval.features.extraction import Reading, extract
from nearfar.eval.features.images import Decoding
from nearfar.eval.features.store import FeatureStore
from nearfar.launch.computing import by_all_ranks
from nearfar.ssl.backbones import Backbone, create
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.errors import BadImage, UserError

READINGS = (Reading(16), Reading((16, 24), pooling="grid"))


class Some(ArraySource):
    """21 images with masks of two sizes; a whole batch of three, and one more, cannot be read."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        super().__init__(rng.integers(0, 256, (21, 16, 24, 3), np.uint8), np.arange(21) % 3)
        self.seen: list[int] = []

    def read(self, i: int) -> Image.Image:
        self.seen.append(i)
        if i in (3, 4, 5, 10):
            raise BadImage(f"image-{i}", "cut off")
        return super().read(i)

    def mask(self, i: int) -> NDArray[np.uint8] | None:
        return np.full((16, 24) if i % 2 else (32, 48), i, np.uint8)


def network(seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    return create("vit_tiny_patch8", img_size=16, embed_dim=24, depth=1, num_heads=2).eval()


def main(folder: Path, case: str) -> None:
    """What each rank of a test runs."""
    torch.set_num_threads(1)
    rank, source = int(os.environ["RANK"]), Some()

    def work(decoding: Decoding) -> None:
        if case == "stopped":
            one_by_one = replace(decoding, batch_size=1)
            for after in (1, 2, 17, 0):
                with suppress(StoppedError):
                    extract(network(), source, READINGS[0], replace(one_by_one, progress=stop_after(after)))
        for number, reading in enumerate(READINGS):
            FeatureStore.write(folder / f"store{number}", network(), source, reading, decoding)

    mine = [Some(seed=rank)] if case == "other images" else [source]
    try:
        by_all_ranks(work, lambda: [network()], mine, Decoding(3, 0))
    except UserError as error:
        (folder / f"error{rank}").write_text(str(error))
    (folder / f"seen{rank}").write_text(json.dumps(source.seen))


class StoppedError(Exception):
    pass


def stop_after(images: int) -> Callable[[int], None]:
    left = [images]

    def progress(count: int) -> None:
        left[0] -= count
        if left[0] <= 0:
            raise StoppedError

    return progress


def run(folder: Path, ranks: int, case: str = "") -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"OMP_NUM_THREADS": 1, "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), case],
            env=os.environ | {k: str(v) for k, v in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, outputs


def test_ranks_share_an_extraction_and_change_nothing_also_after_some_that_were_left_early(tmp_path: Path) -> None:
    ranks = 3
    run(tmp_path, ranks, "stopped")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number, reading in enumerate(READINGS):
            got = FeatureStore.open(tmp_path / f"store{number}")
            expected = extract(network(), Some(), reading, Decoding(3, 0))
            for name in ("x", "index", "labels", "masks", "mask_size"):
                np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
            assert {k: v for k, v in got.manifest.items() if k != "arrays"} == expected.manifest
    finally:
        torch.set_num_threads(before)
    seen = [json.loads((tmp_path / f"seen{rank}").read_text()) for rank in range(ranks)]
    for rank in range(ranks):  # every so many-th batch of three, twice
        mine = [i for i in range(21) if i // 3 % ranks == rank]
        assert seen[rank][-2 * len(mine) :] == mine * 2
    # Left after one image: of its seven images the one that it had been asked for, and two that it had begun; all of
    # them only in the one that was left after 17 images (in the last two image 20 is another rank's).
    assert seen[2][:4] == [2, 5, 8, 2] and seen[2].count(20) == 1


def test_a_rank_with_other_images_is_told_by_all(tmp_path: Path) -> None:
    run(tmp_path, 2, "other images")
    for rank in range(2):
        assert "different images from the first one" in (tmp_path / f"error{rank}").read_text()
    assert not (tmp_path / "store0").exists()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
