"""The mean of each neuron at each position of a sequence."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_ablate.statistics.base import ActivationStatistic, SiteStatistics, by_example


class MeanByPosition(ActivationStatistic):
    """Means over the examples at each position; sums are float64, 8 bytes a neuron and position.

    Example:
        >>> statistic = MeanByPosition(neurons=1)
        >>> statistic.update(torch.tensor([[[1.0], [2.0]], [[3.0], [6.0]]]))
        >>> statistic.mean.flatten().tolist(), statistic.count.tolist()
        ([2.0, 4.0], [2, 2])
    """

    sums: Tensor
    count: Tensor

    def __init__(self, neurons: int, earlier: SiteStatistics | None = None) -> None:
        super().__init__(neurons, earlier)
        sums = torch.zeros(0, neurons, dtype=torch.float64)
        self.add_state("sums", sums, dist_reduce_fx="sum", persistent=True)
        self.add_state("count", torch.zeros(0, dtype=torch.int64), dist_reduce_fx="sum", persistent=True)

    def update(self, activations: Tensor, valid: Tensor | None = None) -> None:
        """Adds a batch, see :meth:`ActivationStatistic.update`."""
        rows, real = by_example(activations, valid)
        self._grow(rows.shape[1])
        here = slice(rows.shape[1])
        self.sums[here] += torch.where(real.unsqueeze(2), rows, 0).sum(0, dtype=torch.float64)
        self.count[here] += real.sum(0)

    def compute(self) -> Tensor:
        """See :attr:`mean`."""
        return self.mean

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Merges the ranks, see :meth:`torchmetrics.Metric.sync`, after all have grown to the longest sequence."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            own = torch.tensor(len(self.count), device=self.count.device)
            self._grow(int(torch.stack(gather_all_tensors(own)).max()))
        super().sync(*args, **kwargs)

    @property
    def mean(self) -> Tensor:
        """The means, ``(positions, neurons)`` float64; 0 at positions whose ``count`` is 0."""
        return self.sums / self.count.clamp_min(1).unsqueeze(1)

    def _grow(self, length: int) -> None:
        more = length - len(self.count)
        if more > 0:
            self.sums = torch.cat([self.sums, self.sums.new_zeros(more, self.neurons)])
            self.count = torch.cat([self.count, self.count.new_zeros(more)])
