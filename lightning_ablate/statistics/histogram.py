"""The histogram in which the paper looks for a neuron's peak."""

import torch
from torch import Tensor

from lightning_ablate.errors import StatisticsError
from lightning_ablate.statistics.base import ActivationStatistic, SiteStatistics, positions
from lightning_ablate.statistics.lattice import LatticeHistogram

# Another batch composition moves an activation by about 6e-7 of its size; a change of the data moves it by far more.
_TOLERANCE = 1e-4


class RangeHistogram(ActivationStatistic):
    """Equal bins between each neuron's own minimum and maximum, exact, in the epoch after these are known.

    The bins are half-open, the last one closed, and their edges are ``low + k * (high - low) / bins`` in float64, as
    numpy's ``histogram`` defines them.

    Args:
        neurons: width of the site.
        earlier: holds the :class:`LatticeHistogram` of the same activations.

    Example:
        >>> activations = torch.tensor([[[0.0], [0.25], [0.75], [1.0]]])
        >>> first = LatticeHistogram(neurons=1)
        >>> first.update(activations)
        >>> histogram = RangeHistogram(neurons=1, earlier=SiteStatistics("site", {LatticeHistogram: first}))
        >>> histogram.update(activations)
        >>> histogram.compute()[0].nonzero().squeeze(1).tolist(), int(histogram.compute().sum())
        ([0, 25, 75, 99], 4)
        >>> round(histogram.peak().item(), 6)
        0.005
    """

    bins = 100
    needs = (LatticeHistogram,)
    low: Tensor
    high: Tensor
    counts: Tensor
    outside: Tensor

    def __init__(self, neurons: int, earlier: SiteStatistics | None = None) -> None:
        super().__init__(neurons, earlier)
        zeros = torch.zeros(neurons, dtype=torch.float64)
        self.register_buffer("low", zeros if earlier is None else earlier[LatticeHistogram].low.clone())
        self.register_buffer("high", zeros.clone() if earlier is None else earlier[LatticeHistogram].high.clone())
        counts = torch.zeros(neurons, self.bins, dtype=torch.int64, device=self.low.device)
        self.add_state("counts", counts, dist_reduce_fx="sum", persistent=True)
        self.add_state("outside", counts.new_zeros(()), dist_reduce_fx="sum", persistent=True)

    def update(self, activations: Tensor, valid: Tensor | None = None) -> None:
        """Adds a batch, see :meth:`ActivationStatistic.update`."""
        rows = positions(activations, valid).double()
        width = self.high - self.low
        slack = _TOLERANCE * width + torch.finfo(torch.float32).tiny
        # not (inside), so that NaN counts as outside
        self.outside += (~((rows >= self.low - slack) & (rows <= self.high + slack))).sum()
        step = width / self.bins
        index = torch.where(width > 0, (rows - self.low) / step, 0.0).nan_to_num(0.0).floor().clamp(0, self.bins - 1)
        # the division may land one bin off an edge: the edges decide
        index -= ((rows < self.low + index * step) & (index > 0)).double()
        index += ((rows >= self.low + (index + 1) * step) & (index < self.bins - 1) & (width > 0)).double()
        cells = index.long() + torch.arange(self.neurons, device=rows.device) * self.bins
        self.counts += torch.bincount(cells.flatten(), minlength=self.counts.numel()).view_as(self.counts)

    def compute(self) -> Tensor:
        """The counts, ``(neurons, bins)`` int64."""
        return self.counts

    def peak(self) -> Tensor:
        """The centre of the fullest bin, ties to the lowest; a constant neuron's value: ``(neurons,)`` float64."""
        fullest = self.counts == self.counts.amax(1, keepdim=True)
        lowest = fullest.to(torch.int8).argmax(1)  # argmax promises the first of equal values
        return self.low + (lowest + 0.5) * ((self.high - self.low) / self.bins) * (self.high > self.low)

    def finite(self) -> Tensor:
        """Always true: :class:`LatticeHistogram`, one epoch earlier, saw the same activations."""
        return torch.ones((), dtype=torch.bool, device=self.counts.device)

    def check(self) -> None:
        """Raises StatisticsError if activations fell outside the range of the epoch before."""
        if int(self.outside):
            raise StatisticsError(
                f"{int(self.outside)} activations lie outside the range of the first calibration epoch: the exact peak "
                "needs the same data in both; turn shuffling, augmentation and time limits off in the training loader"
            )
