"""Where a neuron's values are centred, from a histogram of them."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lightning_ablate.statistics.lattice import Histogram

_CHUNK = 4096  # neurons at a time, so that no more than some 100 MB are in the making


class PeakEstimator(ABC):
    """Estimates one value of each neuron from its histogram.

    A neuron that was 0 at least as often as not is 0 for every estimator; otherwise its zeros count where 0 lies.
    """

    def __call__(self, histogram: Histogram) -> Tensor:
        """The estimates, ``(neurons,)`` float64.

        Args:
            histogram: of the neurons; every neuron has a count.
        """
        parts = [Histogram(*columns) for columns in zip(*(torch.split(c, _CHUNK) for c in histogram), strict=True)]
        return torch.cat([self._of(part) for part in parts])

    @abstractmethod
    def estimate(self, counts: Tensor, values: Tensor) -> Tensor:
        """The estimates, in the units of the bins' numbers and ascending values.

        Args:
            counts: ``(neurons, bins)`` float64.
            values: ``(neurons, bins)`` float64, what each bin stands for.

        Returns:
            ``(neurons,)`` float64, among the values.
        """

    def _of(self, histogram: Histogram) -> Tensor:
        zeros, counts = histogram.zeros, histogram.counts.double()
        bins = counts.shape[1]
        place = (-histogram.start / histogram.width).long()
        within = (place >= 0) & (place < bins)
        counts.scatter_add_(1, place.clamp(0, bins - 1).unsqueeze(1), (zeros * within).double().unsqueeze(1))
        mostly = 2 * zeros >= zeros + histogram.counts.sum(1)
        return torch.where(mostly, 0.0, self.estimate(counts, histogram.values))


class SmoothedMode(PeakEstimator):
    """The mode of the histogram, smoothed by a normal density of the width ``0.9 min(sd, IQR / 1.349) n^(-1/7)``.

    The exponent is that at which the error of a kernel mode falls fastest (Eddy 1982, "Optimum kernel estimators of the
    mode"; survey: Chacon 2018, arXiv 1807.02789). A parabola through the three highest bins gives the place between.

    Example:
        >>> from lightning_ablate.statistics import LatticeHistogram
        >>> statistic = LatticeHistogram(neurons=1)
        >>> statistic.update(torch.randn(1, 100_000, 1, generator=torch.Generator().manual_seed(0)) + 5)
        >>> round(SmoothedMode()(statistic.histogram).item(), 1)
        5.0
    """

    def estimate(self, counts: Tensor, values: Tensor) -> Tensor:
        """See :meth:`PeakEstimator.estimate`."""
        bins = counts.shape[1]
        number = torch.arange(bins, dtype=torch.float64, device=counts.device)
        n = counts.sum(1).clamp_min(1)
        mean = (counts * number).sum(1) / n
        sd = ((counts * number.square()).sum(1) / n - mean.square()).clamp_min(0).sqrt()
        quartiles = [_quantile(counts, share) for share in (0.25, 0.75)]
        spread = torch.minimum(sd, (quartiles[1] - quartiles[0]) / 1.349)
        spread = torch.where(spread > 0, spread, sd)
        bandwidth = (0.9 * spread * n ** (-1 / 7)).clamp_min(0.5)
        frequency = torch.pi * torch.arange(bins + 1, dtype=torch.float64, device=counts.device) / bins
        kernel = (-0.5 * (bandwidth.unsqueeze(1) * frequency).square()).exp()
        # twice as long, so that what goes over one end does not come in at the other
        smooth = torch.fft.irfft(torch.fft.rfft(counts, 2 * bins) * kernel, 2 * bins)[:, :bins]
        top = smooth.argmax(1, keepdim=True)
        left, peak, right = (smooth.gather(1, (top + step).clamp(0, bins - 1)) for step in (-1, 0, 1))
        bend = left - 2 * peak + right
        inside = (top > 0) & (top < bins - 1) & (bend < 0)
        shift = torch.where(inside, 0.5 * (left - right) / torch.where(inside, bend, 1.0), 0.0).clamp(-0.5, 0.5)
        return _at(values, (top + shift).squeeze(1))


class HalfSampleMode(PeakEstimator):
    """The half-sample mode: the shortest half of the values, of it the shortest half, and so on.

    Source: Bickel & Frühwirth 2006, "On a fast, robust estimator of the mode".

    Example:
        >>> from lightning_ablate.statistics import LatticeHistogram
        >>> statistic = LatticeHistogram(neurons=1)
        >>> statistic.update(torch.tensor([[[0.9], [1.0], [1.1], [3.0], [9.0]]]))
        >>> round(HalfSampleMode()(statistic.histogram).item(), 1)
        1.0
    """

    def estimate(self, counts: Tensor, values: Tensor) -> Tensor:
        """See :meth:`PeakEstimator.estimate`."""
        bins = counts.shape[1]
        below = torch.cat([torch.zeros_like(counts[:, :1]), counts.cumsum(1)], 1)
        first = torch.zeros(len(counts), 1, dtype=torch.int64, device=counts.device)
        last = first + bins - 1
        number = torch.arange(bins, device=counts.device).expand_as(counts)
        while bool((last > first).any()):
            half = 0.5 * (below.gather(1, last + 1) - below.gather(1, first))
            # from each bin, the first one behind which half of what is left lies between
            ends = torch.searchsorted(below[:, 1:].contiguous(), below[:, :-1] + half.clamp_min(1.0) - 1e-6)
            length = torch.where((number >= first) & (ends <= last), ends - number, bins)
            shortest = length == length.amin(1, keepdim=True)
            mass = below.gather(1, (ends + 1).clamp(0, bins)) - below[:, :-1]
            start = torch.where(shortest, mass, -1.0).argmax(1, keepdim=True)  # of equally short ones the fullest
            end = ends.gather(1, start)
            settled = end - start >= last - first
            if bool(settled.all()):
                break
            first, last = torch.where(settled, first, start), torch.where(settled, last, end)
        weights = counts.masked_fill((number < first) | (number > last), 0.0)
        return (weights * values).sum(1) / weights.sum(1).clamp_min(1)


class Median(PeakEstimator):
    """The median, straight between the ends of its bin.

    Example:
        >>> from lightning_ablate.statistics import LatticeHistogram
        >>> statistic = LatticeHistogram(neurons=1)
        >>> statistic.update(torch.tensor([[[-3.0], [1.0], [7.0]]]))
        >>> round(Median()(statistic.histogram).item(), 1)
        1.0
    """

    def estimate(self, counts: Tensor, values: Tensor) -> Tensor:
        """See :meth:`PeakEstimator.estimate`."""
        return _at(values, _quantile(counts, 0.5))


def _quantile(counts: Tensor, share: float) -> Tensor:
    """Where a share of the counts lies below, ``(neurons,)``, in bins, the middle of the first one being 0."""
    below = counts.cumsum(1)
    wanted = share * below[:, -1:]
    bin_ = torch.searchsorted(below, wanted.contiguous()).clamp_max(counts.shape[1] - 1)
    inside = counts.gather(1, bin_).clamp_min(1)
    return (bin_ + (wanted - below.gather(1, bin_)) / inside + 0.5).squeeze(1)


def _at(values: Tensor, place: Tensor) -> Tensor:
    """The values between the bins, straight from one to the next."""
    low = place.floor().clamp(0, values.shape[1] - 2).long().unsqueeze(1)
    left, right = values.gather(1, low), values.gather(1, low + 1)
    return (left + (place.unsqueeze(1) - low) * (right - left)).squeeze(1)
