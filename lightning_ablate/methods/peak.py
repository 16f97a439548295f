"""Peak ablation, the paper's proposal."""

from torch import Tensor

from lightning_ablate.methods.base import ConstantMethod
from lightning_ablate.sites import Site
from lightning_ablate.statistics import RangeHistogram, SiteStatistics


class Peak(ConstantMethod):
    """An ablated neuron is its most frequent value over the calibration data.

    That is the centre of the fullest of 100 equal bins between the neuron's own minimum and maximum (Pochinkov et al.
    2024, arXiv 2408.17322); of equally full bins the lowest; and a constant neuron's value.

    Example:
        >>> import torch
        >>> from lightning_ablate.statistics import LatticeHistogram
        >>> activations = torch.tensor([[[0.0], [0.501], [0.502], [1.0]]])
        >>> first = LatticeHistogram(neurons=1)
        >>> first.update(activations)
        >>> histogram = RangeHistogram(neurons=1, earlier=SiteStatistics("attn.proj", {LatticeHistogram: first}))
        >>> histogram.update(activations)
        >>> statistics = SiteStatistics("attn.proj", {RangeHistogram: histogram})
        >>> Peak().values(Site("attn.proj", 1), statistics)
        tensor([0.5050], dtype=torch.float64)
    """

    name = "peak"
    statistics = (RangeHistogram,)

    def values(self, site: Site, statistics: SiteStatistics) -> Tensor:
        """The peaks."""
        return statistics[RangeHistogram].peak()
