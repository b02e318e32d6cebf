"""Linear probe: softmax regression on frozen features, its rate chosen without looking at the test set."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfar.eval.arrays import Array, labeled
from nearfar.ssl.errors import UserError
from nearfar.ssl.heads.linear import LinearHeads

LEARNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def linear_probe(
    train_x: Array,
    train_y: Array,
    test_x: Array,
    test_y: Array,
    *,
    epochs: int = 100,
    batch_size: int = 256,
    lrs: Sequence[float] = LEARNING_RATES,
    holdout: float = 0.1,
    seed: int = 0,
) -> dict[str, Any]:
    """Top-1 (and top-5 beyond five classes) in percent of a linear classifier trained on (n, D) features.

    docs/methods.md section 5: SGD, momentum .9, no weight decay, cosine to 0. Every rate of `lrs` (per 256 samples;
    scaled by batch_size / 256) is trained in the same pass and scored after the last epoch on a stratified
    `holdout` share of the *training* set. The best (ties: lower loss) is trained afresh on the whole training
    set; only that one meets the test set. Features are standardized per dimension with training statistics:
    an affine map, so the classifier stays linear, and one range of rates fits every backbone. Same seed, same
    answer.

    Returns top1, [top5], lr, holdout (a row {lr, top1, loss} for each rate), epochs, train, test, classes.
    Raises UserError for unusable arrays, a training set too small to hold anything out, or when every rate
    diverges.
    """
    x, y = labeled(train_x, train_y, "training set of the linear probe")
    queries, truth = labeled(test_x, test_y, "test set of the linear probe")
    if x.shape[1] != queries.shape[1]:
        raise UserError(
            f"Linear probe: training features have {x.shape[1]} dimensions, test features {queries.shape[1]}."
        )
    queries, truth = queries.to(x.device), truth.to(x.device)
    mean, std = x.mean(0), x.std(0, correction=0)
    std = torch.where(std > 1e-6 * std.max(), std, 1.0)  # a dimension that never changes stays at 0
    x, queries = (x - mean) / std, (queries - mean) / std
    classes = int(max(y.max(), truth.max())) + 1

    def fit(x: Tensor, y: Tensor, lrs: Sequence[float]) -> LinearHeads:
        return train(x, y, classes=classes, lrs=lrs, epochs=epochs, batch_size=batch_size, seed=seed)

    held = stratified(y.cpu(), holdout, seed).to(x.device)
    sweep = score(fit(x[~held], y[~held], lrs), x[held], y[held])
    curve = [
        {"lr": lr, "top1": top1, "loss": loss} for lr, top1, loss in zip(lrs, sweep["top1"], sweep["loss"], strict=True)
    ]
    finite = [row for row in curve if row["loss"] is not None]
    if not finite:
        raise UserError(f"Linear probe: training diverged at every rate of {list(lrs)}; give smaller ones.")
    best = max(finite, key=lambda row: (row["top1"], -row["loss"]))["lr"]

    scores = score(fit(x, y, [best]), queries, truth)
    tops = {key: values[0] for key, values in scores.items() if key.startswith("top")}
    sizes = {"epochs": epochs, "train": len(x), "test": len(queries), "classes": classes}
    return {**tops, "lr": best, "holdout": curve, **sizes}


def stratified(y: Tensor, share: float, seed: int) -> Tensor:
    """Held-out mask, bool (n,): `share` of each class, at least one where it has two or more."""
    if not 0 < share < 1:
        raise UserError(f"The held-out share must lie between 0 and 1, not {share}.")
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(y), dtype=torch.bool)
    for label in y.unique():
        members = torch.nonzero(y == label).flatten()
        if len(members) > 1:
            count = min(max(1, round(share * len(members))), len(members) - 1)
            held[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    if not held.any():
        raise UserError(
            "No class of the linear probe's training set has two images, so none can be held out to choose a "
            "learning rate."
        )
    return held


def train(
    x: Tensor, y: Tensor, *, classes: int, lrs: Sequence[float], epochs: int, batch_size: int, seed: int
) -> LinearHeads:
    """One head per learning rate, all on the same batches of (n, D) features; no head affects another."""
    heads = LinearHeads(x.shape[1], classes, len(lrs)).to(x.device)
    batch_size = min(batch_size, len(x))
    steps = epochs * math.ceil(len(x) / batch_size)
    optimizer = torch.optim.SGD(heads.parameters(), lr=1.0, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    # SGD is linear in the gradient, so scaling a head's loss by its rate is the same as giving it that rate.
    rate = torch.tensor(lrs, device=x.device) * (batch_size / 256)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).to(x.device).split(batch_size):
            loss = (rate * losses(heads(x[rows]), y[rows])).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return heads


def losses(logits: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of each head: logits (B, heads, classes), y (B,) -> (heads,)."""
    each = F.cross_entropy(logits.flatten(0, 1), y.repeat_interleave(logits.shape[1]), reduction="none")
    return each.unflatten(0, logits.shape[:2]).mean(0)


@torch.inference_mode()
def score(heads: LinearHeads, x: Tensor, y: Tensor) -> dict[str, list[Any]]:
    """Per head: top1, top5 (beyond five classes) in percent, and loss (None where it is not finite)."""
    count, classes = heads.bias.shape
    hits = torch.zeros(count, min(5, classes), device=x.device)
    loss = torch.zeros(count, device=x.device)
    for rows in torch.arange(len(x), device=x.device).split(4096):
        logits = heads(x[rows])
        loss += losses(logits, y[rows]) * len(rows)
        ranked = logits.topk(hits.shape[1], dim=-1).indices == y[rows, None, None]
        hits += ranked.cumsum(-1).sum(0)
    percent = 100.0 * hits / len(x)
    result: dict[str, list[Any]] = {"top1": percent[:, 0].tolist()}
    if classes > 5:
        result["top5"] = percent[:, 4].tolist()
    result["loss"] = [value if math.isfinite(value) else None for value in (loss / len(x)).tolist()]
    return result
