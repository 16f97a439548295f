"""Mean ablation."""

from lightning_ablate.methods.base import Ablation, AblationMethod, Replacement, constant
from lightning_ablate.statistics import Moments


class Mean(AblationMethod):
    """An ablated neuron is its mean over the calibration data.

    Example:
        >>> import torch
        >>> from lightning_ablate.sites import Site
        >>> from lightning_ablate.statistics import SiteStatistics
        >>> statistic = Moments(neurons=2)
        >>> statistic.update(torch.tensor([[[1.0, 2.0], [3.0, 6.0]]]))
        >>> statistics = SiteStatistics("attn.proj", {Moments: statistic})
        >>> here = Ablation(Site("attn.proj", 2), torch.ones(2, dtype=torch.bool), statistics, None, {})
        >>> Mean().prepare(here)(torch.zeros(1, 1, 2))
        tensor([2., 4.])
    """

    name = "mean"
    statistics = (Moments,)

    def prepare(self, ablation: Ablation) -> Replacement:
        """The means."""
        return constant(ablation.statistics[Moments].mean)
