"""Ablation to one value a neuron: zero, or a centre of its distribution over the calibration data."""

from abc import abstractmethod

import torch
from torch import Tensor

from lightning_ablate.errors import ConfigError
from lightning_ablate.methods.base import Ablation, AblationMethod, Replacement, constant
from lightning_ablate.sites import Site, exact_device
from lightning_ablate.statistics import Histogram, Moments, SiteStatistics


class ConstantMethod(AblationMethod):
    """A method that puts one value in each neuron's place, whatever else is ablated."""

    def __init_subclass__(cls) -> None:
        """Notes whether the class still prepares constants."""
        super().__init_subclass__()
        cls.constant = cls.prepare is ConstantMethod.prepare

    @abstractmethod
    def values(self, site: Site, statistics: SiteStatistics) -> Tensor:
        """The values, ``(neurons,)`` floating, on any device."""

    def prepare(self, ablation: Ablation) -> Replacement:
        """The values as a replacement."""
        site, values = ablation.site, self.values(ablation.site, ablation.statistics)
        if values.shape != (site.width,):
            raise ConfigError(
                f"{self.name} gives values {tuple(values.shape)} at {site.name}, expected ({site.width},)"
            )
        return constant(values.to(exact_device(ablation.mask.device)))


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


class Mean(ConstantMethod):
    """An ablated neuron is its mean over the calibration data.

    Example:
        >>> moments = Moments(neurons=2)
        >>> moments.update(torch.tensor([[[1.0, 2.0], [3.0, 6.0]]]))
        >>> Mean().values(Site("attn.proj", 2), SiteStatistics("attn.proj", {Moments: moments}))
        tensor([2., 4.], dtype=torch.float64)
    """

    name = "mean"
    statistics = (Moments,)

    def values(self, site: Site, statistics: SiteStatistics) -> Tensor:
        """The means."""
        return statistics[Moments].mean


class Peak(ConstantMethod):
    """An ablated neuron is its most frequent value over the calibration data, the paper's proposal.

    That is the centre of the fullest of 100 equal bins between the neuron's own minimum and maximum (Pochinkov et al.
    2024, arXiv 2408.17322); of equally full bins the lowest; and a constant neuron's value.

    Example:
        >>> activations, moments = torch.tensor([[[0.0], [0.501], [0.502], [1.0]]]), Moments(neurons=1)
        >>> moments.update(activations)
        >>> histogram = Histogram(neurons=1, earlier=SiteStatistics("attn.proj", {Moments: moments}))
        >>> histogram.update(activations)
        >>> Peak().values(Site("attn.proj", 1), SiteStatistics("attn.proj", {Histogram: histogram}))
        tensor([0.5050], dtype=torch.float64)
    """

    name = centre = "peak"  # centre: which of the histogram's
    statistics = (Histogram,)

    def values(self, site: Site, statistics: SiteStatistics) -> Tensor:
        """The centre of each neuron's distribution."""
        return getattr(statistics[Histogram].centres, self.centre)


class Mode(Peak):
    """An ablated neuron is the mode of its smoothed density over the calibration data."""

    name = centre = "mode"


class Median(Peak):
    """An ablated neuron is its median over the calibration data."""

    name = centre = "median"


class HalfSampleMode(Peak):
    """An ablated neuron is its half-sample mode over the calibration data, see ``statistics.estimators``."""

    name, centre = "half-sample-mode", "half_sample_mode"
