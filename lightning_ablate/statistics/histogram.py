"""The histogram of each neuron, and where its values are centred."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_ablate.errors import StatisticsError
from lightning_ablate.statistics import estimators
from lightning_ablate.statistics.base import ActivationStatistic, SiteStatistics, positions
from lightning_ablate.statistics.moments import Moments

# Another batch composition moves an activation by about 6e-7 of its size; a change of the data moves it by far more.
_TOLERANCE = 1e-4  # of the neuron's range
_UNSURE = 1e-3  # of a bin: values so close to an edge are compared with it in float64
_STEEP = 1e38  # bins in 1.0 of activation, at most
_BLOCK = 2**17  # values at a time, which fit in a core's cache
_CHUNK = 4096  # neurons at a time, whose estimates take some 350 MB


class Centres(NamedTuple):
    """Where each neuron's values are centred, ``(neurons,)`` float64 each (see ``estimators``)."""

    peak: Tensor  # of Pochinkov et al. 2024: the centre of the fullest of 100 bins, the lowest of equals
    mode: Tensor  # of the histogram smoothed by a normal density
    median: Tensor
    half_sample_mode: Tensor


class _Scale(NamedTuple):
    """How many bins a value lies above an edge, in the value's dtype; within 1,000 bins off by 0.001 at most."""

    start: Tensor  # (neurons, 1), like the others
    rest: Tensor  # edge - start, which is what rounding took, in bins
    bins: Tensor  # in 1.0 of activation

    @classmethod
    def of(cls, edge: Tensor, bins: Tensor, dtype: torch.dtype) -> "_Scale":
        """If a range is too narrow for the dtype, all values count as the edge; if it is 0, others are far outside."""
        start, bins = edge.to(dtype), torch.where((bins > _STEEP) & ~bins.isinf(), 0.0, bins.clamp(max=_STEEP))
        return cls(*(one.to(dtype).unsqueeze(1) for one in (start, (edge - start) * bins, bins)))

    def at(self, columns: Tensor, here: slice) -> Tensor:
        """The bins of some neurons' values ``(neurons, positions)``."""
        return (columns[here] - self.start[here]).mul_(self.bins[here]).sub_(self.rest[here])


class Histogram(ActivationStatistic):
    """Counts in 1,000 equal bins between each neuron's minimum and maximum, which :class:`Moments` found before.

    Ten bins make one of the 100 bins in which the paper looks for a neuron's peak. Bins are half-open, the last one is
    closed. The edges of the 100 are ``low + k * (high - low) / 100`` in float64, as in numpy's ``histogram``.

    The median is searched in 1,000 finer bins from one standard deviation below the mean to one above, where it always
    lies (Mallows 1991). So it is off by less than 0.0023 standard deviations, however heavy the tails.

    A neuron that was 0 at half of the positions or more has 0 as its mode, median and half-sample mode.

    A neuron takes 16 bytes a bin while counts are gathered, and four numbers after :meth:`reduce` and in checkpoints.
    """

    bins = 1000
    paper_bins = 100
    needs = (Moments,)
    low: Tensor
    high: Tensor
    values: Tensor
    counts: Tensor
    central: Tensor
    zeros: Tensor
    outside: Tensor
    left: Tensor
    fine: Tensor

    def __init__(self, neurons: int, earlier: SiteStatistics | None = None) -> None:
        super().__init__(neurons, earlier)
        nothing, known = torch.zeros(neurons, dtype=torch.float64), None if earlier is None else earlier[Moments]
        low, high, mean, sd = (known.low, known.high, known.mean, known.sd) if known else [nothing] * 4
        self.register_buffer("low", low.clone())
        self.register_buffer("high", high.clone())
        self.register_buffer("values", low.new_full((len(Centres._fields), neurons), torch.nan))
        # edges are multiples of a power of two, so that rounding errors of the moments change none
        unit = torch.ldexp(torch.ones_like(sd), torch.frexp(1.37 * sd).exponent - 5)
        left, right = ((mean - sd) / unit - 0.377).floor() * unit, ((mean + sd) / unit + 0.377).ceil() * unit
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("fine", (right - left) / self.bins, persistent=False)
        zeros = torch.zeros(neurons, dtype=torch.int64, device=low.device)
        # without bins until the first batch, as torchmetrics keeps a copy of every state's first value
        self.add_state("counts", zeros.new_zeros(neurons, 0), dist_reduce_fx="sum")
        self.add_state("central", zeros.new_zeros(neurons, 0), dist_reduce_fx="sum")  # the first and last are outside
        self.add_state("zeros", zeros, dist_reduce_fx="sum", persistent=True)
        self.add_state("outside", zeros.new_zeros(()), dist_reduce_fx="sum", persistent=True)

    def update(self, activations: Tensor, valid: Tensor | None = None) -> None:
        """Adds a batch, see :meth:`ActivationStatistic.update`."""
        rows = positions(activations, valid)
        self._begin()
        if not len(rows):
            return
        columns = rows.T.to(torch.promote_types(rows.dtype, torch.float32)).contiguous()
        numbers = torch.arange(self.neurons, device=rows.device, dtype=torch.int32).unsqueeze(1)
        first, first_near = numbers * self.bins, numbers * (self.bins + 2) + 1
        one = torch.ones((), dtype=torch.int64, device=rows.device)
        own = _Scale.of(self.low, self.bins / (self.high - self.low), columns.dtype)
        central = _Scale.of(self.left, 1 / self.fine, columns.dtype)
        slack = _TOLERANCE * self.bins
        for start in range(0, self.neurons, size := max(1, _BLOCK // max(1, len(rows)))):
            here = slice(start, start + size)
            block, cells = columns[here], own.at(columns, here)
            self.zeros[here] += len(rows) - block.count_nonzero(1)
            least, most = cells.aminmax()
            if not bool((least >= -slack) & (most <= self.bins + slack)):  # NaN too
                self.outside += (cells.clamp(-slack, self.bins + slack) != cells).sum()
                cells.nan_to_num_()
            unsure = ((cells - cells.round()).abs_() < _UNSURE).flatten().nonzero().flatten()
            cells = cells.clamp_(0, self.bins - 1).int().add_(first[here]).flatten()
            cells[unsure] = self._exact(block.flatten()[unsure], start + unsure // len(rows)).int()
            self.counts.view(-1).index_add_(0, cells, one.expand(len(cells)))
            near = central.at(columns, here).floor_().nan_to_num_().clamp_(-1, self.bins).int()
            near = near.add_(first_near[here]).flatten()
            self.central.view(-1).index_add_(0, near, one.expand(len(near)))

    def _exact(self, values: Tensor, neurons: Tensor) -> Tensor:
        """Indices into the flattened counts of values near an edge, by comparison with the edges in float64."""
        values, low, step = values.double(), self.low[neurons], self._step[neurons]
        share = self.bins // self.paper_bins
        edge = ((values - low) * (share / step).nan_to_num(posinf=0.0)).round_()
        below = values < edge / share * step + low  # such a value is in the bin before
        return (edge - below.double()).nan_to_num_().clamp_(0, self.bins - 1) + neurons * self.bins

    def compute(self) -> Tensor:
        """See :meth:`described`."""
        return self.described()

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Merges the ranks, see :meth:`torchmetrics.Metric.sync`; a rank without a batch gets its bins here."""
        self._begin()
        super().sync(*args, **kwargs)

    def reduce(self) -> None:
        """Keeps the :attr:`centres`, and frees the counts."""
        self.values, self.counts = self.described(), self.counts.new_zeros(self.neurons, 0)
        self.central = self.counts
        super().reduce()

    def described(self) -> Tensor:
        """The :attr:`centres`, ``(4, neurons)`` float64."""
        if not bool(self.values.isnan().all()):  # complete, or from a checkpoint
            return self.values
        fullest = self.counts.view(self.neurons, self.paper_bins, -1).sum(2).argmax(1)  # the first of equal ones
        peak = self.low + (fullest + 0.5) * self._step
        bins = torch.cat([estimators.described(some.double()) for some in torch.split(self.counts, _CHUNK)], 1)
        middle = torch.cat([estimators.median(some.double()) for some in torch.split(self.central, _CHUNK)]) - 1
        mode, half_sample = self.low + bins * ((self.high - self.low) / self.bins)
        found = torch.stack([mode, self.left + middle.clamp(0, self.bins) * self.fine, half_sample])
        found = torch.where(2 * self.zeros >= self.counts.sum(1), 0.0, found.clamp(self.low, self.high))
        return torch.cat([peak.unsqueeze(0), found])

    @property
    def centres(self) -> Centres:
        """See :class:`Centres`."""
        return Centres(*self.described())

    def quantile(self, q: float | Tensor) -> Tensor:
        """The quantiles of each neuron's values, to half a bin: 0.0005 of the range from minimum to maximum.

        Like :func:`torch.quantile`: of n values in ascending order it is the one at rank ``q * (n - 1)``, from 0, and
        between two ranks linear. Each value counts as the centre of its bin.

        Args:
            q: shares of the values, 0 to 1.

        Returns:
            ``(neurons,)`` float32, or ``(len(q), neurons)`` for a tensor with one axis.

        Raises:
            StatisticsError: after :meth:`reduce`, or from a checkpoint, where the counts are no longer there.
        """
        if not self.counts.numel():
            raise StatisticsError("the histogram has no counts: ask for quantiles before `reduce()` frees them")
        shares, upto = torch.as_tensor(q, dtype=torch.float64, device=self.counts.device), self.counts.cumsum(1)
        if not bool(((shares >= 0) & (shares <= 1)).all()):
            raise ValueError(f"q is {q}, expected shares from 0 to 1")
        rank = (upto[:, -1:] - 1) * shares.flatten()  # (neurons, shares)
        below, above = (torch.searchsorted(upto, one.long(), right=True) for one in (rank.floor(), rank.ceil()))
        bins = 0.5 + below + (above - below) * rank.frac()
        found = self.low.unsqueeze(1) + bins * ((self.high - self.low) / self.bins).unsqueeze(1)
        return found.float().T.reshape(*shares.shape, self.neurons)

    def check(self) -> None:
        """Computes the centres; StatisticsError if activations fell outside the range of the epoch before."""
        if int(self.outside):
            raise StatisticsError(
                f"{int(self.outside)} activations lie outside the range of the first calibration epoch: the histogram "
                "needs the same data in both; turn shuffling, augmentation and time limits off in the training loader"
            )
        self.values = self.described()

    @property
    def _step(self) -> Tensor:
        return (self.high - self.low) / self.paper_bins

    def _begin(self) -> None:
        if not self.counts.numel():
            self.counts = self.counts.new_zeros(self.neurons, self.bins)
            self.central = self.counts.new_zeros(self.neurons, self.bins + 2)
