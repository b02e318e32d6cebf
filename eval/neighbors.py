"""Exact nearest neighbors by cosine among more rows than fit in memory: tiles of both sides, a running top-k.

A similarity is *defined* so that no order of summation can change it: rows are scaled to length 1 and rounded to
multiples of 2**-26, so that every product is a multiple of 2**-52 and, by Cauchy-Schwarz, no partial sum exceeds 2:
float64 adds such numbers without rounding. A float32 product finds the candidates, with a margin for its rounding, and
only they are scored in float64. Tiling, device and number of threads therefore change nothing, ties included.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nearfar.eval.arrays import Array, on_host, refuse_broken, take
from nearfar.ssl.errors import UserError

_TILE = 4096  # rows of the memory held as float32 at once
_QUERIES = 1024  # queries compared with a tile at once: 16 MiB of float32 similarities
_GROUP = 32  # similarities that are skipped together when the largest of them is no candidate
_BLOCK_BYTES = 2**30  # at most, for the running lists of one pass over the memory
_PLACES = 2.0**26


def neighbors(
    memory: Array, queries: Array, k: int, *, device: torch.device | str = "cpu", leave_one_out: bool = False
) -> tuple[Tensor, Tensor]:
    """The k rows of `memory` (n, D) nearest to each of `queries` (m, D) by cosine, best first; k at most n.

    Arrays of float16, float32 or float64, memory-mapped ones too: neither is ever copied as a whole, and about 2 GiB
    are needed besides them. Returns similarity float64 (m, k) and index int64 (m, k), on the CPU; equal similarities
    go to the smaller index. leave_one_out: query i is row i of the memory, which is then no neighbor of itself
    (k at most n - 1). Raises UserError for rows that are not finite.
    """
    n = len(memory) - leave_one_out
    if not 1 <= k <= n:
        raise UserError(f"The number of neighbors must be between 1 and {n}, the size of the memory, not {k}.")
    device, needed = torch.device(device), k + leave_one_out
    found = [
        part
        for rows in _blocks(len(queries), needed)
        for part in _search(memory, [queries[a:b] for a, b in rows], needed, device, torch.float32)
    ]
    similarity, index = torch.cat([value for value, _ in found]), torch.cat([index for _, index in found])
    if not leave_one_out:
        return similarity, index
    # the list without the query itself; a query behind more than k exact copies of it is not on its own list
    itself = index == torch.arange(len(index))[:, None]
    itself[:, -1] |= ~itself.any(1)
    return similarity[~itself].view(-1, k), index[~itself].view(-1, k)


def _blocks(m: int, k: int) -> Iterator[list[tuple[int, int]]]:
    """Ranges of query rows; what one block holds is searched in one pass over the memory."""
    chunks = max(1, _BLOCK_BYTES // (_QUERIES * _width(k) * 48))
    starts = list(range(0, m, _QUERIES))
    for first in range(0, len(starts), chunks):
        yield [(a, min(a + _QUERIES, m)) for a in starts[first : first + chunks]]


def _width(k: int) -> int:
    """Candidates kept for each query: room for those that float32 cannot tell from the k-th."""
    return k + max(32, k // 2)


def _search(
    memory: Array, queries: list[Array], k: int, device: torch.device, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """Of each chunk of queries: similarity (q, k) and index (q, k) on the CPU."""
    chunks = [_Candidates(_rows(part, device), k, len(memory), dtype) for part in queries]
    buffer = torch.empty((_TILE + _GROUP) * _QUERIES, dtype=dtype, device=device)
    for start in range(0, len(memory), _TILE):
        tile = unit(_rows(memory[start : start + _TILE], device), dtype)
        for chunk in chunks:
            chunk.offer(tile, start, buffer)
    found = []
    for chunk, part in zip(chunks, queries, strict=True):
        chunk.merge()
        if dtype == torch.float64:
            found.append((chunk.value.cpu(), chunk.index.cpu()))
            continue
        value, index = _rescored(chunk, memory, device)
        # too many neighbors equal to within float32 (duplicates, a collapsed network): these queries in float64
        lost = torch.nonzero(chunk.lost).flatten().cpu()
        if len(lost):
            ((value[lost], index[lost]),) = _search(memory, [take(part, lost)], k, device, torch.float64)
        found.append((value, index))
    return found


class _Candidates:
    """The running lists of one chunk of queries, always holding every row that may be among the k nearest."""

    def __init__(self, queries: Tensor, k: int, n: int, dtype: torch.dtype) -> None:
        self.exact = dtype == torch.float64
        self.queries, self.k, self.n = torch.from_numpy(exact_unit(on_host(queries))), k, n
        self.factor = self.queries.T.contiguous().to(queries.device, dtype)
        self.margin = 0.0 if self.exact else 2 * rounding(queries.shape[1])
        self.width = k if self.exact else _width(k)
        size, device = (len(queries), self.width), queries.device
        self.value = torch.full(size, -torch.inf, dtype=dtype, device=device)
        self.index = torch.full(size, n, device=device)
        self.floor = torch.full(size[:1], -torch.inf, dtype=dtype, device=device)  # only what exceeds it is new
        self.lost = torch.zeros(size[0], dtype=torch.bool, device=device)
        self.pending: list[tuple[Tensor, Tensor, Tensor]] = []  # query, index, similarity
        self.waiting = 0

    def offer(self, tile: Tensor, start: int, buffer: Tensor) -> None:
        """Take what may be among the nearest from rows `start`, ... of the memory (t, D), as unit vectors.

        buffer: room for the similarities. Allocating it for every product would take longer than searching the product.
        """
        padded = -(-len(tile) // _GROUP) * _GROUP
        similarity = buffer[: padded * len(self.value)].view(padded, -1)
        torch.mm(tile, self.factor, out=similarity[: len(tile)])
        similarity[len(tile) :] = -torch.inf
        groups = similarity.unflatten(0, (-1, _GROUP))
        group, query = torch.nonzero(groups.amax(1) > self.floor, as_tuple=True)
        if 8 * len(group) <= groups.shape[0] * groups.shape[2]:
            value = groups[group, :, query]
            which, offset = torch.nonzero(value > self.floor[query, None], as_tuple=True)
            found = query[which], start + group[which] * _GROUP + offset, value[which, offset]
        else:
            found = self._many(similarity[: len(tile)], start)
        if len(found[0]):
            self.pending.append(found)
            self.waiting += len(found[0])
        if self.waiting > len(self.value) * self.k:
            self.merge()

    def _many(self, similarity: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """What `offer` finds early on, when much exceeds the floor: at most `width` for each query."""
        over = similarity > self.floor
        if int(torch.count_nonzero(over)) <= len(self.value) * self.width:
            row, query = torch.nonzero(over, as_tuple=True)
            return query, row + start, similarity[row, query]
        value, row = self._largest(similarity)
        query = torch.arange(value.shape[1], device=row.device).expand_as(row)
        new = value > self.floor
        return query[new], row[new] + start, value[new]

    def _largest(self, similarity: Tensor) -> tuple[Tensor, Tensor]:
        """The `width` largest of each column of (t, q) and their rows; in float64 equal ones by row."""
        count = min(self.width, len(similarity))
        columns = similarity.T.contiguous()
        if self.exact:
            value, row = columns.sort(dim=1, descending=True, stable=True)
        else:
            value, row = columns.topk(count, dim=1)
        return value[:, :count].T, row[:, :count].T

    def merge(self) -> None:
        """Put what is pending into the lists, and raise the floor."""
        if not self.pending:
            return
        query, index, value = (torch.cat(part) for part in zip(*self.pending, strict=True))
        self.pending, self.waiting = [], 0
        order = (query * self.n + index).argsort()  # by query, then by index: a stable sort keeps ties in this order
        query, index, value = query[order], index[order], value[order]
        count = torch.bincount(query, minlength=len(self.value))
        slot = self.width + torch.arange(len(query), device=query.device) - (count.cumsum(0) - count)[query]
        longer = (0, int(count.max()) if len(count) else 0)
        values, indices = F.pad(self.value, longer, value=-torch.inf), F.pad(self.index, longer, value=self.n)
        values[query, slot], indices[query, slot] = value, index
        values, order = values.sort(dim=1, descending=True, stable=True)
        self.value = values[:, : self.width].contiguous()
        self.index = indices.gather(1, order[:, : self.width])
        self.floor = self.value[:, self.k - 1] - self.margin
        if not self.exact:
            self.lost |= (self.value[:, -1] >= self.floor) & (self.floor > -torch.inf)
            self.floor[self.lost] = torch.inf


def _rescored(chunk: _Candidates, memory: Array, device: torch.device) -> tuple[Tensor, Tensor]:
    """The lists by similarity in float64, then by index: (q, k), (q, k) on the CPU."""
    index, by_index = chunk.index.sort(dim=1)
    kept = (chunk.value > chunk.floor[:, None]).gather(1, by_index) & (index < chunk.n)
    index, kept, queries = index.cpu(), kept.cpu(), chunk.queries.numpy()
    value = np.full(index.shape, -np.inf)
    for i in range(len(value)):
        near = exact_unit(on_host(take(memory, index[i][kept[i]])))
        value[i, kept[i].numpy()] = np.einsum("ij,j->i", near, queries[i])
    best, order = torch.from_numpy(value).sort(dim=1, descending=True, stable=True)
    return best[:, : chunk.k], index.gather(1, order)[:, : chunk.k]


# Rows -> unit vectors ---------------------------------------------------------------------------------------------


def unit(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows (n, D) scaled to length 1, in float64 as `exact_unit` does it, in float32 to the last few bits."""
    if dtype == torch.float32:
        x = x.float()
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        low, high = norm.aminmax()
        if low > 1e-15 and high < 1e15:  # else squares may have left float32's range, or a row is zero or broken
            return x / norm
    return torch.from_numpy(exact_unit(on_host(x))).to(x.device, dtype)


def exact_unit(x: np.ndarray) -> np.ndarray:
    """Rows (n, D) scaled to length 1 and rounded to 26 binary places, float64; rows of zeros stay zeros.

    Raises UserError for rows that are not finite.
    """
    x = x.astype(np.float64)
    norm = np.sqrt(np.einsum("ij,ij->i", x, x))
    if not np.isfinite(norm).all():
        refuse_broken(torch.from_numpy(x), "features of the k-NN")
    x *= (_PLACES / np.maximum(norm, 1e-300))[:, None]
    np.rint(x, out=x)
    x /= _PLACES
    return x


def rounding(dim: int) -> float:
    """By how much a float32 product of two such rows of `dim` numbers may miss their similarity."""
    # D + 2 roundings in the product, D / 2 + 2 in each norm (Higham 2002, section 3.1); TF32 and bfloat16 products
    # round what goes in as well
    coarse = 0.0 if torch.get_float32_matmul_precision() == "highest" else 2.0**-7
    return (2 * dim + 32) * 2.0**-24 + coarse


def _rows(x: Array, device: torch.device) -> Tensor:
    if isinstance(x, np.ndarray):
        x = torch.from_numpy(np.array(x))  # a memory map is read here, and only these rows
    return x.to(device)
