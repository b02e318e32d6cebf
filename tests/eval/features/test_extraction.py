"""Features: the right tokens of the right pixels, the same however they are read, and never of a broken image."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nearfar.eval.features.extraction import Forward, Reading, digest, extract, manifest_of, read, stream
from nearfar.eval.features.images import Decoding
from nearfar.eval.features.pixels import pixel_features, pixel_grid
from nearfar.eval.features.store import FeatureStore
from nearfar.ssl.backbones import create
from nearfar.ssl.backbones.tokens import Backbone, Tokens
from nearfar.ssl.data.sources.base import ArraySource, Subset
from nearfar.ssl.data.transforms.normalize import normalize_pixels
from nearfar.ssl.disk import files
from nearfar.ssl.errors import BadImage, UserError

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


class Averages(Backbone):
    """Patch token = mean color of the patch; CLS = mean color of the image; block k adds k; the norm doubles."""

    patch_size, embed_dim, num_heads = 8, 3, 1

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.dropout = torch.nn.Dropout(0.5)
        self.arch = {"name": "averages", "grid": (1, 2)}

    def blocks(self, images: Tensor, n: int, norm: bool = False) -> list[Tokens]:
        h, w = images.shape[2] // 8, images.shape[3] // 8
        patches = torch.nn.functional.avg_pool2d(images, 8).flatten(2).transpose(1, 2)
        out = []
        for k in range(n, 0, -1):
            patch = self.dropout(patches + k - 1) * self.weight * (2 if norm else 1)
            out.append(Tokens(patch.mean(1, keepdim=True), patch, (h, w)))
        return out

    def forward(self, images: Tensor, masks: Any = None) -> Tokens:
        return self.blocks(images, 1, norm=True)[0]


class SomeBad(ArraySource):
    """Images 1 and 4 cannot be read."""

    def read(self, i: int) -> Image.Image:
        if i in (1, 4):
            raise BadImage(f"image-{i}", "cut off")
        return super().read(i)


@pytest.fixture
def images() -> NDArray[Any]:
    return np.random.default_rng(0).integers(0, 256, (7, 16, 24, 3), dtype=np.uint8)


@pytest.fixture
def source(images: NDArray[Any]) -> SomeBad:
    masks = np.arange(7, dtype=np.uint8)[:, None, None] * np.ones((1, 16, 24), np.uint8)
    return SomeBad(images, labels=np.arange(7) % 3, masks=masks, classes=["a", "b", "c"])


def patch_colors(images: NDArray[Any]) -> NDArray[Any]:
    x = (images / 255 - MEAN) / STD
    n, h, w, _ = x.shape
    return x.reshape(n, h // 8, 8, w // 8, 8, 3).mean((2, 4))


GOOD = [0, 2, 3, 5, 6]


def test_grids_hold_the_patches_of_the_whole_image(source: SomeBad, images: NDArray[Any]) -> None:
    features = extract(Averages(), source, Reading((16, 24), layer="last-block", pooling="grid"), Decoding(2))
    np.testing.assert_allclose(features.x, patch_colors(images)[GOOD], atol=1e-5)
    assert features.x.dtype == np.float32


def test_unreadable_images_go_with_label_and_mask_and_are_named(source: SomeBad) -> None:
    features = extract(Averages(), source, Reading((16, 24), pooling="grid"), Decoding(2))
    assert features.index.tolist() == GOOD
    assert features.labels.tolist() == [i % 3 for i in GOOD]
    assert [mask[0, 0] for mask in features.mask_list()] == GOOD
    assert features.manifest["bad"] == {"image-1": "cut off", "image-4": "cut off"}


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batches_and_workers_change_nothing(source: SomeBad, batch_size: int) -> None:
    expected = extract(Averages(), source, Reading(16), Decoding(7))
    got = extract(Averages(), source, Reading(16), Decoding(batch_size, workers=2 if batch_size == 3 else 0))
    np.testing.assert_allclose(got.x, expected.x, atol=1e-6)
    assert got.index.tolist() == GOOD


def test_layers_and_poolings(images: NDArray[Any]) -> None:
    model, x = Averages().eval(), torch.rand(2, 3, 16, 24)
    color = x.mean((2, 3))
    torch.testing.assert_close(read(model, x, "final", "cls"), 2 * color)
    torch.testing.assert_close(read(model, x, "last-block", "mean"), color)
    torch.testing.assert_close(read(model, x, "blocks-1", "cls+mean"), torch.cat([2 * color] * 2, 1))
    torch.testing.assert_close(read(model, x, "blocks-2", "cls"), torch.cat([2 * color + 2, 2 * color], 1))
    assert read(model, x, "blocks-2", "grid").shape == (2, 2, 3, 6)


def test_model_is_read_in_eval_mode_and_left_as_it_was(source: SomeBad) -> None:
    model = Averages()
    model.train()
    model.dropout.eval()
    first = extract(model, source, Reading(16)).x
    model.dropout.train()
    np.testing.assert_array_equal(extract(model, source, Reading(16)).x, first)
    assert model.training
    assert model.dropout.training
    assert not torch.is_inference_mode_enabled()


def test_global_random_state_is_left_alone(source: SomeBad) -> None:
    before = torch.random.get_rng_state()
    extract(Averages(), source, Reading(16), Decoding(workers=1))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_our_network_gives_its_own_outputs(images: NDArray[Any]) -> None:
    torch.manual_seed(0)
    model = create("vit_tiny_patch8", img_size=16, embed_dim=24, depth=2, num_heads=2, prr=True, gaug=True)
    source = ArraySource(images[:, :16, :16])
    x = torch.from_numpy((images[:, :16, :16] / 255 - MEAN) / STD).permute(0, 3, 1, 2).float()
    model.eval()
    with torch.no_grad():
        tokens, block = model(x), model.blocks(x, 1)[0]
    final = extract(model, source, Reading(16))
    torch.testing.assert_close(torch.from_numpy(final.x), tokens.cls)
    assert final.manifest["prr"] and final.manifest["norm"]
    grid = extract(model, source, Reading(16, layer="last-block", pooling="grid"))
    torch.testing.assert_close(torch.from_numpy(grid.x).flatten(1, 2), block.patches)
    assert not grid.manifest["prr"] and not grid.manifest["norm"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 16, "layer": "block-4"}, "blocks-N"),
        ({"size": 16, "pooling": "max"}, "cls, mean"),
        ({"size": (20, 24), "pooling": "grid"}, "16x24"),
        ({"size": (16, 24)}, "square"),
        ({"size": 16, "resize": 8}, "does not fit"),
    ],
)
def test_impossible_readings_are_explained(source: SomeBad, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        extract(Averages(), source, Reading(**settings))


def test_nothing_readable_is_an_error(images: NDArray[Any]) -> None:
    with pytest.raises(UserError, match=r"None of the 2 images.*image-1: cut off"):
        extract(Averages(), Subset(SomeBad(images[:5]), [1, 4]), Reading(16))


# The folder -------------------------------------------------------------------------------------------------


def test_store_equals_memory_and_is_memory_mapped(tmp_path: Path, source: SomeBad) -> None:
    reading = Reading((16, 24), pooling="grid")
    stored = FeatureStore.write(tmp_path / "store", Averages(), source, reading, Decoding(2))
    memory = extract(Averages(), source, reading, Decoding(2))
    assert isinstance(stored.x, np.memmap)
    for name in ("x", "index", "labels", "masks", "mask_size"):
        np.testing.assert_array_equal(getattr(stored, name), getattr(memory, name))
    assert {k: v for k, v in stored.manifest.items() if k != "arrays"} == memory.manifest
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_matching_store_is_reused_and_any_other_replaced(
    tmp_path: Path, source: SomeBad, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = tmp_path / "store", Averages()
    FeatureStore.write(folder, model, source, Reading(16))
    stamp = (folder / "manifest.json").stat().st_mtime_ns
    FeatureStore.write(folder, model, source, Reading(16))
    assert (folder / "manifest.json").stat().st_mtime_ns == stamp
    with torch.no_grad():
        model.weight.mul_(3)
    again = FeatureStore.write(folder, model, source, Reading(16))
    assert again.manifest["checkpoint"] == digest(model)
    np.testing.assert_allclose(again.x, extract(model, source, Reading(16)).x)


def test_failure_leaves_the_old_store(tmp_path: Path, source: SomeBad) -> None:
    folder, model = tmp_path / "store", Averages()
    old = FeatureStore.write(folder, model, source, Reading(16)).x.copy()

    def stop(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FeatureStore.write(folder, model, source, Reading(24), Decoding(progress=stop))
    np.testing.assert_array_equal(FeatureStore.open(folder).x, old)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_other_folders_are_not_overwritten(tmp_path: Path, source: SomeBad) -> None:
    (tmp_path / "thesis.txt").write_text("three years")
    with pytest.raises(UserError, match="is not a feature store"):
        FeatureStore.write(tmp_path, Averages(), source, Reading(16))
    assert (tmp_path / "thesis.txt").read_text() == "three years"


def test_open_names_what_is_off(tmp_path: Path, source: SomeBad) -> None:
    folder = tmp_path / "store"
    FeatureStore.write(folder, Averages(), source, Reading(16))
    with pytest.raises(UserError, match=r"checkpoint = .*, not abc"):
        FeatureStore.open(folder, {"checkpoint": "abc"})
    data = (folder / "features.npy").read_bytes()
    (folder / "features.npy").write_bytes(data[:-4])
    with pytest.raises(UserError, match=r"damaged: features\.npy"):
        FeatureStore.open(folder)
    (folder / "features.npy").write_bytes(data)
    np.save(folder / "labels.npy", np.zeros(3, np.int64))
    with pytest.raises(UserError, match=r"labels\.npy has shape \(3,\)"):
        FeatureStore.open(folder)
    (folder / "labels.npy").unlink()
    with pytest.raises(UserError, match=r"labels\.npy"):
        FeatureStore.open(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json"):
        FeatureStore.open(folder)
    # and a damaged store is simply made again
    assert len(FeatureStore.write(folder, Averages(), source, Reading(16)).x) == 5


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(tmp_path: Path, source: SomeBad) -> None:
    folder = tmp_path / "store"
    writing = """
import fcntl, os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1]); folder.mkdir(); (folder / "features.npy").write_bytes(b"x")
handle = os.open(folder, os.O_RDONLY); fcntl.flock(handle, fcntl.LOCK_EX); print("locked", flush=True); time.sleep(60)
"""
    killed, alive = (tmp_path / f"{files.PARTIAL}store-{name}" for name in ("0000dead", "00000a11"))
    processes = [
        subprocess.Popen([sys.executable, "-c", writing, str(path)], stdout=subprocess.PIPE) for path in (killed, alive)
    ]
    try:
        assert [process.stdout.readline() for process in processes] == [b"locked\n"] * 2
        processes[0].kill()
        processes[0].wait()
        FeatureStore.write(folder, Averages(), source, Reading(16))
        assert sorted(path.name for path in tmp_path.iterdir()) == [alive.name, "store"]
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()


def test_a_store_has_the_rights_that_the_umask_leaves(tmp_path: Path, source: SomeBad) -> None:
    before = os.umask(0o027)
    try:
        FeatureStore.write(tmp_path / "store", Averages(), source, Reading(16))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "store").stat().st_mode) == 0o750
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "store").iterdir()} == {0o640}


@pytest.mark.parametrize("name", ["file/store", "a" * 300])
def test_where_nothing_can_be_written_nothing_is_computed(
    tmp_path: Path, source: SomeBad, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("nearfar.eval.features.store.stream", None)
    with pytest.raises(UserError, match="cannot be written to"):
        FeatureStore.write(tmp_path / name, Averages(), source, Reading(16))


@pytest.mark.parametrize(
    "change",
    [
        {"arrays": None}, {"arrays": ["features", "index", "../../secret"]}, {"arrays": ["index"]}, {"arrays": [[]]},
        {"shape": "5"}, {"shape": [5, -3]}, {"shape": None},
    ],
)  # fmt: skip
def test_a_crafted_manifest_is_refused(tmp_path: Path, source: SomeBad, change: dict[str, Any]) -> None:
    folder = tmp_path / "store"
    FeatureStore.write(folder, Averages(), source, Reading(16))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(UserError, match=r"manifest\.json"):
        FeatureStore.open(folder)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("labels", np.array(["a"] * 5)),
        ("labels", np.zeros((5, 2), np.int64)),
        ("index", np.zeros(5, np.float32)),
        ("features", np.zeros((5, 3), np.complex64)),
    ],
)
def test_arrays_of_another_kind_are_refused(tmp_path: Path, source: SomeBad, name: str, array: NDArray[Any]) -> None:
    folder = tmp_path / "store"
    FeatureStore.write(folder, Averages(), source, Reading(16))
    np.save(folder / f"{name}.npy", array)
    with pytest.raises(UserError, match=rf"damaged: {name}\.npy"):
        FeatureStore.open(folder)


def test_manifest_is_json(source: SomeBad) -> None:
    manifest = manifest_of(Averages(), source, Reading(16, layer="blocks-2"))
    assert json.loads(json.dumps(manifest)) == manifest


def test_masks_of_different_sizes_keep_their_own(tmp_path: Path) -> None:
    class Sizes(ArraySource):
        def mask(self, i: int) -> NDArray[Any]:
            return np.full((20 * (i + 1), 20 * (i + 1)), i, np.uint8)

    source = Sizes(np.zeros((3, 16, 16, 3), np.uint8))
    features = FeatureStore.write(tmp_path / "store", Averages(), source, Reading(16, pooling="grid"))
    assert [mask.shape for mask in features.mask_list()] == [(20, 20), (40, 40), (60, 60)]
    assert all((mask == i).all() for i, mask in enumerate(features.mask_list()))
    assert set(np.unique(features.masks)) == {0, 1, 2, 255}


def test_turned_mask_is_an_unreadable_image(images: NDArray[Any]) -> None:
    class Turned(ArraySource):
        def mask(self, i: int) -> NDArray[Any]:
            return np.zeros((24, 16) if i == 2 else (16, 24), np.uint8)

    source = Turned(images)
    for features in (extract(Averages(), source, Reading(16, pooling="grid")), pixel_grid(source, 16, 8)):
        assert features.index.tolist() == [0, 1, 3, 4, 5, 6]
        assert "mask of 16 x 24 does not fit an image of 24 x 16" in next(iter(features.manifest["bad"].values()))


# Pixels -----------------------------------------------------------------------------------------------------


def test_thumbnails_are_box_means(source: SomeBad, images: NDArray[Any]) -> None:
    x = pixel_features(source, side=2)
    expected = images[GOOD].reshape(5, 2, 8, 2, 12, 3).mean((2, 4)) / 255
    expected = ((expected - MEAN) / STD).reshape(5, -1)
    np.testing.assert_allclose(x.x, expected, atol=1 / 255 / 0.22)  # Pillow rounds to 8 bits in each direction
    assert x.labels.tolist() == [i % 3 for i in GOOD]


def test_pixel_grid_holds_each_patch(source: SomeBad, images: NDArray[Any]) -> None:
    grid = pixel_grid(source, (16, 24), 8)
    assert grid.x.shape == (5, 2, 3, 8 * 8 * 3)
    expected = (images[2, 8:16, 16:24] / 255 - MEAN) / STD
    np.testing.assert_allclose(grid.x[1, 1, 2], expected.reshape(-1), atol=1e-5)
    assert [mask[0, 0] for mask in grid.mask_list()] == GOOD


# Nothing is waited for --------------------------------------------------------------------------------------


class Log(TorchDispatchMode):
    """The operators that run, and which of their inputs and outputs are on which device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: tuple[Any, ...], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


WAITS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2", "equal", "is_nonzero"}


@pytest.mark.parametrize("layer", ["final", "blocks-2"])
@pytest.mark.parametrize("pooling", ["cls+mean", "grid"])
def test_nothing_but_the_features_leaves_the_device_in_the_loop(images: NDArray[Any], layer: str, pooling: str) -> None:
    model = create("vit_tiny_patch8_lgp_locat", img_size=16, embed_dim=24, depth=2, num_heads=2).eval()
    source = ArraySource(images[:, :16, :16])
    reading = Reading(16, layer=layer, pooling=pooling)
    manifest = manifest_of(model, source, reading)
    batches = stream(model, source, manifest, Decoding(2, 0))
    next(batches)  # set-up, and a batch ahead
    with Log() as log:
        next(batches)
    assert "linear" in log.names
    assert not WAITS & set(log.names)


@pytest.mark.parametrize("name", ["vit_tiny_patch8", "vim_tiny_patch8"])
def test_all_that_is_computed_is_on_the_backbones_device(images: NDArray[Any], name: str) -> None:
    """On the meta device, which refuses to meet tensors of another one."""
    model = create(name, img_size=16, embed_dim=24, depth=2).eval()
    reading = Reading(16, layer="blocks-2", pooling="cls+mean")
    manifest = manifest_of(model, ArraySource(images), reading)
    pixels = torch.from_numpy(images[:, :16, :16]).permute(0, 3, 1, 2)
    expected = Forward(model, manifest).on_device(pixels)
    forward = Forward(model.to("meta"), manifest)
    with Log() as log:
        x = forward.on_device(pixels.to(forward.device))
    assert (x.device.type, x.dtype, x.shape) == ("meta", torch.float32, expected.shape)
    assert not WAITS & set(log.names)


def test_pixels_are_normalized_as_for_training(images: NDArray[Any]) -> None:
    model = Averages()
    forward = Forward(model, manifest_of(model, ArraySource(images), Reading(16, layer="last-block", pooling="mean")))
    model.eval()
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    torch.testing.assert_close(
        forward(pixels).wait(), read(model, normalize_pixels(pixels), "last-block", "mean").detach().numpy(),
        rtol=0, atol=0,
    )  # fmt: skip


def test_bf16_is_said_in_the_manifest_and_changes_little(source: SomeBad) -> None:
    torch.manual_seed(0)
    model = create("vit_tiny_patch8", img_size=16, embed_dim=64, depth=2, num_heads=2)
    a, b = (extract(model, source, Reading(16, amp=amp)) for amp in (False, True))
    assert (a.manifest["compute"], b.manifest["compute"]) == ("float32", "bfloat16")
    assert 0 < np.abs(a.x - b.x).max() < 0.05
    assert b.x.dtype == np.float32
