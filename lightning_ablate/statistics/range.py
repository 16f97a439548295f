"""The smallest and largest value of each neuron."""

import torch
from torch import Tensor

from lightning_ablate.statistics.base import ActivationStatistic, SiteStatistics, positions


class Range(ActivationStatistic):
    """The minimum and maximum of each neuron over the valid positions.

    Example:
        >>> statistic = Range(neurons=2)
        >>> statistic.update(torch.tensor([[[1.0, 2.0], [3.0, -6.0]]]))
        >>> [bound.tolist() for bound in statistic.compute()]
        [[1.0, -6.0], [3.0, 2.0]]
    """

    low: Tensor
    high: Tensor

    def __init__(self, neurons: int, earlier: SiteStatistics | None = None) -> None:
        super().__init__(neurons, earlier)
        bound = torch.full((neurons,), torch.inf, dtype=torch.float64)
        self.add_state("low", bound, dist_reduce_fx="min", persistent=True)
        self.add_state("high", -bound, dist_reduce_fx="max", persistent=True)

    def update(self, activations: Tensor, valid: Tensor | None = None) -> None:
        """Adds a batch, see :meth:`ActivationStatistic.update`."""
        rows = positions(activations, valid)
        if len(rows):
            low, high = rows.aminmax(dim=0)
            self.low = torch.minimum(self.low, low)
            self.high = torch.maximum(self.high, high)

    def compute(self) -> tuple[Tensor, Tensor]:
        """The minima and maxima, each ``(neurons,)`` float64."""
        return self.low, self.high

    def finite(self) -> Tensor:
        """Whether no activation was NaN or infinite; still true before the first one."""
        seen = self.low.isfinite() & self.high.isfinite()
        return (seen | ((self.low == torch.inf) & (self.high == -torch.inf))).all()
