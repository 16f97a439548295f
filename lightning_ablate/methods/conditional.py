"""Conditional-mean ablation."""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from lightning_ablate.errors import ConfigError
from lightning_ablate.methods.base import Ablation, AblationMethod, Affine, Replacement, constant
from lightning_ablate.statistics import ActivationStatistic, Covariance, HeadCovariance, Moments, SiteStatistics, solved


class ConditionalMean(AblationMethod):
    """An ablated neuron is what the neurons of its site that are kept let one expect of it, to first order.

    ``x̂_a = μ_a + Σ_ak (Σ_kk + λ diag Σ_kk)⁻¹ (x_k − μ_k)`` is the best linear prediction from the calibration data;
    what is lost is what only the ablated neurons carried. It is the compensation of the optimal brain surgeon (Hassibi
    & Stork 1993) as a replacement. With nothing kept, or where neurons don't vary together, it is the mean.

    Each condition holds ablated × kept float32 numbers a site on the device, at most n²: a quarter of the 67 MB that
    4,096 neurons would take, at 50%.

    Args:
        ridge: λ, a share of each kept neuron's own variance, so that the scale of a neuron plays no part. None takes
            the one that did best at the site on calibration examples that were held out, see :attr:`Covariance.ridge`:
            without it few of them (a thousand positions) can do more harm than the mean.
        name: what results call it, where the method is there with several options.
        centred: whether means play a part; False regresses the values themselves, without an intercept, as a projection
            needs it that has no bias to take one (see ``lightning_ablate.export``).

    Example:
        >>> from lightning_ablate.sites import Site
        >>> from lightning_ablate.statistics import SiteStatistics
        >>> gathered = {kind: kind(neurons=2) for kind in (Moments, Covariance)}
        >>> for statistic in gathered.values():
        ...     statistic.update(torch.tensor([[[1.0, 2.0], [3.0, 6.0]]]))
        >>> statistics = SiteStatistics("attn.proj", gathered)
        >>> here = Ablation(Site("attn.proj", 2), torch.tensor([False, True]), statistics, 1)
        >>> ConditionalMean(ridge=1e-6).prepare(here)(torch.tensor([[[5.0, 0.0]]]))[..., 1].round(decimals=3)
        tensor([[10.]])
    """

    name = "conditional-mean"
    statistics: ClassVar[tuple[type[ActivationStatistic], ...]] = (Moments, Covariance)
    covariance: ClassVar[type[Covariance]] = Covariance

    def __init__(self, ridge: float | None = None, name: str | None = None, *, centred: bool = True) -> None:
        if ridge is not None and not ridge > 0:
            raise ConfigError(f"ridge is {ridge}, expected a share of the variance above 0, or null to choose it")
        self.ridge, self.centred, self.name = ridge, centred, name or self.name

    def intercept(self, ablation: Ablation, unexplained: Tensor) -> Tensor:
        """What the ablated neurons are expected to be when the kept ones are at their means, ``(..., neurons)``.

        ``unexplained`` ``(..., neurons)`` float64 is the share of each one's variance that the kept ones don't explain.
        """
        return self.moments(ablation.statistics)[0].to(unexplained)

    def moments(self, statistics: SiteStatistics) -> tuple[Tensor, Tensor]:
        """The means ``(neurons,)`` and covariances ``(blocks, width, width)``, or 0 and the mean products."""
        mean, covariance = statistics[Moments].mean, statistics[self.covariance].covariance
        if self.centred:
            return mean, covariance
        rows = mean.to(covariance).view(len(covariance), -1, 1)
        return torch.zeros_like(mean), covariance + rows * rows.mT

    def prepare(self, ablation: Ablation) -> Replacement:
        """Factorises the covariance of the kept neurons once."""
        mask, statistics = ablation.mask, ablation.statistics
        ablated, kept = mask.nonzero().squeeze(1), (~mask).nonzero().squeeze(1)
        unexplained = torch.ones(mask.shape, dtype=torch.float64, device=mask.device)
        if not len(kept):
            return constant(self.intercept(ablation, unexplained).float())
        slopes, explained, ridge = [], [], self.ridge or statistics[self.covariance].ridge
        mean, blocks = self.moments(statistics)
        for block, own in zip(blocks, mask.view(len(blocks), -1), strict=True):
            covariance = block.to(mask.device).double()
            across = covariance[~own][:, own]
            slopes.append(solved(covariance[~own][:, ~own], across, ridge))
            explained.append(share(across * slopes[-1], covariance.diagonal()[own]))
        unexplained[ablated] -= torch.cat(explained)
        offset = self.intercept(ablation, unexplained).float()
        slope = torch.block_diag(*slopes).float()  # type: ignore[no-untyped-call]
        return Affine(offset, slope, mean.to(mask.device)[kept].float(), kept, ablated)

    def alone(self, ablation: Ablation, sizes: Sequence[int]) -> dict[int, Replacement]:
        """From the precision matrix P: less ``(P_uu)⁻¹ (P (x − μ))_u``, what the others don't tell of the unit u."""
        (means, blocks), device = self.moments(ablation.statistics), ablation.mask.device
        covariance = torch.block_diag(*blocks.to(device).double())  # type: ignore[no-untyped-call]
        ridge = self.ridge or ablation.statistics[self.covariance].ridge
        precision = solved(covariance, torch.eye(len(covariance), device=device).double(), ridge)
        mean, found = means.to(device).float(), dict[int, Replacement]()
        for size in sizes:
            if size == len(precision):
                found[size] = constant(mean)
                continue
            columns = precision.view(len(precision), -1, size).transpose(0, 1)  # of each unit
            own = torch.stack([column[u * size : (u + 1) * size] for u, column in enumerate(columns)])
            unexplained = torch.linalg.solve(own, columns, left=False).transpose(0, 1).reshape(precision.shape)
            found[size] = partial(_explained, mean, unexplained.float())
        return found

    def without_intercept(self) -> AblationMethod | None:
        """The regression of the values themselves."""
        method = copy.copy(self)
        method.centred = False
        return method


class ConditionalMeanPerHead(ConditionalMean):
    """The same, but of the neurons kept only those of the same attention head tell.

    For targets whose whole covariances are too large: those of 32 sites with 32 heads of 128 neurons take 67 MB, where
    the whole ones take 2.1 GB. Heads carry one another's information, so much of the gain is lost.
    """

    name = "conditional-mean-per-head"
    statistics = (Moments, HeadCovariance)
    covariance = HeadCovariance


class ConditionalSequential(ConditionalMean):
    """The same regression, fitted where it acts: for each condition, with everything before a site already ablated.

    What is kept has drifted there, and with it what it lets one expect of the ablated neurons; where nothing is kept it
    is the mean of the intact target, if means play a part. ``fit`` makes it for the conditions of its sweep, a forward
    pass of the calibration data each, and the checkpoint holds kept × ablated float32 numbers a site for each of them;
    others need another ``fit``.

    Args:
        intact: whether the values that are regressed are those of the intact target, so that drift is made good as
            well, as layerwise reconstruction does when it prunes (SlimGPT, Ling et al. 2024; GRAIL, arXiv 2602.23795),
            instead of those that the neurons would have there. It takes a second forward pass.
        options: those of :class:`ConditionalMean`.
    """

    name = "conditional-sequential"
    statistics: ClassVar[tuple[type[ActivationStatistic], ...]] = ()
    fitted_from = ConditionalMean.statistics  # which calibration need not gather
    attributable = False  # a unit alone has nothing before it

    def __init__(self, ridge: float | None = None, intact: bool = False, **options: Any) -> None:
        super().__init__(ridge, **options)
        self.intact = intact

    def prepare(self, ablation: Ablation) -> Replacement:
        """Takes what was fitted for the condition."""
        packed = ablation.statistics.learned(self.key(ablation.masks)).to(ablation.mask.device)
        return self.unpacked(packed, ablation.mask)

    def key(self, masks: str) -> str:
        """The name under which a calibration holds what was fitted for the masks of this digest."""
        return f"{self.name} {self.ridge} {self.centred} {self.intact} {masks}"

    def same(self, masks: str) -> str:
        """The name under which the same regression may be there already, fitted for another method."""
        return self.key(masks)

    def regressed(self, ablation: Ablation, mean: Tensor) -> Affine:
        """The regression, from statistics of what the ablated neurons should be, and of the kept ones as they are.

        ``mean`` ``(neurons,)`` is that of the intact target, which is taken where nothing is kept.
        """
        made = cast(Affine, super().prepare(ablation))
        return Affine(mean.to(made.offset)) if self.centred and made.slope is None else made

    def without_intercept(self) -> AblationMethod | None:
        """Nothing: what was fitted has one."""
        return None

    @staticmethod
    def packed(affine: Affine, mask: Tensor) -> Tensor:
        """A regression as one tensor ``(kept + 1, ablated)`` float32, the intercept last."""
        offset = affine.offset[mask]
        if affine.slope is None:
            return offset.unsqueeze(0)
        return torch.cat([affine.slope, (offset - affine.center @ affine.slope).unsqueeze(0)])

    @staticmethod
    def unpacked(packed: Tensor, mask: Tensor) -> Affine:
        """The regression again."""
        offset = packed.new_zeros(len(mask)).masked_scatter(mask, packed[-1])
        kept, ablated = (~mask).nonzero().squeeze(1), mask.nonzero().squeeze(1)
        return Affine(offset, packed[:-1], packed.new_zeros(len(kept)), kept, ablated) if len(kept) else Affine(offset)


def _explained(mean: Tensor, unexplained: Tensor, activations: Tensor) -> Tensor:
    dtype = activations.dtype
    return activations - (activations - mean.to(dtype)) @ unexplained.to(dtype)


def share(products: Tensor, variance: Tensor) -> Tensor:
    """The share of a variance ``(..., ablated)`` that products ``(..., kept, ablated)`` sum up to, 0 to 1."""
    return (products.sum(-2) / variance.clamp_min(torch.finfo(variance.dtype).tiny)).clamp(0, 1)
