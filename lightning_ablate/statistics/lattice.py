"""A histogram of each neuron whose bins fit its values after one pass, whatever the order in which they come."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ablate.statistics.base import ActivationStatistic, SiteStatistics, has_kernels, positions

# Binary digits behind the first one. Values of these types lie on a lattice of their own, and finer bins would comb.
_DIGITS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23, torch.float64: 28}
_FINEST = -126  # a bin is no narrower than 2^-126, so that its inverse is a float32
_HEAD = 6  # columns of the state before the counts, see _Head
_BLOCK = 128  # neurons counted at a time, whose bins a core's cache holds


class Histogram(NamedTuple):
    """The values of each neuron, counted.

    Attributes:
        counts: ``(neurons, bins)`` int64, of values other than 0.
        zeros: ``(neurons,)`` int64, of exact zeros.
        start: ``(neurons,)`` float64, where the first bin begins.
        width: ``(neurons,)`` float64, of a bin, a power of two.
        precision: ``(neurons,)`` int64, binary digits behind the first one of the values' own type.
        low: ``(neurons,)`` float64, the minimum, which lies in the first bin.
        high: ``(neurons,)`` float64, the maximum.
    """

    counts: Tensor
    zeros: Tensor
    start: Tensor
    width: Tensor
    precision: Tensor
    low: Tensor
    high: Tensor

    @property
    def values(self) -> Tensor:
        """What a count in each bin stands for on average, ``(neurons, bins)`` float64.

        That is the middle of the bin, less half the spacing of the values' own type, which was rounded to nearest.
        """
        number = torch.arange(self.counts.shape[1], device=self.counts.device)
        middle = self.start.unsqueeze(1) + (number + 0.5) * self.width.unsqueeze(1)
        octave = torch.frexp(middle).exponent - 1 - self.precision.unsqueeze(1)
        return middle - 0.5 * torch.ldexp(torch.ones_like(middle), octave)

    @property
    def all_counts(self) -> Tensor:
        """The counts with the zeros in the bin where 0 lies, ``(neurons, bins)`` float64."""
        place = (-self.start / self.width).long().clamp(0, self.counts.shape[1] - 1)  # without zeros it may be outside
        return self.counts.double().scatter_add_(1, place.unsqueeze(1), self.zeros.double().unsqueeze(1))


class LatticeHistogram(ActivationStatistic):
    """Counts in bins ``[k 2^e, (k + 1) 2^e)``, k a whole number, with an exponent e of each neuron's own.

    e is the smallest with which the bins from the neuron's minimum to its maximum are at most :attr:`bins`, and a bin
    not below the spacing of the values' own type at their largest. When a value falls outside, the window moves, or
    pairs of bins merge. Exponent and window are functions of minimum, maximum and type alone, so any order of batches
    and any split into ranks gives the identical histogram. Exact zeros are counted by themselves.

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

    def __init__(self, neurons: int, earlier: SiteStatistics | None = None) -> None:
        super().__init__(neurons, earlier)
        nothing = torch.full((neurons,), torch.inf, dtype=torch.float64)
        empty = _Head(nothing, -nothing, torch.full((neurons,), max(_DIGITS.values())), torch.zeros(neurons))
        counts = torch.zeros(neurons, self.bins, dtype=torch.int32)
        self.add_state("lattice", torch.cat([empty.packed(), counts], 1), dist_reduce_fx=_merged, persistent=True)

    def update(self, activations: Tensor, valid: Tensor | None = None) -> None:
        """Adds a batch, see :meth:`ActivationStatistic.update`."""
        rows = positions(activations, valid)
        if not len(rows):
            return
        old = self._head
        if has_kernels(rows):
            self._count_by_kernels(rows, old)
            return
        low, high = rows.amin(0), rows.amax(0)
        zeros = old.zeros.new_zeros(self.neurons)
        if int(torch.count_nonzero(rows)) < rows.numel():
            zeros = len(rows) - torch.count_nonzero(rows, dim=0)
        head = old.merged(_Head.of(low, high, rows.dtype, zeros))
        counts = self._counts
        if bool((head.low.isfinite() & head.high.isfinite()).all()):  # or else nothing can be counted any more
            before, window = old.window(self.bins), head.window(self.bins)
            counts = counts if torch.equal(before, window) else _moved(counts, before, window)
            counts += _counted(rows, window, self.bins)
            place = (-window[1]).clamp(0, self.bins - 1).unsqueeze(1)
            counts.scatter_add_(1, place, -zeros.int().unsqueeze(1))  # they were counted where 0 lies
        self._replace(head, counts)

    def _count_by_kernels(self, rows: Tensor, old: "_Head") -> None:
        """The same without a host synchronisation, and reading the rows once unless a value falls out of its window."""
        from lightning_ablate.statistics import kernels

        def scaled(head: _Head) -> tuple[Tensor, Tensor, Tensor]:
            exponent, first = head.window(self.bins)
            span = self.bins * (head.low <= head.high)
            return _power(-exponent).to(kind), first.to(kind), span.to(kind)

        kind = torch.float64 if rows.dtype == torch.float64 else torch.float32
        before = scaled(old)
        low, high, zeros, outside = kernels.count_inside(rows, *before, self._counts)
        head = old.merged(_Head.of(low, high, rows.dtype, zeros.long()))
        self._replace(head, _moved(self._counts, old.window(self.bins), head.window(self.bins)))
        kernels.count_outside(rows, before, scaled(head), outside == 0, self._counts)

    def _replace(self, head: "_Head", counts: Tensor) -> None:
        if counts.data_ptr() == self._counts.data_ptr():
            self.lattice[:, :_HEAD] = head.packed()
        else:
            self.lattice = torch.cat([head.packed(), counts], 1)

    def compute(self) -> Histogram:
        """See :attr:`histogram`."""
        return self.histogram

    @property
    def histogram(self) -> Histogram:
        """The histogram of every neuron."""
        head = self._head
        exponent, first = head.window(self.bins)
        width = _power(exponent)
        return Histogram(self._counts.long(), head.zeros, first * width, width, head.precision, head.low, head.high)

    @property
    def low(self) -> Tensor:
        """The minima, ``(neurons,)`` float64."""
        return self._head.low

    @property
    def high(self) -> Tensor:
        """The maxima, ``(neurons,)`` float64."""
        return self._head.high

    def finite(self) -> Tensor:
        """Whether no activation was NaN or infinite; still true before the first one."""
        low, high = self.low, self.high
        return ((low.isfinite() & high.isfinite()) | ((low == torch.inf) & (high == -torch.inf))).all()

    @property
    def _head(self) -> "_Head":
        return _Head.unpacked(self.lattice[:, :_HEAD])

    @property
    def _counts(self) -> Tensor:
        return self.lattice[:, _HEAD:]


class _Head(NamedTuple):
    """What tells the lattice of each neuron, ``(..., neurons)``, beside its zeros.

    It is kept in columns of int32 before the counts, the bounds bit by bit in two each, since torchmetrics reduces
    every state by itself, and counts can't be merged without it.
    """

    low: Tensor
    high: Tensor
    precision: Tensor
    zeros: Tensor

    @classmethod
    def of(cls, low: Tensor, high: Tensor, dtype: torch.dtype, zeros: Tensor) -> "_Head":
        """Of a batch of values of that dtype."""
        digits = torch.full_like(zeros, _DIGITS[dtype])
        return cls(low.double() + 0.0, high.double() + 0.0, digits, zeros)  # -0.0 is 0.0

    def packed(self) -> Tensor:
        """As ``(..., neurons, 6)`` int32."""
        bounds = torch.stack([self.low, self.high], -1).view(torch.int32)
        return torch.cat([bounds, torch.stack([self.precision, self.zeros], -1).int()], -1)

    @classmethod
    def unpacked(cls, columns: Tensor) -> "_Head":
        """From ``(..., neurons, 6)`` int32."""
        low, high = columns[..., :4].contiguous().view(torch.float64).unbind(-1)
        precision, zeros = columns[..., 4:6].long().unbind(-1)
        return cls(low, high, precision, zeros)

    def merged(self, other: "_Head") -> "_Head":
        """Of both."""
        return _Head(
            torch.minimum(self.low, other.low),
            torch.maximum(self.high, other.high),
            torch.minimum(self.precision, other.precision),
            self.zeros + other.zeros,
        )

    def window(self, bins: int) -> Tensor:
        """The exponent of a bin's width, and the number of the first bin, counted from 0: ``(2, ..., neurons)`` int64.

        Both are 0 for a neuron without values.
        """
        seen = self.low <= self.high
        low, high = torch.where(seen, self.low, 0.0), torch.where(seen, self.high, 0.0)
        largest = torch.maximum(low.abs(), high.abs())
        share = high / bins - low / bins
        # 0 has no exponent of its own; 2^(e - 1) <= share < 2^e, so that e or e + 1 is enough
        spacing = torch.where(largest > 0, torch.frexp(largest).exponent - 1 - self.precision, _FINEST)
        exponent = torch.where(share > 0, torch.frexp(share).exponent.long(), _FINEST)
        exponent = torch.maximum(exponent, spacing).clamp_min(_FINEST)
        first, last = (_places(bound, _power(-exponent)) for bound in (low, high))
        exponent = torch.where(last - first < bins, exponent, exponent + 1)
        first = _places(low, _power(-exponent)).long()
        return torch.stack([torch.where(seen, exponent, 0), torch.where(seen, first, 0)])


def _counted(rows: Tensor, window: Tensor, bins: int) -> Tensor:
    """The counts of a batch, zeros among them.

    Args:
        rows: ``(positions, neurons)``, floating; all of them in the window.
        window: ``(2, neurons)``, see :meth:`_Head.window`.
        bins: how many.

    Returns:
        ``(neurons, bins)`` int32 or int64.
    """
    exponent, first = window
    rows = rows if rows.dtype == torch.float64 else rows.float()
    # both the scaling and the floor are exact; a bin's number is below 2^24 in float32 and 2^29 in float64
    scale = _power(-exponent).to(rows.dtype)
    counts = []
    for columns, by, begin in zip(*(x.split(_BLOCK, -1) for x in (rows, scale, first)), strict=True):
        cells = (torch.arange(len(begin), device=rows.device) * bins - begin).int()
        places = _places(columns, by, small=bool((by < 1).any())).int()
        cells = places.add_(cells)
        counts.append(torch.bincount(cells.flatten(), minlength=len(begin) * bins).view(-1, bins))
    return torch.cat(counts)


def _places(values: Tensor, by: Tensor, small: bool = True) -> Tensor:
    """The numbers of the bins, ``floor(values * by)``; where the product can be too small, what is below 0 stays so."""
    places = (values * by).floor_()
    return torch.where((values < 0) & (places == 0), -1.0, places) if small else places


def _moved(counts: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """The counts ``(neurons, bins)`` of a window in a wider or coarser one."""
    (exponent, first), (coarser, start) = old, new
    shift = (coarser - exponent).clamp(0, 62).unsqueeze(1)
    places = first.unsqueeze(1) + torch.arange(counts.shape[1], device=counts.device)
    places = ((places >> shift) - start.unsqueeze(1)).clamp(0, counts.shape[1] - 1)  # beyond, there are no counts
    return torch.zeros_like(counts).scatter_add_(1, places, counts)


def _merged(parts: Tensor) -> Tensor:
    """Merges lattices ``(parts, neurons, 6 + bins)``."""
    bins = parts.shape[2] - _HEAD
    heads = [_Head.unpacked(part[:, :_HEAD]) for part in parts]
    head = heads[0]
    for other in heads[1:]:
        head = head.merged(other)
    moved = [
        _moved(part[:, _HEAD:], own.window(bins), head.window(bins)) for part, own in zip(parts, heads, strict=True)
    ]
    return torch.cat([head.packed(), torch.stack(moved).sum(0, dtype=torch.int32)], 1)


def _power(exponent: Tensor) -> Tensor:
    """2 to the power of whole numbers from -1022 to 1023, exact, float64."""
    return ((exponent + 1023) << 52).view(torch.float64)
