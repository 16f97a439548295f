"""Zero ablation."""

import torch
from torch import Tensor

from lightning_ablate.methods.base import ConstantMethod
from lightning_ablate.sites import Site
from lightning_ablate.statistics import SiteStatistics


class Zero(ConstantMethod):
    """An ablated neuron is 0.

    Example:
        >>> Zero().values(Site("attn.proj", 2), SiteStatistics("attn.proj", {}))
        tensor([0., 0.])
    """

    name = "zero"

    def values(self, site: Site, statistics: SiteStatistics) -> Tensor:
        """Zeros."""
        return torch.zeros(site.width)
