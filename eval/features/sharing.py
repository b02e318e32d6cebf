"""One extraction by all ranks of a job: the first announces it, each of n ranks computes every n-th batch, and the
first asks each for its next one and receives them in order; it may stop before the end. Batches are cut alike whatever
the number of ranks, so the features are the same too.

What is announced is the manifest, which names weights and images by their digests: the other ranks look both up among
their own, and cannot compute anything else. Nothing but JSON and raw arrays goes from one process to another.
"""

import json
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nearfar.eval.features.images import DecodedBatch
from nearfar.ssl.errors import UserError
from nearfar.ssl.parallel import distributed

Computed = tuple[DecodedBatch, np.ndarray | None]


def announce(manifest: dict[str, Any], batch_size: int, start: int) -> None:
    """Tell the ranks that wait in `nearfar.eval.features.extraction.compute_share` what to extract now."""
    distributed.from_first(lambda: {"manifest": manifest, "batch_size": batch_size, "start": start})


def dismiss() -> None:
    """Let the waiting ranks go: there is nothing more to compute."""
    distributed.from_first(lambda: None)


def announced() -> dict[str, Any] | None:
    """What the first rank announces next; None when it has nothing more to compute."""
    return distributed.from_first(lambda: None)


class _Requests:
    """What the first rank asks of another one, which sends a batch for each request and meanwhile computes the next."""

    def __init__(self, rank: int, batches: int) -> None:
        self.rank, self.left, self.requested = rank, batches, False
        self._last: tuple[Tensor, dist.Work | None] | None = None  # kept until it has arrived
        self._ask()

    def _ask(self) -> None:
        self.requested = self.left > 0
        if self.requested:
            self._send(1)
            self.left -= 1

    def _send(self, request: int) -> None:
        self._arrived()
        message = torch.tensor([request])
        self._last = message, dist.isend(message, self.rank)

    def _arrived(self) -> None:
        if self._last and self._last[1]:
            self._last[1].wait()

    def take(self) -> Computed:
        found = _receive(self.rank)
        self._ask()
        return found

    def end(self) -> None:
        """Take what was asked for, and ask for nothing more."""
        if self.left:
            self.left = 0
            self._send(0)
        if self.requested:
            self.take()
        self._arrived()


def in_order(own: Iterator[Computed], count: int) -> Generator[Computed]:
    """On the first rank: all `count` batches in order, its own and those that it receives from the others. Closed
    early, it lets the others go after the one batch that each was asked for. What fails in here is left as it is: then
    nobody knows which message is next, and the end of this process tells the others."""
    ranks = distributed.count()
    others = [_Requests(rank, len(range(rank, count, ranks))) for rank in range(1, ranks)]
    for number in range(count):
        rank = number % ranks
        found = next(own) if rank == 0 else others[rank - 1].take()
        try:
            yield found
        except GeneratorExit:
            for other in others:
                other.end()
            raise
    for other in others:
        other.end()


def send(computed: Iterable[Computed]) -> None:
    """On another rank: its batches to the first, as long as that one asks for them."""
    before: tuple[list[Tensor], list[dist.Work]] = [], []
    request = torch.empty(1, dtype=torch.int64)
    for batch, x in computed:
        dist.recv(request, 0)
        if not request:
            break
        parts = _packed(batch, x)
        works = [dist.isend(part, 0) for part in parts]
        _wait(before[1])
        before = parts, [work for work in works if work is not None]
    _wait(before[1])


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


def _packed(batch: DecodedBatch, x: np.ndarray | None) -> list[Tensor]:
    """A batch without its images, as arrays: the length of a header, the header, features, masks."""
    masks = [mask for mask in batch.masks if mask is not None]
    header = {
        "index": batch.index,
        "bad": batch.bad,
        "rescaled": batch.rescaled,
        "masks": [None if mask is None else list(mask.shape) for mask in batch.masks],
        "x": None if x is None else list(x.shape),
    }
    text = torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8)
    parts = [torch.tensor([len(text)]), text]
    if x is not None:
        parts.append(torch.from_numpy(np.ascontiguousarray(x, np.float32)))
    if masks:
        parts.append(torch.from_numpy(np.concatenate([mask.reshape(-1) for mask in masks])))
    return parts


def _receive(rank: int) -> Computed:
    size = torch.empty(1, dtype=torch.int64)
    dist.recv(size, rank)
    text = torch.empty(int(size), dtype=torch.uint8)
    dist.recv(text, rank)
    header = json.loads(text.numpy().tobytes())
    x = None
    if header["x"] is not None:
        features = torch.empty(header["x"], dtype=torch.float32)
        dist.recv(features, rank)
        x = features.numpy()
    shapes = [None if shape is None else tuple(shape) for shape in header["masks"]]
    masks: list[np.ndarray | None] = [None] * len(shapes)
    if total := sum(h * w for h, w in (shape for shape in shapes if shape is not None)):
        flat = torch.empty(total, dtype=torch.uint8)
        dist.recv(flat, rank)
        done, pixels = 0, flat.numpy()
        for i, shape in enumerate(shapes):
            if shape is not None:
                masks[i] = pixels[done : done + shape[0] * shape[1]].reshape(shape)
                done += shape[0] * shape[1]
    bad = [(name, why) for name, why in header["bad"]]
    return DecodedBatch(None, header["index"], masks, bad, header["rescaled"]), x


def find(what: str, key: str, known: dict[str, Any]) -> Any:
    """The weights or images with this digest. Raises UserError where this rank has none such."""
    if key not in known:
        raise UserError(
            f"This rank has different {what} from the first one: all machines of a job must read the same files."
        )
    return known[key]
