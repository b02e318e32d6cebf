"""How long a step will take, roughly, before the first one: from passes of a few images that leave all as it was."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from nearfar.ssl.learning.losses import BalancedLoss
from nearfar.ssl.learning.memory import unchanged
from nearfar.ssl.learning.student_teacher import StudentTeacher
from nearfar.ssl.parallel import distributed

SHORT = 60.0  # seconds: a run that is over by then needs no estimate
TRIAL = 1.0  # seconds that a trial may take on a CPU; two images are tried however long they take


def step_seconds(
    learner: StudentTeacher,
    loss_of: Callable[[int], Tensor],
    images: int,
    most: int,
    left: int,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> float | None:
    """Seconds of a forward and a backward pass of `images`, the mean over the ranks, all of which have to ask.

    A CPU tries one image, and several times as many while there is time. Where that ends before `images`, it goes on in
    proportion: a part of a pass is for each image, and the rest (such as normalizing the prototypes) is for all of
    them. A GPU, which a few would leave idle, tries all that `most` admits.

    Args:
        loss_of: the loss of so many images.
        most: images that memory admits, at least 1.
        left: such passes in the run.

    Returns:
        None: the run is `SHORT`. Weights, buffers, gradients and random numbers are what they were; the optimizer was
        not asked.
    """
    cuda, top = next(learner.parameters()).device.type == "cuda", min(images, most)

    def timed(count: int) -> float:
        return _seconds(learner, loss_of, count, autocast)

    def next_count(count: int, seconds: float) -> int:
        """How many to try next; 0: no more."""
        times = int((begun + TRIAL - time.monotonic()) / (2 * seconds))
        return 0 if count > 1 and times < 2 else min(top, count * max(2, min(8, times)))

    with unchanged(learner):
        cold = timed(1)  # it also loads and allocates
        if distributed.from_first(lambda: cold * images * left < SHORT):
            return None
        begun = time.monotonic()
        tried = [(1, timed(1))]
        if distributed.from_first(lambda: tried[0][1] * images * left < SHORT):
            return None
        while tried[-1][0] < top and (count := top if cuda else distributed.from_first(lambda: next_count(*tried[-1]))):
            first = timed(count)  # of a size, it allocates, and on a GPU chooses and compiles kernels
            tried.append((count, timed(count) if cuda or count > 2 else first))
    return distributed.mean_of({"seconds": _of(images, tried)})["seconds"]


def _of(images: int, tried: list[tuple[int, float]]) -> float:
    """The time of `images` by those of fewer, on the line through the last two, or through the only one and 0."""
    count, seconds = tried[-1]
    fewer, less = tried[-2] if len(tried) > 1 else (0, 0.0)
    return seconds + (images - count) * max(0.0, seconds - less) / (count - fewer)


def _seconds(
    learner: StudentTeacher,
    loss_of: Callable[[int], Tensor],
    count: int,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> float:
    if cuda := next(learner.parameters()).device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.monotonic()
    with autocast():
        loss = loss_of(count)
    loss.backward()
    learner.zero_grad(set_to_none=True)
    for part in learner.modules():
        if isinstance(part, BalancedLoss):
            part.forget()
    if cuda:
        torch.cuda.synchronize()
    return time.monotonic() - begun
