"""Peak ablation, the paper's proposal."""

from lightning_ablate.methods.base import Ablation, AblationMethod, Replacement, constant
from lightning_ablate.statistics import RangeHistogram


class Peak(AblationMethod):
    """An ablated neuron is its most frequent value over the calibration data.

    That is the centre of the fullest of 100 equal bins between the neuron's own minimum and maximum (Pochinkov et al.
    2024, arXiv 2408.17322); of equally full bins the lowest; and a constant neuron's value.

    Example:
        >>> import torch
        >>> from lightning_ablate.sites import Site
        >>> from lightning_ablate.statistics import LatticeHistogram, SiteStatistics
        >>> activations = torch.tensor([[[0.0], [0.501], [0.502], [1.0]]])
        >>> first = LatticeHistogram(neurons=1)
        >>> first.update(activations)
        >>> histogram = RangeHistogram(neurons=1, earlier=SiteStatistics("attn.proj", {LatticeHistogram: first}))
        >>> histogram.update(activations)
        >>> statistics = SiteStatistics("attn.proj", {RangeHistogram: histogram})
        >>> here = Ablation(Site("attn.proj", 1), torch.ones(1, dtype=torch.bool), statistics, None, {})
        >>> Peak().prepare(here)(activations)
        tensor([0.5050])
    """

    name = "peak"
    statistics = (RangeHistogram,)

    def prepare(self, ablation: Ablation) -> Replacement:
        """The peaks."""
        return constant(ablation.statistics[RangeHistogram].peak())
