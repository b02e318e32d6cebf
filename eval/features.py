"""Frozen features: images through a backbone once, then kept as arrays that every evaluator reads.

Pooled features see a center crop (`eval_view`); patch grids see the whole image, resized to `size`, so that a
mask of the original image still lies exactly under the grid. An image that cannot be read is left out
together with its label and mask, and named in the manifest.
"""

import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from nearfar.ssl import digests
from nearfar.ssl.backbones.tokens import Backbone, Tokens, check_divides
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.data.transforms.eval_view import eval_view
from nearfar.ssl.data.transforms.normalize import normalize_pixels
from nearfar.ssl.errors import BadImage, UserError

POOLINGS = ("cls", "mean", "cls+mean", "grid")
IGNORE = 255
Size = int | tuple[int, int]


@dataclass(frozen=True)
class Reading:
    """What decides a feature besides weights and images.

    size: the side of the square crop, or (H, W) of the whole image for grids. resize: shorter side before the crop
    (`eval_view`). layer, pooling: see `read` and `pool`. amp: bfloat16 autocast, float32 otherwise.
    """

    size: Size
    resize: int | None = None
    layer: str = "final"
    pooling: str = "cls"
    amp: bool = False


@dataclass(frozen=True)
class Decoding:
    """How images are read, which changes no feature: images a batch, processes (0: this one), and who is told how many
    images each batch had."""

    batch_size: int = 64
    workers: int = 0
    progress: Callable[[int], object] | None = None


DEFAULT_DECODING = Decoding()


@dataclass(frozen=True)
class Features:
    """One row an image, in source order without the unreadable images.

    x: (n, D), or (n, h, w, D) for grids; float32. labels: int64 (n,) or None. masks: uint8 (n, H, W) or None;
    smaller masks are filled up with 255 (ignore) below and right, and mask_size (n, 2) holds their true
    height and width. index: int64 (n,), the row of each in the source. manifest: JSON-able, what these
    features are (see `describe`).
    """

    x: np.ndarray
    index: np.ndarray
    labels: np.ndarray | None = None
    masks: np.ndarray | None = None
    mask_size: np.ndarray | None = None
    manifest: dict[str, Any] = field(default_factory=dict)

    def mask_list(self) -> list[np.ndarray]:
        """The masks at their own sizes, uint8 (H, W) each. Raises UserError where there are none."""
        if self.masks is None or self.mask_size is None:
            raise UserError("These features carry no masks: segmentation needs a source with masks, read as a grid.")
        return [mask[:h, :w] for mask, (h, w) in zip(self.masks, self.mask_size.tolist(), strict=True)]


# Reading a backbone -----------------------------------------------------------------------------------------


def pool(tokens: Tokens, pooling: str) -> Tensor:
    """Tokens of B images -> (B, D), (B, 2D) for "cls+mean", or (B, h, w, D) for "grid"."""
    if pooling == "cls":
        return tokens.cls
    if pooling == "mean":
        return tokens.mean
    if pooling == "cls+mean":
        return torch.cat([tokens.cls, tokens.mean], dim=-1)
    return tokens.patches.unflatten(1, tokens.grid)


def read(backbone: Backbone, images: Tensor, layer: str = "final", pooling: str = "cls") -> Tensor:
    """Features of normalized images (B, 3, H, W); several blocks are concatenated along the last axis,
    deepest last.

    layer "final": what the model outputs (final norm, and PRR when on). "last-block": the last block as it
    is, no norm and no PRR, as LocAt's dense evaluation reads it (docs/methods.md section 3). "blocks-N": the last N
    blocks, each through the final norm, no PRR; blocks-4 with CLS is DINO's linear protocol for ViT-S.
    """
    if layer == "final":
        return pool(backbone(images), pooling)
    if layer == "last-block":
        return pool(backbone.blocks(images, 1)[-1], pooling)
    blocks = backbone.blocks(images, _count(layer), norm=True)
    if pooling == "grid" and len({tokens.grid for tokens in blocks}) > 1:
        raise UserError(f"The grids of {layer} differ in size in this network: read a single layer of it.")
    return torch.cat([pool(tokens, pooling) for tokens in blocks], dim=-1)


def _count(layer: str) -> int:
    number = layer.removeprefix("blocks-")
    if number == layer or not number.isdigit() or int(number) < 1:
        raise UserError(f'Unknown layer "{layer}": use "final", "last-block", or "blocks-N" such as "blocks-4".')
    return int(number)


def digest(backbone: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of all parameters and buffers: which weights made a feature."""

    def parts() -> Iterator[bytes | memoryview]:
        for name, tensor in sorted(backbone.state_dict().items()):
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode()
            yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

    return digests.of_bytes(parts())


def describe(backbone: Backbone, source: Source, reading: Reading) -> dict[str, Any]:
    """What decides the values of a feature: equal descriptions mean equal features. JSON-able.

    Raises UserError for an unknown layer or pooling and for a size that the request cannot take.
    """
    height, width = _checked_size(backbone, reading)
    grid = reading.pooling == "grid"
    return {
        "format": 1,
        "checkpoint": digest(backbone),
        "arch": json.loads(json.dumps(backbone.arch)),  # as it will read back, tuples as lists
        "dataset": source.fingerprint,
        "images": len(source),
        "layer": reading.layer,
        "pooling": reading.pooling,
        "norm": reading.layer != "last-block",
        "prr": reading.layer == "final" and bool(backbone.arch.get("prr")),
        "size": [height, width],
        "view": "whole image" if grid else "center crop",
        "resize": reading.resize,
        "compute": "bfloat16" if reading.amp else "float32",
    }


def _checked_size(backbone: Backbone, reading: Reading) -> tuple[int, int]:
    """Height and width of a reading that this network can do."""
    if reading.layer not in ("final", "last-block"):
        _count(reading.layer)
    if reading.pooling not in POOLINGS:
        raise UserError(f'Unknown pooling "{reading.pooling}": use one of {", ".join(POOLINGS)}.')
    height, width = (reading.size, reading.size) if isinstance(reading.size, int) else reading.size
    if height < 1 or width < 1:
        raise UserError(f"Images cannot be {height} x {width} pixels.")
    if reading.pooling == "grid":
        check_divides(height, width, backbone.patch_size)  # or masks would not lie under their patches
    elif height != width:
        raise UserError(f"Pooled features read square center crops: give one size, not {height} x {width}.")
    elif reading.resize is not None and reading.resize < height:
        raise UserError(f"A crop of {height} pixels does not fit into images resized to {reading.resize}.")
    return height, width


def extract(backbone: Backbone, source: Source, reading: Reading, decoding: Decoding = DEFAULT_DECODING) -> Features:
    """Features of every readable image of `source`, in memory, on the backbone's own device and in eval mode.

    The global random state is neither read nor changed. Raises UserError as `describe` does, and when no image can be
    read.
    """
    manifest = describe(backbone, source, reading)
    parts: list[np.ndarray] = []
    rows = ReadRows()
    for batch, x in stream(backbone, source, manifest, decoding):
        rows.add(batch)
        if x is not None:
            parts.append(x)
    return rows.features(np.concatenate(parts) if parts else np.empty(0), source, manifest)


# Images -> batches ------------------------------------------------------------------------------------------


def fitting_mask(source: Source, i: int, image: Image.Image) -> tuple[np.ndarray | None, str | None]:
    """The mask of image i, at any resolution, and in words where that is not the image's.

    Raises BadImage where its shape is another (say turned by 90 degrees).
    """
    mask = source.mask(i)
    if mask is None or mask.shape[::-1] == image.size:
        return mask, None
    (height, width), (image_width, image_height) = mask.shape, image.size
    if abs(height * image_width - width * image_height) > max(height * image_width, width * image_height) / 20:
        why = f"its mask of {width} x {height} does not fit an image of {image_width} x {image_height}"
        raise BadImage(source.name(i), why)
    return mask, f"{source.name(i)}: {image_width} x {image_height}, its mask {width} x {height}"


@dataclass(frozen=True)
class DecodedBatch:
    images: Tensor | None  # uint8 (B, 3, H, W); None when no image of the batch could be read
    index: list[int]
    masks: list[np.ndarray | None]
    bad: list[tuple[str, str]]
    rescaled: list[str]  # masks of another resolution than their image, in words


class _Images(Dataset):
    """What the workers run: one image (and its mask) at evaluation size, or the reason why there is none."""

    def __init__(self, source: Source, size: tuple[int, int], resize: int | None, whole: bool) -> None:
        self.source, self.size, self.resize, self.whole = source, size, resize, whole

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> DecodedBatch:
        try:
            image = self.source.read(i)
            mask, rescaled = fitting_mask(self.source, i, image) if self.whole else (None, None)
        except BadImage as error:
            return DecodedBatch(None, [], [], [(error.name, error.why)], [])
        height, width = self.size
        if self.whole:
            if image.size != (width, height):
                image = image.resize((width, height), Image.Resampling.BICUBIC)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        else:
            pixels = torch.as_tensor(eval_view(image, height, self.resize))
        return DecodedBatch(pixels.contiguous(), [i], [mask], [], [rescaled] if rescaled else [])


def _collate(items: list[DecodedBatch]) -> DecodedBatch:
    images = [item.images for item in items if item.images is not None]
    return DecodedBatch(
        torch.stack(images) if images else None,
        [i for item in items for i in item.index],
        [mask for item in items for mask in item.masks],
        [bad for item in items for bad in item.bad],
        [words for item in items for words in item.rescaled],
    )


def _quiet_worker(_: int) -> None:
    # signals are the main process's business: it stops its workers when it leaves
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def stream(
    backbone: Backbone, source: Source, manifest: dict[str, Any], decoding: Decoding
) -> Iterator[tuple[DecodedBatch, np.ndarray | None]]:
    """(what was read, float32 features of it or None) batch by batch, in source order."""
    height, width = manifest["size"]
    loader = DataLoader(
        _Images(source, (height, width), manifest["resize"], whole=manifest["pooling"] == "grid"),
        batch_size=decoding.batch_size,
        num_workers=decoding.workers,
        collate_fn=_collate,
        worker_init_fn=_quiet_worker,
        generator=torch.Generator(),  # else the loader draws from, and so changes, the global random state
    )
    device = next(backbone.parameters()).device
    amp = torch.autocast(device.type, torch.bfloat16, enabled=manifest["compute"] == "bfloat16")
    training = [module for module in backbone.modules() if module.training]
    backbone.eval()
    try:
        for batch in loader:
            if batch.images is None:
                yield batch, None
            else:
                with torch.inference_mode(), amp:
                    images = normalize_pixels(batch.images.to(device))
                    x = read(backbone, images, manifest["layer"], manifest["pooling"])
                yield batch, x.float().cpu().numpy()
            if decoding.progress:
                decoding.progress(len(batch.index) + len(batch.bad))
    finally:
        for module in training:
            module.training = True


class ReadRows:
    """What is collected beside the features themselves."""

    def __init__(self) -> None:
        self.index: list[int] = []
        self.masks: list[np.ndarray | None] = []
        self.bad: dict[str, str] = {}
        self.rescaled: list[str] = []

    def add(self, batch: DecodedBatch) -> None:
        self.index += batch.index
        self.masks += batch.masks
        self.bad |= dict(batch.bad)
        self.rescaled += batch.rescaled

    def features(self, x: np.ndarray, source: Source, manifest: dict[str, Any]) -> Features:
        if not self.index:
            some = "; ".join(f"{name}: {why}" for name, why in list(self.bad.items())[:3])
            raise UserError(f"None of the {len(source)} images could be read, so there are no features. {some}")
        index = np.asarray(self.index, dtype=np.int64)
        labels = None if source.labels is None else np.asarray(source.labels, dtype=np.int64)[index]
        masks, mask_size = self._stack()
        manifest = {**manifest, "shape": list(x.shape), "dtype": str(x.dtype), "bad": self.bad}
        manifest["classes"] = source.classes
        if self.rescaled:
            manifest["rescaled_masks"] = {"count": len(self.rescaled), "first": self.rescaled[0]}
        return Features(x, index, labels, masks, mask_size, manifest)

    def _stack(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        masks = [mask for mask in self.masks if mask is not None]
        if not masks:
            return None, None
        if len(masks) < len(self.masks):
            raise UserError(
                f"Only {len(masks)} of {len(self.masks)} images have a mask: give every image one "
                f"(all {IGNORE} = ignore is allowed), or leave the masks out."
            )
        size = np.asarray([mask.shape for mask in masks], dtype=np.int64)
        stacked = np.full((len(masks), *size.max(0)), IGNORE, dtype=np.uint8)
        for row, mask in zip(stacked, masks, strict=True):
            row[: mask.shape[0], : mask.shape[1]] = mask
        return stacked, size
