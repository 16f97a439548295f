"""Where a neuron's values are centred, from a histogram of them.

Places are told in bins, with a fraction: 0 is where the first bin begins, and 0.5 its middle.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

_HILL = 5.0  # standard errors
_NOTHING = 1e-6  # what rounding leaves of no counts is below


def described(counts: Tensor) -> Tensor:
    """The places of mode, median and half-sample mode, and the number of modes, ``(4, neurons)`` float64.

    ``counts`` are ``(neurons, bins)`` float64 for all estimators here; every neuron has one. ``below`` are those below
    each edge, ``(neurons, bins + 1)``.
    """
    below = functional.pad(counts.cumsum(1), (1, 0))
    smooth, bandwidth = _smoothed(counts, below)
    middle, half_sample = _quantile(counts, below, 0.5), _half_sample_mode(counts, below)
    return torch.stack([_top(smooth), middle, half_sample, _hills(smooth, bandwidth).double()])


def median(counts: Tensor) -> Tensor:
    """Where half of the counts lie below, ``(neurons,)``."""
    return _quantile(counts, functional.pad(counts.cumsum(1), (1, 0)), 0.5)


def _half_sample_mode(counts: Tensor, below: Tensor) -> Tensor:
    """The half-sample mode: the shortest half of the values, of it the shortest half, and so on, ``(neurons,)``.

    Source: Bickel & Frühwirth 2006, "On a fast, robust estimator of the mode".
    """
    bins, above, total = counts.shape[1], below[:, 1:].contiguous(), below[:, -1:] + 1
    first = torch.zeros(len(counts), 1, dtype=torch.int64, device=counts.device)
    last = first + bins - 1
    number = torch.arange(bins, device=counts.device)
    while (longest := int((last - first).max())) > 0:
        half = 0.5 * (below.gather(1, last + 1) - below.gather(1, first))
        starts = (first + number[: longest + 1]).clamp_max(bins)
        begun = below.gather(1, starts)
        # from each bin, the first one behind which half of what is left lies between
        ends = torch.searchsorted(above, begun.add(half.clamp_min(1.0).sub(1e-6)))
        mass = below.gather(1, (ends + 1).clamp_max_(bins)).sub_(begun).div_(total)
        length = (ends - starts).double().sub_(mass)  # of equally short ones the fullest
        best = length.masked_fill_(ends > last, bins).argmin(1, keepdim=True)
        start, end = starts.gather(1, best), ends.gather(1, best)
        settled = end - start >= last - first
        if bool(settled.all()):
            break
        first, last = torch.where(settled, first, start), torch.where(settled, last, end)
    weights = counts.masked_fill((number < first) | (number > last), 0.0)
    return (weights * (number + 0.5)).sum(1) / weights.sum(1).clamp_min(1)


def _top(smooth: Tensor) -> Tensor:
    """Where the highest bin is, by the parabola through it and its neighbours, ``(neurons,)``."""
    bins = smooth.shape[1]
    top = smooth.argmax(1, keepdim=True)
    left, peak, right = (smooth.gather(1, (top + step).clamp(0, bins - 1)) for step in (-1, 0, 1))
    bend = left - 2 * peak + right
    inside = (top > 0) & (top < bins - 1) & (bend < 0)
    shift = torch.where(inside, 0.5 * (left - right) / torch.where(inside, bend, 1.0), 0.0).clamp(-0.5, 0.5)
    return (top + 0.5 + shift).squeeze(1)


def _hills(smooth: Tensor, bandwidth: Tensor) -> Tensor:
    """How many modes each neuron's density has, ``(neurons,)`` int64: hills of the smoothed histogram.

    A hill counts if it stands out of the sampling noise: on a scale on which the noise has a standard deviation of 1
    everywhere (the root of a Poisson count, doubled), the histogram rises to it and falls behind it by at least 5.
    """
    # a normal kernel of width h averages as many independent bins as are 2 sqrt(pi) h wide
    heights = 2 * (2 * math.sqrt(math.pi) * bandwidth.unsqueeze(1) * smooth).clamp_min(_NOTHING).sqrt()
    rises = functional.pad(heights, (1, 1)).diff(dim=1) > 0
    bends = rises[:, 1:] != rises[:, :-1]  # a hill begins and ends at these, so that the others need not be looked at
    place = bends.cumsum(1)
    heights = heights.new_zeros(len(heights), int(place.max()) + 2).scatter_(1, place * bends, heights)[:, 1:]
    turns, sign, extreme = (torch.full_like(bandwidth, start) for start in (0.0, 1.0, 0.0))
    for height in heights.T.contiguous():  # one behind the other, all neurons at once
        signed = sign * height  # climbing, or falling with the sign turned
        extreme = torch.maximum(extreme, signed)
        turned = extreme - signed >= _HILL
        turns += turned
        sign = torch.where(turned, -sign, sign)
        extreme = torch.where(turned, -signed, extreme)
    return ((turns + 1) // 2).long().clamp_min(1)  # every other turn ends a hill; few values, too, are somewhere


def _smoothed(counts: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """The counts convolved with a normal density, and its width ``(neurons,)`` in bins.

    The width is ``0.9 min(sd, IQR / 1.349) n^(-1/7)``, the exponent that at which the error of a kernel mode falls
    fastest (Eddy 1982, "Optimum kernel estimators of the mode"; survey: Chacon 2018, arXiv 1807.02789).
    """
    bins = counts.shape[1]
    number = torch.arange(bins, dtype=torch.float64, device=counts.device)
    n = counts.sum(1).clamp_min(1)
    mean = (counts * number).sum(1) / n
    sd = ((counts * number.square()).sum(1) / n - mean.square()).clamp_min(0).sqrt()
    spread = torch.minimum(sd, (_quantile(counts, below, 0.75) - _quantile(counts, below, 0.25)) / 1.349)
    spread = torch.where(spread > 0, spread, sd)
    bandwidth = (0.9 * spread * n ** (-1 / 7)).clamp_min(0.5)
    frequency = torch.pi * torch.arange(bins + 1, dtype=torch.float64, device=counts.device) / bins
    kernel = (-0.5 * (bandwidth.unsqueeze(1) * frequency).square()).exp()
    # twice as long, so that what goes over one end does not come in at the other
    spectrum = torch.fft.rfft(counts, 2 * bins)
    torch.view_as_real(spectrum).mul_(kernel.unsqueeze(2))
    return torch.fft.irfft(spectrum, 2 * bins)[:, :bins], bandwidth


def _quantile(counts: Tensor, below: Tensor, share: float) -> Tensor:
    """Where a share of the counts lies below, straight between the ends of its bin, ``(neurons,)``."""
    wanted = share * below[:, -1:]
    bin_ = (torch.searchsorted(below, wanted) - 1).clamp_(0, counts.shape[1] - 1)
    inside = counts.gather(1, bin_).clamp_min(1)
    return (bin_ + (wanted - below.gather(1, bin_)) / inside).squeeze(1)
