"""What features say about a data set before it has labels: a map, clusters, near duplicates, outliers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nearfar.eval.neighbors import neighbors
from nearfar.ssl.errors import UserError

FEWEST = 4  # images of which there is anything to say
_NEAR = 10  # neighbors that decide how far out an image is


class DataLook(NamedTuple):
    """Of features (n, D).

    position: (n, 2) in [0, 1], the map. cluster: (n,). center: (clusters,), the image nearest to each cluster's mean.
    pairs: (p, 2), near duplicates, and alike: (p,), their cosines, most alike first; duplicates: how many there are, of
    which these are the first. outliers: images, farthest first, and lonely: their mean cosine to their nearest
    neighbors.
    """

    position: NDArray[np.float64]
    cluster: NDArray[np.int64]
    center: NDArray[np.int64]
    pairs: NDArray[np.int64]
    alike: NDArray[np.float64]
    duplicates: int
    outliers: NDArray[np.int64]
    lonely: NDArray[np.float64]

    @property
    def doubt(self) -> str:
        """What to say of more pairs than a tenth of the images: a network that has learned little finds many."""
        if self.duplicates <= len(self.position) / 10:
            return ""
        return (
            "So many may say more about the network than about the images: try a better trained one, or a larger "
            "--duplicate-cosine."
        )


def look_at(
    x: NDArray[np.float32], *, clusters: int, duplicate: float, outliers: int = 12, pairs: int = 500, seed: int = 0
) -> DataLook:
    """Everything of a `DataLook` from features (n, D), which are compared by cosine.

    Map: t-SNE (van der Maaten and Hinton 2008) of the first 50 principal components. Clusters: k-means of unit
    vectors. Near duplicates: pairs that are among each other's ten nearest with a cosine of at least `duplicate`, at
    most so many `pairs`. Outliers: the lowest mean cosine to the ten nearest.

    Raises:
        UserError: fewer than `FEWEST` images, features that are not finite, or all alike.
    """
    n = len(x)
    if n < FEWEST:
        raise UserError(f"There are only {n} readable images: a look at a data set needs at least {FEWEST}.")
    if not np.isfinite(x).all():
        raise UserError("The features are not finite; the network has most likely diverged.")
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    if float(np.ptp(unit, axis=0).max()) < 1e-6:
        raise UserError(
            "The network gives every image the same features (it has collapsed), so there is nothing to see."
        )
    similar, near = (found.numpy() for found in neighbors(x, x, min(_NEAR, n - 1), leave_one_out=True))
    found_pairs, alike = _duplicates(similar, near, duplicate)
    lonely = similar.mean(1)
    order = np.argsort(lonely, kind="stable")[: min(outliers, n)]
    cluster, center = _clusters(unit, min(clusters, n - 1), seed)
    return DataLook(
        _map(unit, seed), cluster, center, found_pairs[:pairs], alike[:pairs], len(alike), order, lonely[order]
    )


def _duplicates(
    similar: NDArray[np.float64], near: NDArray[np.int64], least: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    rows, columns = np.nonzero(similar >= least)
    pairs = np.stack([rows, near[rows, columns]], 1)
    alike, ordered = similar[rows, columns], np.sort(pairs, axis=1)
    _, first = np.unique(ordered, axis=0, return_index=True)
    first = first[np.argsort(-alike[first], kind="stable")]
    return ordered[first], alike[first]


def _clusters(unit: NDArray[np.float32], count: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Clusters by size, the largest being 0, and the image in the middle of each."""
    from sklearn.cluster import KMeans

    found = KMeans(count, n_init=4, random_state=seed).fit(unit)
    by_size = np.argsort(-np.bincount(found.labels_, minlength=count), kind="stable")
    number = np.empty(count, np.int64)
    number[by_size] = np.arange(count)
    cluster = number[found.labels_]
    apart = np.linalg.norm(unit - found.cluster_centers_[found.labels_], axis=1)
    kept = [k for k in range(count) if (cluster == k).any()]
    return cluster, np.array([np.flatnonzero(cluster == k)[apart[cluster == k].argmin()] for k in kept])


def _map(unit: NDArray[np.float32], seed: int) -> NDArray[np.float64]:
    """t-SNE, scaled to [0, 1] on both axes."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    n = len(unit)
    few = PCA(min(50, n - 1, unit.shape[1]), random_state=seed).fit_transform(unit)
    positions = TSNE(2, perplexity=min(30.0, (n - 1) / 3), init="pca", random_state=seed).fit_transform(few)
    low, high = positions.min(0), positions.max(0)
    return np.asarray((positions - low) / np.maximum(high - low, 1e-12), np.float64)


def purity(cluster: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    """Percent of images whose class is the most frequent one of their cluster."""
    most = [np.bincount(labels[cluster == k]).max() for k in np.unique(cluster)]
    return 100.0 * float(sum(most)) / len(cluster)


def thinned_grid(positions: NDArray[np.float64], cells: int) -> NDArray[np.int64]:
    """One image for each cell of a grid over the map that holds any: the one nearest to the middle of the cell."""
    cell = np.minimum((positions * cells).astype(int), cells - 1)
    apart = ((positions * cells - cell - 0.5) ** 2).sum(1)
    order = np.argsort(apart, kind="stable")
    _, first = np.unique(cell[order] @ np.array([cells, 1]), return_index=True)
    return np.asarray(order[first], np.int64)
