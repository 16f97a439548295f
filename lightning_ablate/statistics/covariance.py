"""How the neurons of a site vary together, and regressions of some neurons on others."""

import warnings
from typing import ClassVar, Self

import torch
from torch import Tensor

from lightning_ablate.errors import StatisticsError
from lightning_ablate.sites import Site, heads_of
from lightning_ablate.statistics.base import ActivationStatistic, SiteStatistics, positions

_DOUBLE = 1024  # neurons up to which sums are float64; above, float32 keeps 32 sites of 4096 neurons at 2.1 GB
RIDGES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
_UNKNOWN = 0.01  # the ridge if no example can be held out


class Covariance(ActivationStatistic):
    """Means and covariances of all neurons of a site over the valid positions, in one pass.

    Every batch gives its mean and the products of the deviations from it. Batches merge by the pairwise formula of
    Chan, Golub & LeVeque (1979). Sums are float64 up to 1,024 neurons, and float32 above: 67 MB a site of 4,096
    neurons. While they are gathered they take twice that, as examples with even and with odd indices are kept apart to
    choose the :attr:`ridge`. With ``blocks``, equally wide and side by side, covariances are kept within each alone.
    """

    takes_examples: ClassVar[bool] = True
    sums: Tensor  # for each block of even and then of odd examples: counts, means and products
    chosen: Tensor  # the ridge, () float64; 0 until it is chosen
    _unexplained: Tensor | None  # kept, as a choice asks for it again for every condition
    _orders: dict[int, Tensor]

    def __init__(self, neurons: int, earlier: SiteStatistics | None = None, blocks: int = 1) -> None:
        super().__init__(neurons, earlier)
        self.blocks = blocks
        dtype = torch.float64 if neurons <= _DOUBLE else torch.float32
        # made in `reset`, as torchmetrics keeps a copy of a state's first value
        self.add_state("sums", torch.zeros(0, dtype=dtype), dist_reduce_fx=_merged, persistent=True)
        self.add_state("chosen", torch.zeros((), dtype=torch.float64), dist_reduce_fx="max", persistent=True)
        self.reset()

    def reset(self) -> None:
        """Forgets all positions, see :meth:`torchmetrics.Metric.reset`."""
        super().reset()
        self._forget()
        width = self.neurons // self.blocks
        self.sums = self.sums.new_zeros(2 * self.blocks, width + 2, width)

    def update(self, activations: Tensor, valid: Tensor | None = None, examples: Tensor | None = None) -> None:
        """Adds a batch; ``examples`` are the indices of its examples, ``(batch,)`` int64, None counts them from 0."""
        count = len(activations if valid is None else valid)
        self._forget()
        if examples is None or count % max(1, len(examples)):  # the first axis isn't that of the examples
            examples = torch.arange(count, device=activations.device)
        examples = examples.repeat_interleave(count // max(1, len(examples)))  # several windows of one example
        for half, sums in enumerate(self._halves):
            own = (examples % 2 == half).unsqueeze(1)
            rows = positions(activations, own if valid is None else own & valid).to(self.sums.dtype)
            if len(rows):
                rows = rows.view(len(rows), self.blocks, -1).transpose(0, 1)
                mean = rows.mean(1, keepdim=True)
                rows = rows - mean
                with torch.autocast(rows.device.type, enabled=False):
                    _add(sums, torch.full_like(mean, rows.shape[1]), mean, rows.mT @ rows)

    def note(self, site: Site) -> str | None:
        """That a site has more neurons than there were positions to regress them on."""
        count, width = int(self.count), site.width // self.blocks
        if count >= width:
            return None
        return (
            f"calibrated on {count:,} positions, fewer than the {width:,} neurons that conditional methods regress: "
            "they rest on their ridge; calibrate on more data (--data.calibration_...)"
        )

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
        """The share of its variance that a regression adds to the variance of each neuron, one of ``RIDGES``.

        It is chosen by two-fold cross-validation over examples: even neurons predict odd ones, and the reverse. With
        fewer than two examples it is 0.01.
        """
        if not self.chosen:
            self.chosen.fill_(self._choose())
        return self.chosen.item()

    @property
    def unexplained(self) -> Tensor:
        """The variance of each neuron that the others of its block don't explain, ``(neurons,)`` float64."""
        if self._unexplained is None:
            self._unexplained = 1 / self._precision.diagonal(dim1=1, dim2=2).flatten()
        return self._unexplained

    def order(self, weight: Tensor, size: int = 1) -> Tensor:
        """The order in which the optimal brain surgeon ablates units, ``(units,)`` int64 on the CPU.

        See :func:`eliminated`; ``weight`` is floating. StatisticsError if there are several blocks.
        """
        if self.blocks > 1:
            raise StatisticsError("an order of all neurons needs the covariances of them all, not those within heads")
        if size not in self._orders:
            read = weight.to(self.sums.device).to(torch.float64, copy=True)
            self._orders[size] = eliminated(self._precision[0], read, size).cpu()
        return self._orders[size]

    def reduce(self) -> None:
        """Chooses the ridge, and merges even and odd examples."""
        super().reduce()
        self.ridge  # noqa: B018
        self.sums = self._whole

    @property
    def _precision(self) -> Tensor:
        """The inverse of the covariance with its ridge, ``(blocks, width, width)`` float64."""
        covariance = self.covariance.double()
        identity = torch.eye(covariance.shape[1], dtype=covariance.dtype, device=covariance.device)
        return solved(covariance, identity.expand_as(covariance), self.ridge)

    @property
    def _whole(self) -> Tensor:
        """The sums of all examples, ``(blocks, width + 2, width)``."""
        return self.sums if len(self.sums) == self.blocks else _merged(self._halves)

    @property
    def _halves(self) -> Tensor:
        """The sums of even and of odd examples, ``(2, blocks, width + 2, width)``."""
        return self.sums.view(2, self.blocks, *self.sums.shape[1:])

    def _forget(self) -> None:
        """Lets go of what is computed once from the sums."""
        self._unexplained, self._orders = None, {}

    def _choose(self) -> float:
        if len(self.sums) == self.blocks or not bool((self.sums[:, 0, 0] > 0).all()):
            return _UNKNOWN
        ridges = torch.tensor(RIDGES, dtype=torch.float64, device=self.sums.device)
        left = torch.zeros_like(ridges)
        halves = self._halves
        even = torch.arange(halves.shape[3], device=ridges.device) % 2 == 0
        for block in range(self.blocks):
            for ablated in (even, ~even):
                for one, other in (halves[:, block], halves[:, block].flip(0)):
                    left += _left(one, other, ridges, ablated)
        return RIDGES[int(left.argmin())]


class HeadCovariance(Covariance):
    """Covariances within every attention head alone: 2.1 MB for 32 heads of 128 neurons, instead of 67 MB."""

    @classmethod
    def of(cls, site: Site, earlier: SiteStatistics | None = None) -> Self:
        """Takes the heads of the site as blocks; SiteError if it has none."""
        return cls(site.width, earlier, blocks=heads_of(site))


def solved(among: Tensor, across: Tensor, ridge: float) -> Tensor:
    """The slopes ``(..., kept, ablated)`` float64 of the regression of ablated neurons on kept ones.

    ``among`` ``(..., kept, kept)`` are the covariances of the kept neurons, which are written over; ``across``
    ``(..., kept, ablated)`` those with the ablated ones. ``ridge`` times its variance is added to each variance. The
    ridge is raised, with a warning, until the covariances are positive definite; StatisticsError if no ridge does that.
    """
    given = ridge
    diagonal = among.diagonal(dim1=-2, dim2=-1)
    variances = diagonal.clone()
    while ridge <= 100:
        # a constant neuron has variance 0, and any number above it gives the slope 0
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
        ridge *= 10
    raise StatisticsError("can't be solved: the covariance is not positive definite; calibrate on more data")


def eliminated(precision: Tensor, weight: Tensor, size: int) -> Tensor:
    """Units of ``size`` neurons, ``(units,)`` int64, in the order in which the projection's output needs them least.

    Replacing unit u by its conditional mean changes the output by a mean square of ``tr(W_uᵀ P_uu⁻¹ W_u)`` per
    position. The unit with the least change goes first. Then the weights W of the other units make up for it, and the
    precision P becomes theirs: the optimal brain surgeon (Hassibi & Stork 1993) for one layer. ``precision``
    ``(neurons, neurons)`` and ``weight`` ``(neurons, outputs)``, float64, are written over. It takes O(neurons³).
    """
    left, order = torch.arange(len(precision) // size, device=precision.device), []
    while len(left):
        gone = torch.zeros(len(left), dtype=torch.bool, device=left.device)
        for _ in range(1 + len(left) // 8):  # rows are dropped an eighth at a time
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


def _left(one: Tensor, other: Tensor, ridges: Tensor, ablated: Tensor) -> Tensor:
    """For each ridge the squared error on examples ``other`` of regressions from examples ``one``, but for a constant.

    Both are sums ``(width + 2, width)`` of one block. ``ablated`` neurons are regressed on the others.
    """
    shift = other[1].double() - one[1].double()
    seen = one[2:] / one[0].double()
    truth = (other[2:] / other[0].double()).addr_(shift, shift)
    sd = (seen.diagonal() + truth.diagonal()).div(2).sqrt()  # of both, as a neuron may be nearly constant in one
    scale = torch.where(sd > 0, 1 / sd, 0.0)  # a constant neuron predicts nothing
    seen, truth, scale = (scale[:, None] * seen)[~ablated], (scale[:, None] * truth)[~ablated], scale[~ablated]
    # in the basis of the eigenvectors a ridge changes only a weight of each
    values, basis = torch.linalg.eigh(seen[:, ~ablated] * scale)
    told, true = basis.T @ seen[:, ablated], basis.T @ truth[:, ablated]
    among = (basis.T @ (truth[:, ~ablated] * scale) @ basis) * (told @ told.T)
    weights = 1 / (values.clamp_min(0) + ridges[:, None])
    return ((weights @ among) * weights).sum(1) - 2 * weights @ (told * true).sum(1)


def _add(sums: Tensor, count: Tensor, mean: Tensor, products: Tensor) -> None:
    """Adds the sums of a batch or a rank in place; count and mean are ``(blocks, 1, width)``."""
    total = (sums[:, :1] + count).clamp_min(1)
    shift = mean - sums[:, 1:2]
    sums[:, 2:] += products
    sums[:, 2:].baddbmm_((shift * (sums[:, :1] * count / total)).mT, shift)
    sums[:, 1:2] += shift * (count / total)
    sums[:, :1] += count


def _merged(stacked: Tensor) -> Tensor:
    """Merges the sums of ranks or halves, ``(number, blocks, width + 2, width)``, into ``(blocks, ...)``."""
    merged = torch.zeros_like(stacked[0])
    for own in stacked:
        _add(merged, own[:, :1], own[:, 1:2], own[:, 2:])
    return merged
