"""Logistic regression by L-BFGS: a convex problem solved to its optimum, to check the linear probe's SGD against,
and the classifier of the few-shot scores, for which an SGD schedule would have to be tuned."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfar.eval.arrays import Array, check_classes, check_labeled, refuse_broken
from nearfar.eval.linear import StandardizedRows, standardize
from nearfar.ssl.errors import UserError

_CHUNK = 16384


def logistic_probe(
    train_x: Array,
    train_y: Array,
    test_x: Array,
    test_y: Array,
    *,
    strength: float = 1.0,
    iterations: int = 200,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Top-1 in percent of softmax regression on standardized features (n, D), with penalty |W|^2 / (2 strength).

    The same objective as scikit-learn's LogisticRegression(C=strength): summed cross-entropy plus |W|^2 / (2 C), the
    bias free. Full-batch L-BFGS with a strong Wolfe line search; features are read chunk by chunk. Returns top1, loss
    (the mean objective reached), gradient (its largest entry), train, test, classes. Raises UserError for unusable
    arrays, one class, labels with gaps, or a strength that is not positive.
    """
    what = "training set of the logistic regression"
    y = check_labeled(train_x, train_y, what)
    truth = check_labeled(test_x, test_y, "test set of the logistic regression")
    if train_x.shape[1] != test_x.shape[1]:
        raise UserError(
            f"Logistic regression: training features have {train_x.shape[1]} dimensions, test features "
            f"{test_x.shape[1]}."
        )
    classes = check_classes(y, what)
    x = standardize(train_x, torch.device(device), what)
    fitted = fit(x, y, torch.arange(len(y)), classes=classes, strength=strength, iterations=iterations)
    predicted = predict(fitted["weight"], StandardizedRows(test_x, x.device, x.mean, x.scale))
    top1 = 100.0 * int((predicted == truth).sum()) / len(truth)
    sizes = {"train": len(y), "test": len(truth), "classes": classes}
    return {"top1": top1, "loss": fitted["loss"], "gradient": fitted["gradient"], "strength": strength, **sizes}


def fit(
    x: StandardizedRows, y: Tensor, rows: Tensor, *, classes: int, strength: float, iterations: int
) -> dict[str, Any]:
    """weight (classes, D + 1), the bias last, at the optimum over `rows` of x; loss and gradient reached there."""
    if not strength > 0:
        raise UserError(f"The strength of a logistic regression must be positive, not {strength}.")
    weight = torch.zeros(classes, x.x.shape[1] + 1, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight], max_iter=iterations, tolerance_grad=1e-6, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )
    y = y.to(x.device)

    def objective() -> Tensor:
        optimizer.zero_grad()
        total = weight[:, :-1].square().sum() / (2 * strength * len(rows))
        total.backward()
        total = total.detach()
        for part in rows.split(_CHUNK):  # the gradient of a sum, so that no graph over all rows is held
            logits = F.linear(x.read(part), weight[:, :-1], weight[:, -1])
            loss = F.cross_entropy(logits, y[part.to(y.device)], reduction="sum") / len(rows)
            loss.backward()
            total = total + loss.detach()
        return total

    optimizer.step(objective)
    loss = float(objective())
    gradient = float(weight.grad.abs().max()) if weight.grad is not None else float("nan")
    return {"weight": weight.detach(), "loss": loss, "gradient": gradient}


@torch.inference_mode()
def predict(weight: Tensor, x: StandardizedRows, what: str = "test set of the logistic regression") -> Tensor:
    """The class of every row, int64 (n,) on the CPU. Raises UserError, naming `what`, for rows that are not finite."""
    found = []
    for rows in torch.arange(len(x)).split(_CHUNK):
        part = x.read(rows)
        if not bool(torch.isfinite(part).all()):
            refuse_broken(part, what)
        found.append(F.linear(part, weight[:, :-1], weight[:, -1]).argmax(1).cpu())
    return torch.cat(found)
