"""The mean of the gradients over all ranks, sent in buckets while the backward pass still runs."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nearfar.ssl.parallel import distributed

BUCKET_BYTES = 25 * 2**20


class _Sent(NamedTuple):
    gradients: list[Tensor]
    flat: Tensor  # the gradients one after the other, then the extra numbers
    work: Any  # of torch.distributed


class GradientMean:
    """Averages the gradients of some parameters over all ranks: `begin`, the backward pass, `finish`.

    Which gradients share a bucket, and the order of the buckets, follow from the order of the parameters alone, the
    last ones first, since theirs are ready first. DistributedDataParallel regroups its buckets by arrival after the
    first step: a continued run would add in another order than the uninterrupted one.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], bucket_bytes: int = BUCKET_BYTES) -> None:
        """`parameters`: all that learn at any time of the run; those without a gradient in a step are left out of it.
                Without any, only the extra numbers of `finish` are sent.

        A single rank sends nothing and registers no hooks.
        """
        self.buckets = in_buckets([p for p in parameters if p.requires_grad], bucket_bytes) or [[]]
        self._missing: list[int] = []  # gradients of each bucket that are still to come
        self._sent: list[_Sent | None] = []
        if distributed.count() > 1:
            for number, bucket in enumerate(self.buckets[:-1]):  # the last one waits for `finish`
                for parameter in bucket:
                    parameter.register_post_accumulate_grad_hook(partial(self._arrived, number))

    def begin(self) -> None:
        """Send each bucket as soon as the coming backward pass has filled it and those before it."""
        self._missing = [sum(p.requires_grad for p in bucket) for bucket in self.buckets]
        self._sent = []

    def _arrived(self, number: int, _: Tensor) -> None:
        if not self._missing:  # a backward pass without `begin` only adds up
            return
        self._missing[number] -= 1
        while len(self._sent) < len(self.buckets) - 1 and self._missing[len(self._sent)] <= 0:
            self._send()

    @torch.no_grad()
    def _send(self, *extras: Tensor) -> None:
        bucket = self.buckets[len(self._sent)]
        gradients = [p.grad for p in bucket if p.grad is not None]
        parts = [*(g.flatten() for g in gradients), *extras]
        if not parts:
            self._sent.append(None)
            return
        flat = torch.cat(parts)
        self._sent.append(_Sent(gradients, flat, dist.all_reduce(flat, async_op=True)))

    @torch.no_grad()
    def finish(self, extras: Tensor) -> Tensor:
        """After the backward pass: every gradient becomes its mean over all ranks, and so do the `extras`.

        Args:
            extras: other numbers (n,), sent with the last bucket.

        Returns:
            Their mean over all ranks (n,), on their device; the host has not waited for it.
        """
        if distributed.count() == 1:
            return extras
        while len(self._sent) < len(self.buckets) - 1:  # some parameters took no part in this step
            self._send()
        self._send(extras)
        flat = extras
        for sent in self._sent:
            if sent is not None:
                sent.work.wait()
                flat = sent.flat.div_(distributed.count())
                _unpack(flat, sent.gradients)
        self._missing, self._sent = [], []
        return flat[-len(extras) :]


def _unpack(flat: Tensor, gradients: list[Tensor]) -> None:
    sizes = [g.numel() for g in gradients]
    parts = flat[: sum(sizes)].split(sizes)
    if gradients:
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


def in_buckets(parameters: list[nn.Parameter], limit: int) -> list[list[nn.Parameter]]:
    """The parameters from the last to the first, in groups of at most `limit` bytes, or of a single larger one."""
    buckets: list[list[nn.Parameter]] = []
    free = 0
    for parameter in reversed(parameters):
        size = parameter.numel() * parameter.element_size()
        if not buckets or size > free:
            buckets.append([])
            free = limit
        buckets[-1].append(parameter)
        free -= size
    return buckets
