"""Optimal ablation: values that are learned."""

import torch
from torch import Tensor

from lightning_ablate.methods.base import Ablation, ConstantMethod, LearnedMethod, Replacement
from lightning_ablate.methods.conditional import Conditional, share
from lightning_ablate.sites import Site
from lightning_ablate.statistics import Covariance, Moments, SiteStatistics


class Optimal(LearnedMethod, ConstantMethod):
    """An ablated neuron is the constant with which the target does best (Li & Janson 2024).

    They are learned for all neurons together, see :class:`LearnedMethod`.

    Example:
        >>> statistics = SiteStatistics("attn.proj", {}, {"optimal": torch.tensor([0.5, 2.0])})
        >>> Optimal().values(Site("attn.proj", 2), statistics)
        tensor([0.5000, 2.0000])
    """

    name = "optimal"

    def values(self, site: Site, statistics: SiteStatistics) -> Tensor:
        """The values learned."""
        return statistics.learned(self.name)


class ConditionalOptimal(LearnedMethod, Conditional):
    """The conditional mean with a learned intercept.

    What is kept has itself drifted when other sites are ablated as well, which the intercept can make good:
    ``x̂_a = μ_a + δ_a r_a + Σ_ak Σ_kk⁻¹ (x_k − μ_k)``. δ is learned, and r, the standard deviation of the neuron that
    the kept ones don't explain, as a share of its own, lets it fade where these tell enough.

    Args:
        ridge: see :class:`Conditional`.
        steps: see :class:`LearnedMethod`.
        lr: see :class:`LearnedMethod`.
        examples: see :class:`LearnedMethod`.
    """

    name = "conditional-optimal"
    statistics = Conditional.statistics

    def __init__(self, ridge: float = 1e-6, steps: int = 100, lr: float = 0.05, examples: int = 32) -> None:
        Conditional.__init__(self, ridge)
        LearnedMethod.__init__(self, steps, lr, examples)

    def intercept(self, ablation: Ablation, unexplained: Tensor) -> Tensor:
        """The mean, and so much of what was learned as the kept neurons leave of the standard deviation."""
        mean = ablation.statistics[Moments].mean.to(unexplained)
        learned = ablation.statistics.learned(self.name).to(unexplained)
        return mean + unexplained.sqrt() * (learned - mean)

    def prepare(self, ablation: Ablation) -> Replacement:
        """As :class:`Conditional`; while values are learned for other neurons in every example.

        Then all neurons take part in each regression, and those that aren't kept add nothing.
        """
        if ablation.mask.ndim == 1:
            return super().prepare(ablation)
        mask, statistics = ablation.mask, ablation.statistics
        covariance = statistics[Covariance].covariance.to(mask.device).double()
        among = torch.where(~mask.mT & ~mask, covariance, torch.eye(mask.shape[2], device=mask.device).double())
        across = torch.where(~mask.mT & mask, covariance, 0.0)
        slope = self.solved(among, across)
        explained = share(across * slope, covariance.diagonal(dim1=-2, dim2=-1)).unsqueeze(1)
        offset, center = self.intercept(ablation, 1 - explained).float(), statistics[Moments].mean.to(mask.device)

        def replace(activations: Tensor) -> Tensor:
            dtype = activations.dtype
            return (activations - center.to(dtype)) @ slope.to(dtype) + offset.to(dtype)

        return replace
