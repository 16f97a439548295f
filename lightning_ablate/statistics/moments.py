"""The moments of each neuron, its minimum and its maximum."""

import torch
from torch import Tensor

from lightning_ablate.errors import StatisticsError
from lightning_ablate.statistics.base import ActivationStatistic, SiteStatistics, positions

_BLOCK = 256  # positions at a time, which fit in a core's cache


class Moments(ActivationStatistic):
    """Mean, standard deviation, skewness, kurtosis, minimum and maximum of each neuron over the valid positions.

    Every block of positions gives its mean and sums of powers of the deviations from it, in float64. Blocks merge by
    the formulas of Pébay (2008, "Formulas for robust, one-pass parallel computation of covariances and arbitrary-order
    statistical moments"), which keep the digits of neurons far from zero.
    """

    sums: Tensor  # count, mean, and sums of the second to fourth powers of the deviations from the mean
    low: Tensor  # the minima, (neurons,) float64; infinity before the first position
    high: Tensor  # the maxima

    def __init__(self, neurons: int, earlier: SiteStatistics | None = None) -> None:
        super().__init__(neurons, earlier)
        zeros = torch.zeros(5, neurons, dtype=torch.float64)
        nothing = torch.full((neurons,), torch.inf, dtype=torch.float64)
        self.add_state("sums", zeros, dist_reduce_fx=_merged, persistent=True)
        self.add_state("low", nothing, dist_reduce_fx="min", persistent=True)
        self.add_state("high", -nothing, dist_reduce_fx="max", persistent=True)

    def update(self, activations: Tensor, valid: Tensor | None = None) -> None:
        """Adds a batch, see :meth:`ActivationStatistic.update`."""
        rows = positions(activations, valid)
        if len(rows):
            self.sums = _merged(torch.stack([self.sums, *map(_sums, torch.split(rows, _BLOCK))]))
            self.low = torch.minimum(self.low, rows.amin(0))
            self.high = torch.maximum(self.high, rows.amax(0))

    def compute(self) -> Tensor:
        """Mean, standard deviation, skewness and excess kurtosis, ``(4, neurons)`` float64."""
        return torch.stack([self.mean, self.sd, self.skewness, self.kurtosis])

    @property
    def count(self) -> Tensor:
        """The positions seen, ``()`` int64."""
        return self.sums[0, 0].long()

    @property
    def mean(self) -> Tensor:
        """The means, ``(neurons,)`` float64."""
        return self.sums[1] / (self.sums[0] > 0)

    @property
    def sd(self) -> Tensor:
        """The standard deviations of the positions seen (divided by their number), ``(neurons,)`` float64."""
        return (self.sums[2] / self.sums[0]).sqrt()

    @property
    def rms(self) -> Tensor:
        """The roots of the mean squares, ``(neurons,)`` float64."""
        return (self.mean.square() + self.sd.square()).sqrt()

    @property
    def skewness(self) -> Tensor:
        """The third standardised moments, ``(neurons,)`` float64; 0 for a constant neuron."""
        return torch.where(self.sd == 0, 0.0, self.sums[3] / self.sums[0] / self.sd.pow(3))

    @property
    def kurtosis(self) -> Tensor:
        """The fourth standardised moments less the 3 of a normal density, ``(neurons,)``; 0 for a constant neuron."""
        return torch.where(self.sd == 0, 0.0, self.sums[4] / self.sums[0] / self.sd.pow(4) - 3)

    def check(self) -> None:
        """Raises StatisticsError if there was no valid position."""
        if not int(self.count):
            raise StatisticsError("saw no position that isn't padding; the calibration data are empty")

    def finite(self) -> Tensor:
        """Whether the means are finite, and so every activation was: a bool tensor ``()``, on the device."""
        return self.sums[1].isfinite().all()


def _sums(rows: Tensor) -> Tensor:
    """The ``sums`` of :class:`Moments` of a block, ``(5, neurons)`` float64."""
    rows = rows.double()
    mean = rows[0] + (rows - rows[0]).mean(0)  # exact if all values are equal
    deviation = rows - mean
    square = deviation.square()
    powers = square.sum(0), deviation.mul_(square).sum(0), square.square_().sum(0)
    return torch.stack([torch.full_like(mean, len(rows)), mean, *powers])


def _merged(sums: Tensor) -> Tensor:
    """Merges the sums of blocks or ranks, ``(number, 5, neurons)``, into ``(5, neurons)``."""
    count, mean, second, third, fourth = sums.unbind(1)
    total, reference = count.sum(0), mean[count[:, 0].argmax()]  # exact if all means are equal
    center = reference + (count / total.clamp_min(1) * (mean - reference)).sum(0)
    shift = mean - center
    return torch.stack(
        [
            total,
            center,
            (second + count * shift.square()).sum(0),
            (third + 3 * shift * second + count * shift.pow(3)).sum(0),
            (fourth + 4 * shift * third + 6 * shift.square() * second + count * shift.pow(4)).sum(0),
        ]
    )
