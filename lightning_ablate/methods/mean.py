"""Mean ablation."""

from torch import Tensor

from lightning_ablate.methods.base import ConstantMethod
from lightning_ablate.sites import Site
from lightning_ablate.statistics import Moments, SiteStatistics


class Mean(ConstantMethod):
    """An ablated neuron is its mean over the calibration data.

    Example:
        >>> import torch
        >>> statistic = Moments(neurons=2)
        >>> statistic.update(torch.tensor([[[1.0, 2.0], [3.0, 6.0]]]))
        >>> statistics = SiteStatistics("attn.proj", {Moments: statistic})
        >>> Mean().values(Site("attn.proj", 2), statistics)
        tensor([2., 4.], dtype=torch.float64)
    """

    name = "mean"
    statistics = (Moments,)

    def values(self, site: Site, statistics: SiteStatistics) -> Tensor:
        """The means."""
        return statistics[Moments].mean
