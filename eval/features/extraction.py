"""Frozen features: images through a backbone once, then kept as arrays that every evaluator reads.

Pooled features see a center crop (`eval_view`); patch grids see the whole image, resized to `size`, so that a
mask of the original image still lies exactly under the grid. An image that cannot be read is left out
together with its label and mask, and named in the manifest.
"""

import json
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nearfar.eval.features import sharing
from nearfar.eval.features.images import DecodedBatch, Decoding, View, batches, default_workers
from nearfar.ssl.backbones.tokens import Backbone, Tokens, check_divides
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.data.transforms.normalize import normalize_pixels
from nearfar.ssl.disk import digests
from nearfar.ssl.errors import UserError
from nearfar.ssl.parallel import distributed

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


DEFAULT_DECODING = Decoding()


@dataclass(frozen=True)
class Features:
    """One row an image, in source order without the unreadable images.

    x: (n, D), or (n, h, w, D) for grids; float32. labels: int64 (n,) or None. masks: uint8 (n, H, W) or None;
    smaller masks are filled up with 255 (ignore) below and right, and mask_size (n, 2) holds their true
    height and width. index: int64 (n,), the row of each in the source. manifest: JSON-able, what these
    features are (see `manifest_of`).
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
    blocks, each through the final norm, no PRR; blocks-4 with CLS is DINO's linear protocol for ViT-S. Several of them
    joined by "+", as in "final+blocks-4": one after the other along the last axis.
    """
    if "+" in layer:
        return torch.cat(_read_each(backbone, images, layer.split("+"), pooling), dim=-1)
    if layer == "final":
        return pool(backbone(images), pooling)
    if layer == "last-block":
        return pool(backbone.blocks(images, 1)[-1], pooling)
    blocks = backbone.blocks(images, _count(layer), norm=True)
    if pooling == "grid" and len({tokens.grid for tokens in blocks}) > 1:
        raise UserError(f"The grids of {layer} differ in size in this network: read a single layer of it.")
    return torch.cat([pool(tokens, pooling) for tokens in blocks], dim=-1)


def _read_each(backbone: Backbone, images: Tensor, layers: Sequence[str], pooling: str) -> list[Tensor]:
    """`read` of each layer; all of `blocks-N` share one pass through the network."""
    counts = {layer: _count(layer) for layer in layers if layer not in ("final", "last-block")}
    blocks = backbone.blocks(images, max(counts.values()), norm=True) if counts else []
    pooled = [pool(tokens, pooling) for tokens in blocks]
    return [
        torch.cat(pooled[-counts[layer] :], dim=-1) if layer in counts else read(backbone, images, layer, pooling)
        for layer in layers
    ]


def layer_count(layer: str) -> int:
    """Of how many blocks a layer is made. Raises UserError for an unknown one."""
    return 1 if layer in ("final", "last-block") else _count(layer)


def _count(layer: str) -> int:
    number = layer.removeprefix("blocks-")
    if number == layer or not number.isdigit() or int(number) < 1:
        raise UserError(f'Unknown layer "{layer}": use "final", "last-block", or "blocks-N" such as "blocks-4".')
    return int(number)


def digest(backbone: nn.Module) -> str:
    """SHA-256 of all parameters and buffers: which weights made a feature."""
    return digests.of_tensors(backbone.state_dict())


def manifest_of(backbone: Backbone, source: Source, reading: Reading) -> dict[str, Any]:
    """What decides the values of a feature: equal descriptions mean equal features. JSON-able.

    Raises UserError for an unknown layer or pooling and for a size that does not fit the network or the pooling.
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
    """Height and width of a reading, checked against what this network can take."""
    for layer in reading.layer.split("+"):
        layer_count(layer)
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

    The global random state is neither read nor changed. Raises UserError as `manifest_of` does, and when no image can
    be read.
    """
    manifest = manifest_of(backbone, source, reading)
    x, done, rows = np.empty(0, np.float32), 0, ReadRows()
    for batch, part in stream(backbone, source, manifest, decoding):
        rows.add(batch)
        if part is not None:
            if not done:
                x = np.empty((len(source), *part.shape[1:]), np.float32)
            x[done : done + len(part)] = part
            done += len(part)
    return rows.features(x[:done], source, manifest)


# Batches -> features ----------------------------------------------------------------------------------------


def stream(
    backbone: Backbone, source: Source, manifest: dict[str, Any], decoding: Decoding, start: int = 0
) -> Iterator[tuple[DecodedBatch, np.ndarray | None]]:
    """(what was read, float32 features of it or None) batch by batch, in source order, from image `start` on.

    A batch is computed while the features of the one before are copied to the host. With `decoding.shared`, all ranks
    of the job compute, and the first one, which calls this, receives all batches.
    """
    numbers = _numbers(source, decoding.batch_size, start)
    if decoding.shared and distributed.count() > 1:
        sharing.announce(manifest, decoding.batch_size, start)
        own = _computed(backbone, source, manifest, decoding, numbers[:: distributed.count()])
        found: Generator[sharing.Computed] = sharing.in_order(own, len(numbers))
    else:
        found = own = _computed(backbone, source, manifest, decoding, numbers)
    try:
        for batch, x in found:
            yield batch, x
            if decoding.progress:
                decoding.progress(len(batch.index) + len(batch.bad))
    finally:
        found.close()  # what the other ranks were asked for
        own.close()  # its threads or processes, and the backbone's mode


def compute_share(backbones: Iterable[Backbone], sources: Iterable[Source], decoding: Decoding) -> None:
    """Compute this rank's share of every extraction that the first rank does with `Decoding.shared`, until that one
    calls `nearfar.eval.features.sharing.dismiss`.

    Raises:
        UserError: the first rank has other weights or images than these.
        PeerError, from `nearfar.ssl.parallel.distributed.joined`: it has ended.
    """
    by_digest = {digest(backbone): backbone for backbone in backbones}
    by_fingerprint = {source.fingerprint: source for source in sources}
    while (job := sharing.announced()) is not None:
        manifest = job["manifest"]
        backbone = sharing.find("weights", manifest["checkpoint"], by_digest)
        source = sharing.find("images", manifest["dataset"], by_fingerprint)
        numbers = _numbers(source, job["batch_size"], job["start"])[distributed.rank() :: distributed.count()]
        with closing(_computed(backbone, source, manifest, decoding, numbers)) as computed:
            sharing.send(computed)


def _numbers(source: Source, batch_size: int, start: int) -> list[range]:
    n = len(source)
    return [range(first, min(first + batch_size, n)) for first in range(start, n, batch_size)]


def _computed(
    backbone: Backbone, source: Source, manifest: dict[str, Any], decoding: Decoding, numbers: Sequence[range]
) -> Generator[tuple[DecodedBatch, np.ndarray | None], None, None]:
    """What this process computes of `stream`."""
    forward = Forward(backbone, manifest)
    view = View(tuple(manifest["size"]), manifest["resize"], whole=manifest["pooling"] == "grid")
    workers = decoding.workers
    if workers is None:
        workers = default_workers(forward.device, len(numbers))
    before: tuple[DecodedBatch, PendingFeatures | None] | None = None
    with eval_mode(backbone):
        for batch in batches(source, view, numbers, workers=workers, pinned=forward.device.type == "cuda"):
            now = batch, None if batch.images is None else forward(batch.images)
            if before:
                yield before[0], before[1] and before[1].wait()
            before = now
        if before:
            yield before[0], before[1] and before[1].wait()


class PendingFeatures(NamedTuple):
    """Features in host memory that a GPU may still be writing."""

    features: Tensor
    copied: torch.cuda.Event | None

    def wait(self) -> np.ndarray:
        array: np.ndarray = self.features.numpy()
        if self.copied is None:
            return array
        self.copied.synchronize()
        return array.copy()  # so that the pinned memory can be reused


class Forward:
    """Images -> features on the backbone's device. Copies to and from a GPU are asynchronous, through pinned memory."""

    def __init__(self, backbone: Backbone, manifest: dict[str, Any]) -> None:
        self.backbone, self.layer, self.pooling = backbone, manifest["layer"], manifest["pooling"]
        self.device = next(backbone.parameters()).device
        self.bf16 = manifest["compute"] == "bfloat16"

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> PendingFeatures:
        """uint8 (B, 3, H, W) on the host -> float32 features."""
        x = self.on_device(images.to(self.device, non_blocking=True))
        if self.device.type != "cuda":
            return PendingFeatures(x.cpu(), None)
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        host.copy_(x, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return PendingFeatures(host, copied)

    @torch.inference_mode()
    def on_device(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 features, both on the backbone's device."""
        with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            return read(self.backbone, normalize_pixels(images), self.layer, self.pooling).float()


@contextmanager
def eval_mode(backbone: nn.Module) -> Iterator[None]:
    training = [module for module in backbone.modules() if module.training]
    backbone.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class ReadRows:
    """What is collected of the images besides their features."""

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
