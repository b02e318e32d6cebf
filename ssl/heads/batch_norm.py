"""Batch norm over the batches of all ranks, on any device (torch's own SyncBatchNorm runs on GPUs only)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nearfar.ssl.parallel import distributed


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm1d whose training statistics are those of the whole step: every rank must hold as many rows.

    Where rows only fill up a list (`counts`), the ranks may hold different numbers of those that count.
    """

    def forward(self, x: Tensor, counts: Tensor | None = None) -> Tensor:
        """(N, C) -> (N, C); `counts` (N,) bool: rows that the statistics are of, all unless given."""
        if counts is not None and self.training:
            return self._of_some(x, counts)
        if not self.training or distributed.count() == 1:
            return super().forward(x)
        x32 = x.float() if x.dtype.itemsize < 4 else x
        variance, mean = torch.var_mean(x32, 0, correction=0)
        moments = torch.stack([mean, variance]).double()  # the square of the mean is subtracted again below
        moments = distributed.all_sum(torch.stack([moments[0], moments[1] + moments[0].square()])) / distributed.count()
        mean, variance = moments[0].to(x32.dtype), (moments[1] - moments[0].square()).to(x32.dtype)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        rows = distributed.count() * len(x)
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(variance.detach() * (rows / max(1, rows - 1)), self.momentum)
        return ((x32 - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias).to(x.dtype)

    def _of_some(self, x: Tensor, counts: Tensor) -> Tensor:
        """`forward` with the statistics of some rows, on any number of ranks; one of them must have such a row."""
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        x32 = x.float() if x.dtype.itemsize < 4 else x
        share = counts.to(x32.dtype).unsqueeze(1)  # sums and not products, which autocast would round
        sums = _over_ranks(torch.cat([(share * x32).sum(0), share.sum()[None]]))
        number = sums[-1].detach().clamp_min(1)
        mean = sums[:-1] / number
        variance = _over_ranks((share * (x32 - mean).square()).sum(0)) / number
        with torch.no_grad():  # new tensors: an earlier pass of this step may have kept the old ones for its gradient
            unbiased = variance * (number / (number - 1).clamp_min(1))
            self.running_mean = self.running_mean.lerp(mean, self.momentum)
            self.running_var = self.running_var.lerp(unbiased, self.momentum)
            self.num_batches_tracked.add_(1)
        return ((x32 - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias).to(x.dtype)


def _over_ranks(sums: Tensor) -> Tensor:
    return distributed.all_sum(sums) if distributed.count() > 1 else sums
