"""Weighted k-nearest neighbors on frozen features (docs/methods.md section 5): nothing is trained here."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfar.eval.arrays import Array, labeled
from nearfar.ssl.errors import UserError

KS = (10, 20, 100, 200)
_CHUNK = 2**24  # similarities held at once: 64 MiB of float32


def knn(
    train_x: Array,
    train_y: Array,
    test_x: Array,
    test_y: Array,
    ks: Iterable[int] = KS,
    temperature: float = 0.07,
) -> dict[int, float]:
    """Top-1 in percent for every k: cosine neighbors vote for their class with weight exp(similarity /
    temperature).

    train_x (n, D), train_y (n,), test_x (m, D), test_y (m,); rows are L2-normalized here. The keys of the
    result are the k really used: a k beyond n becomes n (once). Equal similarities go to the smaller training
    index, equal votes to the smaller class, so the answer does not depend on chunking or sorting. DINO, Caron
    et al. 2021. Raises UserError for empty, unequal or non-finite arrays and for k < 1.
    """
    x, y = labeled(train_x, train_y, "training set of the k-NN")
    queries, truth = labeled(test_x, test_y, "test set of the k-NN")
    if x.shape[1] != queries.shape[1]:
        raise UserError(f"k-NN: training features have {x.shape[1]} dimensions, test features {queries.shape[1]}.")
    wanted = sorted({min(k, len(x)) for k in ks})
    if not wanted or wanted[0] < 1:
        raise UserError(f"k-NN needs at least one k, and every k at least 1; got {list(ks)}.")

    x = F.normalize(x, dim=1)
    queries = F.normalize(queries.to(x.device), dim=1)
    classes = int(torch.maximum(y.max(), truth.max().to(y.device))) + 1
    labels, truth = y.cpu(), truth.cpu()
    hits = dict.fromkeys(wanted, 0)
    rows = max(1, _CHUNK // len(x))
    for start in range(0, len(queries), rows):
        similarity, index = _nearest(queries[start : start + rows] @ x.T, wanted[-1])
        # float64 on the CPU: one order of summation everywhere, and rounding decides no close vote
        weight = (similarity.cpu().double() / temperature).exp()
        voter = labels[index.cpu()]
        votes = torch.zeros(len(weight), classes, dtype=torch.float64)
        done = 0
        for k in wanted:
            votes.scatter_add_(1, voter[:, done:k], weight[:, done:k])
            hits[k] += int((votes.argmax(1) == truth[start : start + rows]).sum())
            done = k
    return {k: 100.0 * hit / len(queries) for k, hit in hits.items()}


def _nearest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, in order; equal values by index. (m, n) -> (m, k), (m, k)."""
    value, index = similarity.topk(k, dim=1)
    # topk picks arbitrarily among values equal to the last one; only such rows pay for a full stable sort
    tied = torch.nonzero((similarity >= value[:, -1:]).sum(1) > k).flatten()
    if len(tied):
        full, order = similarity[tied].sort(dim=1, descending=True, stable=True)
        value[tied], index[tied] = full[:, :k], order[:, :k]
    index, by_index = index.sort(dim=1)
    value, by_value = value.gather(1, by_index).sort(dim=1, descending=True, stable=True)
    return value, index.gather(1, by_value)
