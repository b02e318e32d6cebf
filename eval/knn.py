"""Weighted k-nearest neighbors on frozen features (docs/methods.md section 5): nothing is trained here."""

from collections.abc import Iterable

import torch
from torch import Tensor

from nearfar.eval.arrays import Array, check_labeled
from nearfar.eval.neighbors import neighbors
from nearfar.ssl.errors import UserError

KS = (10, 20, 100, 200)
_VOTES = 2**25  # votes held at once: 256 MiB of float64


def knn(
    train_x: Array,
    train_y: Array,
    test_x: Array,
    test_y: Array,
    ks: Iterable[int] = KS,
    temperature: float = 0.07,
    device: torch.device | str = "cpu",
) -> dict[int, float]:
    """Top-1 in percent for every k: cosine neighbors vote for their class with weight exp(similarity /
    temperature).

    train_x (n, D), train_y (n,), test_x (m, D), test_y (m,), memory-mapped or not; rows are L2-normalized here.
    The keys of the result are the k really used: a k beyond n becomes n (once). Equal similarities go to the
    smaller training index, equal votes to the smaller class, so the answer does not depend on chunking, sorting or
    the device. DINO, Caron et al. 2021. Raises UserError as `classify` does.
    """
    truth = check_labeled(test_x, test_y, "test set of the k-NN")
    ranked = classify(train_x, train_y, test_x, ks, temperature=temperature, device=device)
    return {k: accuracy(classes, truth) for k, classes in ranked.items()}


def leave_one_out(
    x: Array,
    y: Array,
    ks: Iterable[int] = KS,
    temperature: float = 0.07,
    device: torch.device | str = "cpu",
) -> dict[int, float]:
    """`knn` of one set (n, D) within itself: every image is classified by all others. k is at most n - 1."""
    truth = check_labeled(x, y, "set of the leave-one-out k-NN")
    ranked = classify(x, y, None, ks, temperature=temperature, device=device)
    return {k: accuracy(classes, truth) for k, classes in ranked.items()}


def classify(
    train_x: Array,
    train_y: Array,
    test_x: Array | None,
    ks: Iterable[int] = KS,
    *,
    temperature: float = 0.07,
    device: torch.device | str = "cpu",
) -> dict[int, Tensor]:
    """For every k the classes of each test image by votes, best first: int64 (m, 5), -1 where nobody voted.

    The first column is the prediction; five columns make top-5. test_x None: every training image by all others.
    Memory besides the arrays: about 3 GiB. Raises UserError for empty, unequal or non-finite arrays, a single class,
    k < 1 and a temperature that is not positive.
    """
    labels = check_labeled(train_x, train_y, "training set of the k-NN")
    present, compact = labels.unique(return_inverse=True)  # so that memory follows the classes there are
    if len(present) < 2:
        raise UserError(
            f"Every training image of the k-NN has label {int(present[0])}: with one class only, any answer is right. "
            "Give images of two classes or more."
        )
    queries = train_x if test_x is None else test_x
    if queries.ndim != 2 or train_x.shape[1] != queries.shape[1]:
        raise UserError(
            f"k-NN: training features have {train_x.shape[1]} dimensions, test features {queries.shape[1]}."
        )
    if not temperature > 0:
        raise UserError(f"The temperature of the k-NN must be positive, not {temperature}.")
    n, ks = len(train_x) - (test_x is None), list(ks)
    sizes = sorted({min(k, n) for k in ks})
    if not sizes or sizes[0] < 1:
        raise UserError(f"k-NN needs at least one k, and every k at least 1; got {ks}.")

    similarity, index = neighbors(train_x, queries, sizes[-1], device=device, leave_one_out=test_x is None)
    found: dict[int, list[Tensor]] = {k: [] for k in sizes}
    for rows in torch.arange(len(similarity)).split(max(1, _VOTES // len(present))):
        # the nearest neighbor's weight is 1, so that a small temperature does not overflow; in float64 on the CPU
        weight = ((similarity[rows] - similarity[rows, :1]) / temperature).exp()
        voter = compact[index[rows]]
        votes = torch.zeros(len(rows), len(present), dtype=torch.float64)
        done = 0
        for k in sizes:
            votes.scatter_add_(1, voter[:, done:k], weight[:, done:k])
            found[k].append(_ranked(votes, present))
            done = k
    return {k: torch.cat(parts) for k, parts in found.items()}


def _ranked(votes: Tensor, classes: Tensor) -> Tensor:
    """(m, C) votes -> the classes with the five largest (m, 5), equal votes by class, -1 where there is no vote."""
    ranked = torch.full((len(votes), 5), -1)
    votes = votes.clone()
    for rank in range(min(5, len(classes))):
        best = votes.argmax(1, keepdim=True)  # the first of equal ones, unlike topk
        ranked[:, rank] = torch.where(votes.gather(1, best) > 0, classes[best], -1)[:, 0]
        votes.scatter_(1, best, -1.0)
    return ranked


# What any classifier's answers are scored by -----------------------------------------------------------------------


def accuracy(ranked: Tensor, truth: Tensor, top: int = 1) -> float:
    """Percent of rows whose class (m,) is among the first `top` of the ranked ones (m, R)."""
    return 100.0 * int((ranked[:, :top] == truth[:, None]).any(1).sum()) / len(truth)


def confusion(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Counts, int64 (truth, predicted), of class numbers (m,) each; a prediction of -1 (none) is counted nowhere."""
    given = predicted >= 0
    return torch.bincount(truth[given] * classes + predicted[given], minlength=classes**2).view(classes, classes)


def per_class(predicted: Tensor, truth: Tensor, classes: int) -> list[float | None]:
    """Percent right for each class of the truth; None for a class that no image has."""
    images = torch.bincount(truth, minlength=classes)
    right = torch.bincount(truth[predicted == truth], minlength=classes)
    return [100.0 * r / n if n else None for r, n in zip(right.tolist(), images.tolist(), strict=True)]
