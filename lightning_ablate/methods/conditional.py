"""Conditional-mean ablation."""

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from lightning_ablate.errors import ConfigError
from lightning_ablate.methods.base import Ablation, AblationMethod, Affine, Replacement, constant
from lightning_ablate.sites import exact_device
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

    def moments(self, statistics: SiteStatistics) -> tuple[Tensor, Tensor]:
        """The means ``(neurons,)`` and covariances ``(blocks, width, width)``, or 0 and the mean products."""
        mean, covariance = statistics[Moments].mean, statistics[self.covariance].covariance
        if self.centred:
            return mean, covariance
        rows = mean.to(covariance).view(len(covariance), -1, 1)
        return torch.zeros_like(mean), covariance + rows * rows.mT

    def prepare(self, ablation: Ablation) -> Affine:
        """Factorises the covariance of the kept neurons once."""
        mask, statistics = ablation.mask.to(exact_device(ablation.mask.device)), ablation.statistics
        ablated, kept = mask.nonzero().squeeze(1), (~mask).nonzero().squeeze(1)
        mean, blocks = self.moments(statistics)
        offset = mean.to(mask.device).float()
        if not len(kept):
            return Affine(offset.to(ablation.mask.device))
        slopes, ridge = [], self.ridge or statistics[self.covariance].ridge
        for block, own in zip(blocks, mask.view(len(blocks), -1), strict=True):
            covariance = block.to(mask.device).double()
            slopes.append(solved(covariance[~own][:, ~own], covariance[~own][:, own], ridge))
        slope = torch.block_diag(*slopes).float()  # type: ignore[no-untyped-call]
        made = offset, slope, offset[kept], kept, ablated
        return Affine(*(values.to(ablation.mask.device) for values in made))

    def alone(self, ablation: Ablation, sizes: Sequence[int]) -> dict[int, Replacement]:
        """From the precision matrix P: less ``(P_uu)⁻¹ (P (x − μ))_u``, what the others don't tell of the unit u."""
        (means, blocks), device = self.moments(ablation.statistics), exact_device(ablation.mask.device)
        covariance = torch.block_diag(*blocks.to(device).double())  # type: ignore[no-untyped-call]
        ridge = self.ridge or ablation.statistics[self.covariance].ridge
        precision = solved(covariance, torch.eye(len(covariance), device=device).double(), ridge)
        mean, found = means.float().to(ablation.mask.device), dict[int, Replacement]()
        for size in sizes:
            if size == len(precision):
                found[size] = constant(mean)
                continue
            columns = precision.view(len(precision), -1, size).transpose(0, 1)  # of each unit
            own = torch.stack([column[u * size : (u + 1) * size] for u, column in enumerate(columns)])
            unexplained = torch.linalg.solve(own, columns, left=False).transpose(0, 1).reshape(precision.shape)
            found[size] = partial(_explained, mean, unexplained.float().to(mean.device))
        return found


class ConditionalMeanPerHead(ConditionalMean):
    """The same, but of the neurons kept only those of the same attention head tell.

    For targets whose whole covariances are too large: those of 32 sites with 32 heads of 128 neurons take 67 MB, where
    the whole ones take 2.1 GB. Heads carry one another's information, so much of the gain is lost.
    """

    name = "conditional-mean-per-head"
    statistics = (Moments, HeadCovariance)
    covariance = HeadCovariance


def _explained(mean: Tensor, unexplained: Tensor, activations: Tensor) -> Tensor:
    dtype = activations.dtype
    return activations - (activations - mean.to(dtype)) @ unexplained.to(dtype)
