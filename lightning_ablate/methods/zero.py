"""Zero ablation."""

import torch

from lightning_ablate.methods.base import Ablation, AblationMethod, Replacement, constant


class Zero(AblationMethod):
    """An ablated neuron is 0.

    Example:
        >>> from lightning_ablate.sites import Site
        >>> from lightning_ablate.statistics import SiteStatistics
        >>> mask = torch.tensor([True, False])
        >>> here = Ablation(Site("attn.proj", 2), mask, SiteStatistics("attn.proj", {}), seed=None, unrelated={})
        >>> Zero().prepare(here)(torch.ones(1, 1, 2))
        tensor([0., 0.])
    """

    name = "zero"

    def prepare(self, ablation: Ablation) -> Replacement:
        """Zeros."""
        return constant(torch.zeros(ablation.site.width, device=ablation.mask.device))
