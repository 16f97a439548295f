"""Where a neuron's values are centred, from a histogram of them.

Results are in bins: 0 is where the first bin begins, and 0.5 its middle. ``counts`` are ``(neurons, bins)`` float64,
and ``below`` ``(neurons, bins + 1)`` says how many values lie below each edge.
"""

import torch
from torch import Tensor
from torch.nn import functional


def described(counts: Tensor) -> Tensor:
    """Mode and half-sample mode, ``(2, neurons)``; every neuron has a count."""
    below = functional.pad(counts.cumsum(1), (1, 0))
    return torch.stack([_top(_smoothed(counts, below)), _half_sample_mode(counts, below)])


def median(counts: Tensor) -> Tensor:
    """Half of the counts lie below it, ``(neurons,)``."""
    return _quantile(counts, functional.pad(counts.cumsum(1), (1, 0)), 0.5)


def _half_sample_mode(counts: Tensor, below: Tensor) -> Tensor:
    """The shortest interval with half of the values, in it the shortest with half of these, and so on, ``(neurons,)``.

    Source: Bickel & Frühwirth 2006, "On a fast, robust estimator of the mode".
    """
    bins, above, total = counts.shape[1], below[:, 1:].contiguous(), below[:, -1:] + 1
    first = torch.zeros(len(counts), 1, dtype=torch.int64, device=counts.device)
    last = first + bins - 1
    number = torch.arange(bins, device=counts.device)
    while int((last - first).max()) > 0:
        before = below.gather(1, first)
        half = 0.5 * (below.gather(1, last + 1) - before)
        left = torch.searchsorted(below, before + half, right=True) - first  # bins behind which half may be left
        starts = (first + number[: int(left.max())]).clamp_max(bins)
        begun = below.gather(1, starts)
        # for each first bin, the last bin of an interval with half of the values that are left
        ends = torch.searchsorted(above, begun.add(half.clamp_min(1.0).sub(1e-6)))
        mass = below.gather(1, (ends + 1).clamp_max_(bins)).sub_(begun).div_(total)
        length = (ends - starts).double().sub_(mass)  # the fullest of equally short ones
        best = length.masked_fill_(ends > last, bins).argmin(1, keepdim=True)
        start, end = starts.gather(1, best), ends.gather(1, best)
        settled = end - start >= last - first
        if bool(settled.all()):
            break
        first, last = torch.where(settled, first, start), torch.where(settled, last, end)
    weights = counts.masked_fill((number < first) | (number > last), 0.0)
    return (weights * (number + 0.5)).sum(1) / weights.sum(1).clamp_min(1)


def _top(smooth: Tensor) -> Tensor:
    """The top of the parabola through the highest bin and its neighbours, ``(neurons,)``."""
    bins = smooth.shape[1]
    top = smooth.argmax(1, keepdim=True)
    left, peak, right = (smooth.gather(1, (top + step).clamp(0, bins - 1)) for step in (-1, 0, 1))
    bend = left - 2 * peak + right
    inside = (top > 0) & (top < bins - 1) & (bend < 0)
    shift = torch.where(inside, 0.5 * (left - right) / torch.where(inside, bend, 1.0), 0.0).clamp(-0.5, 0.5)
    return (top + 0.5 + shift).squeeze(1)


def _smoothed(counts: Tensor, below: Tensor) -> Tensor:
    """The counts convolved with a normal density of width ``0.9 min(sd, IQR / 1.349) n^(-1/7)``.

    With this exponent the error of the mode falls fastest (Eddy 1982, "Optimum kernel estimators of the mode"; survey:
    Chacon 2018, arXiv 1807.02789).
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
    # twice as long, as a transform of the same length would wrap the ends around
    spectrum = torch.fft.rfft(counts, 2 * bins)
    torch.view_as_real(spectrum).mul_(kernel.unsqueeze(2))
    return torch.fft.irfft(spectrum, 2 * bins)[:, :bins]


def _quantile(counts: Tensor, below: Tensor, share: float) -> Tensor:
    """A share of the counts lies below it, by linear interpolation in its bin, ``(neurons,)``."""
    wanted = share * below[:, -1:]
    bin_ = (torch.searchsorted(below, wanted) - 1).clamp_(0, counts.shape[1] - 1)
    inside = counts.gather(1, bin_).clamp_min(1)
    return (bin_ + (wanted - below.gather(1, bin_)) / inside).squeeze(1)
