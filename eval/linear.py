"""Linear probe: softmax regression on frozen features; features, rate and decay chosen without the test set."""

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nearfar.eval.arrays import Array, check_classes, check_labeled, refuse_broken
from nearfar.ssl.errors import UserError
from nearfar.ssl.heads.linear import LinearHeads

LEARNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
WEIGHT_DECAYS = (0.0, 1e-5, 1e-4)
_ROWS = 4096  # rows read at once in a pass over a whole set
_RESIDENT = 4 * 2**30  # features of up to so many bytes are copied to a GPU as a whole, not batch by batch


class StandardizedRows:
    """Features (n, D) that are read batch by batch and standardized on the way, so that no copy of them is made.

    x may be memory-mapped and of any float type. mean and scale: (D,) float32 on `device`; see `standardize`.
    """

    def __init__(self, x: Array, device: torch.device, mean: Tensor, scale: Tensor) -> None:
        self.x, self.device, self.mean, self.scale = x, device, mean, scale

    def __len__(self) -> int:
        return len(self.x)

    def read(self, rows: Tensor) -> Tensor:
        """Standardized float32 rows (len(rows), D); `rows` are row numbers on the CPU."""
        if isinstance(self.x, np.ndarray):
            part = torch.from_numpy(np.asarray(self.x[rows.numpy()]))
        else:
            part = self.x[rows.to(self.x.device)]
        return (part.to(self.device, torch.float32) - self.mean) * self.scale


def standardize(x: Array, device: torch.device, what: str) -> StandardizedRows:
    """`x` with every dimension at mean 0 and deviation 1, summed in float64 chunk by chunk; constant ones become 0.

    Raises UserError, naming `what`, for rows that are not finite.
    """
    n, dim = x.shape
    mean, square = torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64)
    for start in range(0, n, _ROWS):
        part = _finite(x, start, what)
        # Chan et al. 1983: moments of chunks put together, so that a large mean costs no digits
        shift = part.mean(0) - mean
        share = len(part) / (start + len(part))
        square += (part - part.mean(0)).square().sum(0) + shift.square() * (start * share)
        mean += shift * share
    std = (square / n).sqrt()
    std = torch.where(std > 1e-6 * std.max(), std, 1.0)
    if device.type != "cpu" and x.nbytes <= _RESIDENT:
        x = torch.as_tensor(np.array(x) if isinstance(x, np.ndarray) else x).to(device)
    return StandardizedRows(x, device, mean.float().to(device), std.reciprocal().float().to(device))


def linear_probe(  # noqa: PLR0913 - four arrays, and the protocol by name
    train_x: Array | Mapping[str, Array],
    train_y: Array,
    test_x: Array | Mapping[str, Array],
    test_y: Array,
    *,
    epochs: int = 100,
    batch_size: int = 256,
    lrs: Sequence[float] = LEARNING_RATES,
    decays: Sequence[float] = (0.0,),
    holdout: float = 0.1,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Top-1 (and top-5 beyond five classes) in percent of a linear classifier trained on (n, D) features.

    docs/methods.md section 5: SGD, momentum .9, cosine to 0. Every rate of `lrs` (per 256 samples; scaled by
    batch_size / 256) with every weight decay of `decays` (`WEIGHT_DECAYS` is a good range) is trained in one pass,
    scored after the last epoch on a stratified `holdout` share of the *training* set. Instead of one array, both sides
    may give several, by name (layers, poolings), each swept alike. The best (`best_setting`) is trained afresh on
    the whole training set; only that one meets the test set. Features are standardized per dimension with training
    statistics: an affine map, so the classifier stays linear, and one range of rates fits every backbone. They are
    read batch by batch, in place: memory-mapped ones need not fit in memory. Same seed, same answer. device: where
    the heads are trained, by default where the features are.

    Returns top1, [top5], lr, decay, [chosen: the name of the features taken], holdout (a row {[chosen], lr, decay,
    top1, loss} for each), epochs, train, test, classes. Raises UserError for unusable arrays, a single class, labels
    with gaps, a training set too small to hold anything out, or when every rate diverges.
    """
    named = isinstance(train_x, Mapping)
    pairs = _pairs(train_x, test_x)
    first_train, first_test = next(iter(pairs.values()))
    y = check_labeled(first_train, train_y, "training set of the linear probe")
    truth = check_labeled(first_test, test_y, "test set of the linear probe")
    held = stratified(y, holdout, seed)
    classes = max(check_classes(y, "training set of the linear probe"), int(truth.max()) + 1)
    if not lrs or not decays:
        raise UserError("The linear probe needs at least one learning rate and one weight decay.")
    target = torch.device(device) if device is not None else _device(first_train)
    common: dict[str, Any] = {"classes": classes, "epochs": epochs, "batch_size": batch_size, "seed": seed}
    inputs, curve = _sweep(pairs, y, held, target, list(product(lrs, decays)), common)
    best = best_setting(curve, int(held.sum()))
    if best is None:
        raise UserError(f"Linear probe: training diverged at every rate of {list(lrs)}; give smaller ones.")

    chosen, test = inputs[best["chosen"]], pairs[best["chosen"]][1]
    check_labeled(test, truth, "test set of the linear probe")
    queries = StandardizedRows(test, target, chosen.mean, chosen.scale)
    heads = train_heads(chosen, y, torch.arange(len(y)), settings=[(best["lr"], best["decay"])], **common)
    scores = score_heads(heads, queries, truth, torch.arange(len(truth)), what="test set of the linear probe")
    if not named:
        curve = [{key: value for key, value in row.items() if key != "chosen"} for row in curve]
    choice = {key: best[key] for key in (("chosen", "lr", "decay") if named else ("lr", "decay"))}
    tops = {key: values[0] for key, values in scores.items() if key.startswith("top")}
    sizes = {"epochs": epochs, "train": len(y), "test": len(truth), "classes": classes}
    return {**tops, **choice, "holdout": curve, **sizes}


def _sweep(
    pairs: Mapping[str, tuple[Array, Array]],
    y: Tensor,
    held: Tensor,
    target: torch.device,
    settings: Sequence[tuple[float, float]],
    common: dict[str, Any],
) -> tuple[dict[str, StandardizedRows], list[dict[str, Any]]]:
    """Standardized training features by name, and the held-out score of every setting on each."""
    what = "training set of the linear probe"
    kept, left = torch.nonzero(~held).flatten(), torch.nonzero(held).flatten()
    inputs, curve = {}, []
    for name, (features, _) in pairs.items():
        check_labeled(features, y, what)
        inputs[name] = standardize(features, target, what)
        sweep = score_heads(train_heads(inputs[name], y, kept, settings=settings, **common), inputs[name], y, left)
        for (lr, decay), top1, loss in zip(settings, sweep["top1"], sweep["loss"], strict=True):
            curve.append({"chosen": name, "lr": lr, "decay": decay, "top1": top1, "loss": loss})
    return inputs, curve


def best_setting(curve: Sequence[dict[str, Any]], images: int) -> dict[str, Any] | None:
    """The row of lowest loss among those whose top1 on `images` held-out ones is within two standard errors of the top.

    Of 90 held-out images one is worth 1.1 points: the highest accuracy alone chose rates that underfit (3.2 points
    below logistic regression on 900 digits), where the loss tells the rates apart. On many images the error is small
    and accuracy decides. After the rule of one standard error, Breiman et al. 1984, section 3.4. Rows without a
    finite loss are not considered; None where there is no other.
    """
    finite = [row for row in curve if row["loss"] is not None]
    if not finite:
        return None
    top = max(row["top1"] for row in finite)
    error = math.sqrt(top * (100.0 - top) / images)  # of a binomial share, in percent
    return min((row for row in finite if row["top1"] >= top - 2 * error), key=lambda row: (row["loss"], -row["top1"]))


def _pairs(train_x: Any, test_x: Any) -> dict[str, tuple[Array, Array]]:
    """Name -> (training features, test features), checked to belong together."""
    if not isinstance(train_x, Mapping):
        train_x, test_x = {"": train_x}, {"": test_x}
    if not isinstance(test_x, Mapping) or set(train_x) != set(test_x) or not train_x:
        raise UserError("The linear probe needs features of the same names for its training and its test set.")
    for name in train_x:
        a, b = train_x[name], test_x[name]
        if a.ndim == 2 and b.ndim == 2 and a.shape[1] != b.shape[1]:
            named = f' ("{name}")' if name else ""
            raise UserError(
                f"Linear probe{named}: training features have {a.shape[1]} dimensions, test features {b.shape[1]}."
            )
    return {name: (train_x[name], test_x[name]) for name in train_x}


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


def train_heads(
    x: StandardizedRows,
    y: Tensor,
    rows: Tensor,
    *,
    classes: int,
    settings: Sequence[tuple[float, float]],
    epochs: int,
    batch_size: int,
    seed: int,
) -> LinearHeads:
    """One head per (learning rate, weight decay), all on the same batches of `rows` of x; no head affects another.

    Weights decay, biases do not: w <- w - rate * (gradient + decay * w), within the momentum, as torch's SGD has it.
    """
    batch_size = min(batch_size, len(rows))
    steps = epochs * math.ceil(len(rows) / batch_size)
    sweep = Sweep(LinearHeads(x.x.shape[1], classes, len(settings)).to(x.device), settings, batch_size, steps)
    generator = torch.Generator().manual_seed(seed)
    y = y.to(x.device)
    for _ in range(epochs):
        for part in torch.randperm(len(rows), generator=generator).split(batch_size):
            batch = rows[part]
            sweep.step(x.read(batch), y[batch.to(y.device)])
    return sweep.heads


class Sweep:
    """SGD of many heads at once, each with its (learning rate, weight decay) of `settings`; rates fall by a cosine to 0
    over `steps`. No head affects another."""

    def __init__(
        self, heads: LinearHeads, settings: Sequence[tuple[float, float]], batch_size: int, steps: int
    ) -> None:
        self.heads, device = heads, heads.weight.device
        self.optimizer = torch.optim.SGD(heads.parameters(), lr=1.0, momentum=0.9)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        # SGD is linear in the gradient, so scaling a head's gradient by its rate is the same as giving it that rate.
        self.rate = torch.tensor([lr for lr, _ in settings], device=device) * (batch_size / 256)
        self.decay = (self.rate * torch.tensor([decay for _, decay in settings], device=device))[:, None, None]
        self.decays = any(decay for _, decay in settings)

    def step(self, x: Tensor, y: Tensor) -> None:
        """One step on features (B, D) and classes (B,), both on the heads' device."""
        loss = (self.rate * losses(self.heads(x), y)).sum()
        self.optimizer.zero_grad()
        loss.backward()
        weight = self.heads.weight
        if weight.grad is not None and self.decays:
            weight.grad.addcmul_(self.decay, weight.detach())
        self.optimizer.step()
        self.schedule.step()


def losses(logits: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of each head: logits (B, heads, classes), y (B,) -> (heads,)."""
    each = F.cross_entropy(logits.flatten(0, 1), y.repeat_interleave(logits.shape[1]), reduction="none")
    return each.unflatten(0, logits.shape[:2]).mean(0)


@torch.inference_mode()
def score_heads(
    heads: LinearHeads, x: StandardizedRows, y: Tensor, rows: Tensor, what: str = "set of the linear probe"
) -> dict[str, list[Any]]:
    """Per head over `rows` of x: top1, top5 (beyond five classes) in percent, and loss (None where not finite)."""
    count, classes = heads.bias.shape
    hits = torch.zeros(count, min(5, classes), device=x.device)
    loss = torch.zeros(count, device=x.device)
    for part in rows.split(max(1, min(_ROWS, 2**26 // (count * classes)))):  # 256 MiB of logits at most
        batch, truth = x.read(part), y[part].to(x.device)
        if not bool(torch.isfinite(batch).all()):
            refuse_broken(batch, what)
        logits = heads(batch)
        loss += losses(logits, truth) * len(part)
        ranked = logits.topk(hits.shape[1], dim=-1).indices == truth[:, None, None]
        hits += ranked.cumsum(-1).sum(0)
    percent = 100.0 * hits / len(rows)
    result: dict[str, list[Any]] = {"top1": percent[:, 0].tolist()}
    if classes > 5:
        result["top5"] = percent[:, 4].tolist()
    result["loss"] = [value if math.isfinite(value) else None for value in (loss / len(rows)).tolist()]
    return result


def _device(x: Array) -> torch.device:
    return x.device if isinstance(x, Tensor) else torch.device("cpu")


def _finite(x: Array, start: int, what: str) -> Tensor:
    """_ROWS rows in float64 on the CPU."""
    part = x[start : start + _ROWS]
    chunk = torch.from_numpy(np.array(part)) if isinstance(part, np.ndarray) else part
    chunk = chunk.to("cpu", torch.float64)
    if not bool(torch.isfinite(chunk).all()):
        refuse_broken(chunk, what)
    return chunk
