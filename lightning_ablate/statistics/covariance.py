"""How the neurons of a site vary together."""

import warnings
from typing import ClassVar, Self

import torch
from torch import Tensor

from lightning_ablate.errors import StatisticsError
from lightning_ablate.sites import Site, heads_of
from lightning_ablate.statistics.base import ActivationStatistic, SiteStatistics, positions

_DOUBLE = 2048  # neurons up to which sums are float64; above, float32 keeps 32 sites of 4096 neurons at 2.1 GB
RIDGES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
_UNKNOWN = 0.01  # where no example can be held out


class Covariance(ActivationStatistic):
    """Means and covariances of all neurons of a site over the valid positions, in one pass.

    Every batch gives the sums of products of the deviations from its own mean; these merge by the pairwise formula of
    Chan, Golub & LeVeque (1979). Sums are float64 up to 2,048 neurons and float32 above: 4 n² bytes a site, 67 MB
    for 4,096 neurons, and twice that while they are gathered: examples with even and with odd indices are kept apart,
    so that :attr:`ridge` can be chosen. Between ``blocks`` of neurons side by side, equally wide, nothing is kept.
    """

    takes_examples: ClassVar[bool] = True
    sums: Tensor
    chosen: Tensor  # the ridge, () float64; 0 before it is

    def __init__(self, neurons: int, earlier: SiteStatistics | None = None, blocks: int = 1) -> None:
        super().__init__(neurons, earlier)
        self.blocks, width = blocks, neurons // blocks
        self._unexplained: Tensor | None = None
        self._orders = dict[int, Tensor]()
        dtype = torch.float64 if neurons <= _DOUBLE else torch.float32
        # of every block, of even and then of odd examples: the count in every column, the mean, and the products
        sums = torch.zeros(2 * blocks, width + 2, width, dtype=dtype)
        self.add_state("sums", sums, dist_reduce_fx=_merged, persistent=True)
        self.add_state("chosen", torch.zeros((), dtype=torch.float64), dist_reduce_fx="max", persistent=True)

    def update(self, activations: Tensor, valid: Tensor | None = None, examples: Tensor | None = None) -> None:
        """Adds a batch, see :meth:`ActivationStatistic.update`.

        ``examples`` are the indices of its examples, ``(batch,)`` int64; None counts them from 0.
        """
        count = len(activations if valid is None else valid)
        self._forget()
        if examples is None or count % max(1, len(examples)):  # what comes first isn't the examples
            examples = torch.arange(count, device=activations.device)
        examples = examples.repeat_interleave(count // max(1, len(examples)))  # of windows, whose examples share them
        for half in (0, 1):
            own = (examples % 2 == half).unsqueeze(1)
            self._add(half, positions(activations, own if valid is None else own & valid))

    def compute(self) -> Tensor:
        """See :attr:`covariance`."""
        return self.covariance

    @property
    def count(self) -> Tensor:
        """The positions seen, ``()`` int64."""
        return self._whole[0, 0, 0].long()

    @property
    def mean(self) -> Tensor:
        """The means, ``(neurons,)`` float64 or float32."""
        return self._whole[:, 1].flatten()

    @property
    def covariance(self) -> Tensor:
        """The covariances over the positions seen (divided by their number), ``(blocks, width, width)``."""
        whole = self._whole
        return whole[:, 2:] / whole[:, :1]

    @property
    def ridge(self) -> float:
        """The share of their variances to add to the neurons', one of ``RIDGES``, where some are regressed on others.

        Half of the neurons are regressed on the others, from one half of the examples: the best value leaves the least
        squared error on the other half. Both halves take both parts. Of fewer than two examples it is 0.01.
        """
        if not self.chosen:
            self.chosen.fill_(self._choose())
        return self.chosen.item()

    @property
    def unexplained(self) -> Tensor:
        """The variance of each neuron that all others of its block don't explain, ``(neurons,)`` float64."""
        if self._unexplained is None:  # a choice asks for every condition, or every example
            self._unexplained = 1 / self._precision.diagonal(dim1=1, dim2=2).flatten()
        return self._unexplained

    def order(self, weight: Tensor, size: int = 1) -> Tensor:
        """In which units of ``size`` neurons go, by the optimal brain surgeon, ``(units,)`` int64 on the CPU.

        ``weight`` ``(neurons, outputs)``, floating, reads them; see :func:`eliminated`. StatisticsError of blocks.
        """
        if self.blocks > 1:
            raise StatisticsError("an order of all neurons needs the covariances of them all, not those within heads")
        if size not in self._orders:
            read = weight.to(self.sums.device).to(torch.float64, copy=True)
            self._orders[size] = eliminated(self._precision[0], read, size).cpu()
        return self._orders[size]

    def choose(self, mask: Tensor) -> None:
        """Chooses the ridge with which just the neurons of a mask ``(neurons,)`` bool are regressed on the others."""
        self._forget()
        self.chosen.fill_(self._choose(mask.view(self.blocks, -1)))

    def reduce(self) -> None:
        """Chooses the ridge, unless it is chosen, and keeps the examples apart no longer."""
        super().reduce()
        self._forget()
        self.ridge  # noqa: B018
        self.sums = self._whole

    @property
    def _precision(self) -> Tensor:
        """The inverse of the covariance with its ridge, ``(blocks, width, width)`` float64."""
        covariance = self.covariance.double()
        identity = torch.eye(covariance.shape[1], dtype=covariance.dtype, device=covariance.device)
        return solved(covariance, identity.expand_as(covariance), self.ridge)

    def _forget(self) -> None:
        self._unexplained, self._orders = None, {}

    @property
    def _whole(self) -> Tensor:
        """The sums of all examples, ``(blocks, width + 2, width)``."""
        return self.sums if len(self.sums) == self.blocks else _merged(self._halves)

    @property
    def _halves(self) -> Tensor:
        """Those of even and of odd examples, ``(2, blocks, width + 2, width)``."""
        return self.sums.view(2, self.blocks, *self.sums.shape[1:])

    def _add(self, half: int, rows: Tensor) -> None:
        if not len(rows):
            return
        rows = rows.to(self.sums.dtype).view(len(rows), self.blocks, -1).transpose(0, 1)
        mean = rows.mean(1, keepdim=True)
        deviations = rows - mean
        sums = self.sums[half * self.blocks : (half + 1) * self.blocks]
        with torch.autocast(rows.device.type, enabled=False):
            _add(sums, torch.full_like(mean, rows.shape[1]), mean, deviations.mT @ deviations)

    def _choose(self, masks: Tensor | None = None) -> float:
        if len(self.sums) == self.blocks or not bool((self.sums[:, 0, 0] > 0).all()):
            return _UNKNOWN
        ridges = torch.tensor(RIDGES, dtype=torch.float64, device=self.sums.device)
        left = torch.zeros_like(ridges)
        halves = self._halves
        every = torch.arange(halves.shape[3], device=ridges.device) % 2 == 0
        for block in range(self.blocks):
            for gone in (every, ~every) if masks is None else (masks[block],):
                for one, other in (halves[:, block], halves[:, block].flip(0)):
                    left += _left(one.double(), other.double(), ridges, gone)
        return RIDGES[int(left.argmin())]


class HeadCovariance(Covariance):
    """The same within every attention head alone: 2.1 MB for 32 heads of 128 neurons, where all 4,096 take 67 MB."""

    @classmethod
    def of(cls, site: Site, earlier: SiteStatistics | None = None) -> Self:
        """With the heads of the site as its blocks; SiteError if it has none."""
        return cls(site.width, earlier, blocks=heads_of(site))


def solved(among: Tensor, across: Tensor, ridge: float) -> Tensor:
    """Regressions ``(..., kept, ablated)`` float64 on neurons with covariances ``among`` ``(..., kept, kept)``.

    ``across`` ``(..., kept, ablated)`` are those with what is regressed; ``ridge`` is a share of each variance to add.
    ``among`` is written over. Where rounding leaves it not positive definite, the ridge is raised, with a warning;
    StatisticsError if it isn't with any.
    """
    given = ridge
    diagonal = among.diagonal(dim1=-2, dim2=-1)
    variances = diagonal.clone()
    while ridge <= 100:
        # a constant neuron has no variance, and then nothing to tell either
        diagonal.copy_(variances * (1 + ridge) + torch.finfo(among.dtype).tiny)
        factor, failed = torch.linalg.cholesky_ex(among)
        if not bool(failed.any()):
            if ridge > given:
                warnings.warn(
                    f"a regression on neurons took a ridge of {ridge:g} instead of {given:g}, as there were too few "
                    "positions for so many neurons; calibrate on more data",
                    stacklevel=2,
                )
            return torch.cholesky_solve(across, factor)
        ridge *= 10  # sums in float32, of fewer positions than neurons
    raise StatisticsError("can't be solved: the covariance is not positive definite; calibrate on more data")


def eliminated(precision: Tensor, weight: Tensor, size: int) -> Tensor:
    """The order in which units of ``size`` neurons go, each the one that the output of the projection needs least.

    With what those that stay let one expect of a unit u in its place, the output changes by ``tr(W_uᵀ P_uu⁻¹ W_u)``,
    the mean square per position. Behind each, weights have taken it over, and the precision P is that of the rest: the
    optimal brain surgeon (Hassibi & Stork 1993) one layer at a time. ``precision`` ``(neurons, neurons)`` and
    ``weight`` ``(neurons, outputs)``, float64, are of no use afterwards. It takes neurons³ steps, like an inverse.
    """
    left, order = torch.arange(len(precision) // size, device=precision.device), []
    while len(left):
        gone = torch.zeros(len(left), dtype=torch.bool, device=left.device)
        for _ in range(1 + len(left) // 8):  # then their rows are dropped
            own = precision.view(len(left), size, len(left), size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
            read, inverse = weight.view(len(left), size, -1), torch.linalg.inv(own)
            lost = (inverse @ read * read).sum((1, 2)).masked_fill(gone, torch.inf)
            unit = int(lost.argmin())
            rows = slice(unit * size, (unit + 1) * size)
            shares = precision[:, rows] @ inverse[unit]
            weight.addmm_(shares, weight[rows].clone(), alpha=-1)
            precision.addmm_(shares, precision[rows].clone(), alpha=-1)
            precision[rows, rows] = torch.eye(size).to(precision)
            gone[unit] = True
            order.append(left[unit])
            if bool(gone.all()):
                break
        stay = (~gone).repeat_interleave(size)
        left, precision, weight = left[~gone], precision[stay][:, stay], weight[stay]
    return torch.stack(order)


def _left(one: Tensor, other: Tensor, ridges: Tensor, gone: Tensor) -> Tensor:
    """The squared error in ``other`` of regressions from ``one``, for each ridge, less what no ridge changes.

    Both are the sums ``(width + 2, width)`` of one block, of which neurons that are ``gone`` are regressed on others.
    """
    shift = other[1] - one[1]
    seen, truth = one[2:] / one[0], other[2:] / other[0] + torch.outer(shift, shift)
    sd = (seen.diagonal() + truth.diagonal()).div(2).sqrt()  # of both, or one that rests in the first tells too much
    scale = torch.where(sd > 0, 1 / sd, 0.0)  # a neuron that is constant tells nothing
    seen, truth = (scale[:, None] * matrix for matrix in (seen, truth))  # of those that tell
    seen, truth, scale = seen[~gone], truth[~gone], scale[~gone]
    # in the basis of the eigenvectors a ridge only changes the weights of the directions
    values, basis = torch.linalg.eigh(seen[:, ~gone] * scale)
    told, true = basis.T @ seen[:, gone], basis.T @ truth[:, gone]
    among = (basis.T @ (truth[:, ~gone] * scale) @ basis) * (told @ told.T)
    weights = 1 / (values.clamp_min(0) + ridges[:, None])
    return ((weights @ among) * weights).sum(1) - 2 * weights @ (told * true).sum(1)


def _add(sums: Tensor, count: Tensor, mean: Tensor, products: Tensor) -> None:
    """Adds those of a batch or a rank, in place; count and mean are ``(blocks, 1, width)``."""
    total = (sums[:, :1] + count).clamp_min(1)
    shift = mean - sums[:, 1:2]
    sums[:, 2:] += products
    sums[:, 2:].baddbmm_((shift * (sums[:, :1] * count / total)).mT, shift)
    sums[:, 1:2] += shift * (count / total)
    sums[:, :1] += count


def _merged(stacked: Tensor) -> Tensor:
    """Merges ``(ranks or halves, blocks, width + 2, width)`` into one of them."""
    merged = torch.zeros_like(stacked[0])
    for own in stacked:
        _add(merged, own[:, :1], own[:, 1:2], own[:, 2:])
    return merged
