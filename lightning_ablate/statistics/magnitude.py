"""How large each neuron is."""

import torch
from torch import Tensor

from lightning_ablate.statistics.base import ActivationStatistic, SiteStatistics, positions


class Magnitude(ActivationStatistic):
    """The mean absolute value of each neuron over the valid positions, summed in float64.

    Example:
        >>> statistic = Magnitude(neurons=2)
        >>> statistic.update(torch.tensor([[[1.0, -2.0], [-3.0, -6.0]]]))
        >>> statistic.compute().tolist()
        [2.0, 4.0]
    """

    total: Tensor
    count: Tensor

    def __init__(self, neurons: int, earlier: SiteStatistics | None = None) -> None:
        super().__init__(neurons, earlier)
        self.add_state("total", torch.zeros(neurons, dtype=torch.float64), dist_reduce_fx="sum", persistent=True)
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum", persistent=True)

    def update(self, activations: Tensor, valid: Tensor | None = None) -> None:
        """Adds a batch, see :meth:`ActivationStatistic.update`."""
        rows = positions(activations, valid)
        self.total += rows.abs().sum(0, dtype=torch.float64)
        self.count += len(rows)

    def compute(self) -> Tensor:
        """See :attr:`mean`."""
        return self.mean

    @property
    def mean(self) -> Tensor:
        """The mean absolute values, ``(neurons,)`` float64."""
        return self.total / self.count

    def finite(self) -> Tensor:
        """Whether the sums are finite, which they are if every activation was."""
        return self.total.isfinite().all()
