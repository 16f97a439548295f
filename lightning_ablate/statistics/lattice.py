"""A histogram of each neuron whose bins fit its values after one pass, whatever the order in which they come."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ablate.statistics.base import ActivationStatistic, SiteStatistics, positions

# Binary digits behind the first one. Values of these types lie on a lattice of their own, and finer bins would comb.
_DIGITS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23, torch.float64: 28}
_NEVER = -(2**20)  # the exponent of a neuron that has seen no value but 0
# the columns before the counts: see _merged_heads
_EXPONENT, _FIRST, _LAST, _LARGEST, _PRECISION, _ZEROS, _HEAD = range(7)


class Histogram(NamedTuple):
    """The values of each neuron, counted.

    Attributes:
        counts: ``(neurons, bins)`` int64, of values other than 0.
        zeros: ``(neurons,)`` int64, of exact zeros.
        start: ``(neurons,)`` float64, where the first bin begins.
        width: ``(neurons,)`` float64, of a bin, a power of two.
        precision: ``(neurons,)`` int64, binary digits behind the first one of the values' own type.
    """

    counts: Tensor
    zeros: Tensor
    start: Tensor
    width: Tensor
    precision: Tensor

    @property
    def values(self) -> Tensor:
        """What a count in each bin stands for on average, ``(neurons, bins)`` float64.

        That is the middle of the bin, less half the spacing of the values' own type, which was rounded to nearest.
        """
        number = torch.arange(self.counts.shape[1], device=self.counts.device)
        middle = self.start.unsqueeze(1) + (number + 0.5) * self.width.unsqueeze(1)
        octave = torch.frexp(middle).exponent - 1 - self.precision.unsqueeze(1)
        return middle - 0.5 * torch.ldexp(torch.ones_like(middle), octave)


class LatticeHistogram(ActivationStatistic):
    """Counts in bins ``[k 2^e, (k + 1) 2^e)``, k a whole number, with an exponent e of each neuron's own.

    It is the smallest with which the bins from the neuron's minimum to its maximum are at most :attr:`bins`, and not
    below the spacing of the values' own type at their largest. When a value falls outside, the window moves, or pairs
    of bins merge. Exponent, window and counts are functions of the values alone: any order of batches and any split
    into ranks gives the identical histogram. Exact zeros are counted by themselves, and take no part in the window.

    The state is int32, 4 bytes a bin, so a neuron can be counted 2^31 times.

    Args:
        neurons: width of the site.
        earlier: not needed.

    Example:
        >>> statistic = LatticeHistogram(neurons=1)
        >>> statistic.update(torch.tensor([[[0.0], [1.0], [1.5], [-3.0]]]))
        >>> histogram = statistic.histogram
        >>> histogram.zeros.item(), histogram.counts.sum().item(), histogram.width.item(), histogram.start.item()
        (1, 3, 0.0078125, -3.0)
    """

    bins = 1024
    lattice: Tensor
    outliers: Tensor

    def __init__(self, neurons: int, earlier: SiteStatistics | None = None) -> None:
        super().__init__(neurons, earlier)
        empty = torch.zeros(neurons, _HEAD + self.bins, dtype=torch.int32)
        empty[:, :_HEAD] = torch.tensor([_NEVER, 0, 0, _NEVER, max(_DIGITS.values()), 0], dtype=torch.int32)
        self.add_state("lattice", empty, dist_reduce_fx=_merged, persistent=True)
        self.add_state("outliers", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum", persistent=True)

    def update(self, activations: Tensor, valid: Tensor | None = None) -> None:
        """Adds a batch, see :meth:`ActivationStatistic.update`."""
        rows = positions(activations, valid)
        if not len(rows):
            return
        precision = _DIGITS[rows.dtype]
        rows = rows.double()
        self.outliers += (~rows.isfinite()).sum()
        rows = rows.nan_to_num(0.0, 0.0, 0.0)
        head = _merged_heads(
            torch.stack([self.lattice[:, :_HEAD].long(), _head_of(rows, precision, self.bins)]), self.bins
        )
        if not torch.equal(head[:, :_LAST], self.lattice[:, :_LAST].long()):
            self.lattice = _moved(self.lattice, head)
        cells = _scaled(rows, -head[:, _EXPONENT]).floor().long() - head[:, _FIRST]
        cells = cells.clamp(0, self.bins - 1) + torch.arange(self.neurons, device=rows.device) * self.bins
        size = self.neurons * self.bins
        counts = torch.bincount(torch.where(rows == 0, size, cells).flatten(), minlength=size + 1)[:size]
        self.lattice[:, :_HEAD] = head.int()
        self.lattice[:, _HEAD:] += counts.view(self.neurons, self.bins).int()

    def compute(self) -> Histogram:
        """See :attr:`histogram`."""
        return self.histogram

    @property
    def histogram(self) -> Histogram:
        """The histogram of every neuron."""
        head = self.lattice[:, :_HEAD].long()
        exponent = torch.where(head[:, _LARGEST] > _NEVER, head[:, _EXPONENT], 0)
        width = _scaled(torch.ones_like(exponent, dtype=torch.float64), exponent)
        start = head[:, _FIRST] * width
        return Histogram(self.lattice[:, _HEAD:].long(), head[:, _ZEROS], start, width, head[:, _PRECISION])

    def finite(self) -> Tensor:
        """Whether all activations were finite."""
        return self.outliers == 0


def _head_of(rows: Tensor, precision: int, bins: int) -> Tensor:
    """What a batch ``(positions, neurons)`` float64 asks of the lattice, ``(neurons, 6)`` int64."""
    zero = rows == 0
    low = torch.where(zero, torch.inf, rows).amin(0)
    high = torch.where(zero, -torch.inf, rows).amax(0)
    seen = low <= high
    low, high = torch.where(seen, low, 1.0), torch.where(seen, high, 1.0)
    largest = torch.frexp(torch.maximum(low.abs(), high.abs())).exponent.long() - 1
    exponent = torch.frexp((high - low) / bins).exponent.long() - 1
    exponent = torch.where(high > low, torch.maximum(exponent, largest - precision), largest - precision)
    first, last = (_scaled(bound, -exponent).floor().long() for bound in (low, high))
    head = torch.stack([exponent, first, last, largest, torch.full_like(first, precision), zero.sum(0)], 1)
    never = head.new_tensor([_NEVER, 0, 0, _NEVER, precision, 0])
    never = never.expand_as(head).clone()
    never[:, _ZEROS] = head[:, _ZEROS]
    return torch.where(seen.unsqueeze(1), head, never)


def _merged_heads(heads: Tensor, bins: int) -> Tensor:
    """The least coarse lattice that holds those of all parts.

    Args:
        heads: ``(parts, neurons, 6)`` int64: the exponent; the first and the last bin that is taken, counted from 0 on
            the number line; the exponent of the largest absolute value; the digits of the coarsest type; exact zeros.
        bins: how many there may be from the first to the last.
    """
    seen = heads[..., _LARGEST] > _NEVER
    largest, precision = heads[..., _LARGEST].amax(0), heads[..., _PRECISION].amin(0)
    exponent = torch.maximum(heads[..., _EXPONENT].amax(0), torch.where(seen.any(0), largest - precision, _NEVER))
    shift = (exponent - heads[..., _EXPONENT]).clamp(0, 62)
    far = 2**40
    first = torch.where(seen, heads[..., _FIRST] >> shift, far).amin(0)
    last = torch.where(seen, heads[..., _LAST] >> shift, -far).amax(0)
    while bool((wide := (last - first >= bins)).any()):
        exponent, first, last = exponent + wide, first >> wide.long(), last >> wide.long()
    none = ~seen.any(0)
    first, last = first.masked_fill(none, 0), last.masked_fill(none, 0)
    return torch.stack([exponent, first, last, largest, precision, heads[..., _ZEROS].sum(0)], 1)


def _moved(lattice: Tensor, head: Tensor) -> Tensor:
    """The counts of a lattice on a coarser or wider one, ``(neurons, 6 + bins)``; its head is left as it was."""
    old, counts = lattice[:, :_HEAD].long(), lattice[:, _HEAD:]
    shift = (head[:, _EXPONENT] - old[:, _EXPONENT]).clamp(0, 62).unsqueeze(1)
    places = old[:, _FIRST, None] + torch.arange(counts.shape[1], device=lattice.device)
    places = ((places >> shift) - head[:, _FIRST, None]).clamp(0, counts.shape[1] - 1)  # beyond, there are no counts
    return torch.cat([lattice[:, :_HEAD], torch.zeros_like(counts).scatter_add_(1, places, counts)], 1)


def _merged(parts: Tensor) -> Tensor:
    """Merges lattices ``(parts, neurons, 6 + bins)``."""
    head = _merged_heads(parts[..., :_HEAD].long(), parts.shape[2] - _HEAD)
    counts = torch.stack([_moved(part, head)[:, _HEAD:] for part in parts]).sum(0, dtype=torch.int32)
    return torch.cat([head.int(), counts], 1)


def _scaled(values: Tensor, exponent: Tensor) -> Tensor:
    """``values * 2^exponent``, exact; in two steps, as the power alone may be out of range."""
    half = exponent.clamp(-2000, 2000) // 2
    return torch.ldexp(torch.ldexp(values, half), exponent.clamp(-2000, 2000) - half)
