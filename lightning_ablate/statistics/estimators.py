"""Where a neuron's values are centred, from a histogram of them."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lightning_ablate.statistics.lattice import Histogram

_CHUNK = 4096  # neurons at a time, so that no more than some 100 MB are in the making
_SLACK = 1e-9  # of one of the paper's bins
_HILL = 5.0  # standard errors


class PeakEstimator(ABC):
    """Estimates one value of each neuron from its histogram.

    A neuron that was 0 at least as often as not is 0 for every estimator; otherwise its zeros count where 0 lies.
    """

    def __call__(self, histogram: Histogram) -> Tensor:
        """The estimates, ``(neurons,)`` float64.

        Args:
            histogram: of the neurons; every neuron has a count.
        """
        return torch.cat([self._of(part) for part in _chunks(histogram)])

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
        mostly = 2 * histogram.zeros >= histogram.zeros + histogram.counts.sum(1)
        found = self.estimate(histogram.all_counts, histogram.values).clamp(histogram.low, histogram.high)
        return torch.where(mostly, 0.0, found)


class OnePassPeak(PeakEstimator):
    """The paper's peak, the centre of the fullest of 100 equal bins from minimum to maximum, after one pass.

    The lattice's bins lie across the paper's edges, so what they hold there is shared out as if it were even. How far
    this can be from the exact peak of a second pass is told by :meth:`error`.

    Example:
        >>> from lightning_ablate.statistics import LatticeHistogram
        >>> statistic = LatticeHistogram(neurons=1)
        >>> statistic.update(torch.tensor([[[0.0], [0.502], [0.503], [1.0]]]))
        >>> peak = OnePassPeak()
        >>> round(peak(statistic.histogram).item(), 6), peak.error(statistic.histogram).item()
        (0.505, 0.0)
    """

    bins = 100

    def error(self, histogram: Histogram) -> Tensor:
        """The most by which the estimates can differ from the exact peaks, ``(neurons,)`` float64.

        A bin can be the fullest one if all that may lie in it is no less than what surely lies in some bin. The bound
        is the distance to the farthest such bin.
        """
        return torch.cat([self._found(part)[1] for part in _chunks(histogram)])

    def estimate(self, counts: Tensor, values: Tensor) -> Tensor:
        """Not enough for this one, which needs the minima and maxima."""
        raise TypeError("the paper's peak needs the whole histogram: call the estimator with it")

    def _of(self, histogram: Histogram) -> Tensor:
        return self._found(histogram)[0]

    def _found(self, histogram: Histogram) -> tuple[Tensor, Tensor]:
        """The estimates and how far they can be off."""
        counts = histogram.counts.double()
        low, high = histogram.low.unsqueeze(1), histogram.high.unsqueeze(1)
        step = (high - low) / self.bins
        step = torch.where((step > 0) & step.isfinite(), step, 1.0)
        number = torch.arange(counts.shape[1] + 1, device=counts.device)
        edges = histogram.start.unsqueeze(1) + number * histogram.width.unsqueeze(1)
        edges = (edges.clamp(low, high) - low) / step
        # how far the rounding of edges reaches, in the paper's bins
        slack = _SLACK + 1e-13 * torch.maximum(low.abs(), high.abs()) / step

        def first_and_last(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
            """The first and the last of the paper's bins in which what lies between can be."""
            bounds = ((left - slack).floor(), (right + slack).floor())
            first, last = (bound.clamp(0, self.bins - 1).long() for bound in bounds)
            return first, last

        first, last = first_and_last(edges[:, :-1], edges[:, 1:])
        at_zero = (0 - low).clamp(max=high - low) / step
        first_zero, last_zero = first_and_last(at_zero, at_zero)
        at_zero = at_zero.floor().clamp(0, self.bins - 1).long()
        sure = torch.zeros_like(counts[:, : self.bins]).scatter_add_(1, first, torch.where(first == last, counts, 0.0))
        zeros = histogram.zeros.double().unsqueeze(1)
        sure.scatter_add_(1, first_zero, torch.where(first_zero == last_zero, zeros, 0.0))
        steps = torch.zeros_like(counts[:, : self.bins + 1])
        for start, end, count in ((first, last, counts), (first_zero, last_zero, zeros)):
            steps.scatter_add_(1, start, count).scatter_add_(1, end + 1, -count)
        possible = steps.cumsum(1)[:, :-1]
        below = torch.cat([torch.zeros_like(low), counts.cumsum(1)], 1)
        paper = torch.arange(self.bins + 1, dtype=torch.float64, device=counts.device).expand(len(low), -1).contiguous()
        right = torch.searchsorted(edges.contiguous(), paper).clamp(1, counts.shape[1])
        start, length = edges.gather(1, right - 1), edges.diff(dim=1).gather(1, right - 1)
        share = torch.where(length > 0, (paper - start) / torch.where(length > 0, length, 1.0), 0.0).clamp(0, 1)
        cumulative = below.gather(1, right - 1) + share * counts.gather(1, right - 1)
        likely = cumulative.diff(dim=1).scatter_add(1, at_zero, zeros)
        likely = torch.minimum(torch.maximum(likely, sure), possible)
        fullest = (likely == likely.amax(1, keepdim=True)).to(torch.int8).argmax(1, keepdim=True)
        candidates = possible >= sure.amax(1, keepdim=True) - 0.5
        distance = (torch.arange(self.bins, device=counts.device) - fullest).abs()
        off = torch.where(candidates, distance, 0).amax(1) * step.squeeze(1)
        varies = histogram.high > histogram.low
        peak = histogram.low + (fullest.squeeze(1) + 0.5) * step.squeeze(1)
        return torch.where(varies, peak, histogram.low), torch.where(varies, off, 0.0)


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
        smooth, _ = _smoothed(counts)
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


def count_modes(histogram: Histogram) -> Tensor:
    """How many modes each neuron's density has, ``(neurons,)`` int64: hills of the smoothed histogram.

    A hill counts if it stands out of the sampling noise: on a scale on which the noise has a standard deviation of 1
    everywhere (the root of a Poisson count, doubled), the histogram rises by at least :data:`_HILL` to it, and falls by
    as much behind it.
    """
    return torch.cat([_hills(part.all_counts) for part in _chunks(histogram)])


def _chunks(histogram: Histogram) -> list[Histogram]:
    return [Histogram(*columns) for columns in zip(*(torch.split(c, _CHUNK) for c in histogram), strict=True)]


def _hills(counts: Tensor) -> Tensor:
    smooth, bandwidth = _smoothed(counts)
    # a normal kernel of width h averages as many independent bins as are 2 sqrt(pi) h wide
    heights = 2 * (2 * math.sqrt(math.pi) * bandwidth.unsqueeze(1) * smooth.clamp_min(0)).sqrt()
    ends = heights.new_zeros(len(heights), 1)
    found = torch.zeros(len(heights), dtype=torch.int64, device=counts.device)
    climbing = torch.ones_like(found, dtype=torch.bool)
    extreme = ends.squeeze(1)
    for height in torch.cat([heights, ends], 1).unbind(1):  # over the bins, all neurons at once
        extreme = torch.where(climbing, torch.maximum(extreme, height), torch.minimum(extreme, height))
        over = climbing & (extreme - height >= _HILL)
        up = ~climbing & (height - extreme >= _HILL)
        found += over
        climbing = torch.where(over | up, ~climbing, climbing)
        extreme = torch.where(over | up, height, extreme)
    return found.clamp_min(1)  # however few values, they are somewhere


def _smoothed(counts: Tensor) -> tuple[Tensor, Tensor]:
    """The counts convolved with a normal density, and its standard deviation ``(neurons,)`` in bins.

    That is ``0.9 min(sd, IQR / 1.349) n^(-1/7)``.
    """
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
    return smooth, bandwidth


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
