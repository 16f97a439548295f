"""Ablation to other centres of a neuron's distribution than its mean, each from one pass over the calibration data."""

from typing import ClassVar

from torch import Tensor

from lightning_ablate.methods.base import ConstantMethod
from lightning_ablate.sites import Site
from lightning_ablate.statistics import HalfSampleMode as HalfSampleModeEstimator
from lightning_ablate.statistics import LatticeHistogram, PeakEstimator, SiteStatistics, SmoothedMode
from lightning_ablate.statistics import Median as MedianEstimator
from lightning_ablate.statistics import OnePassPeak as OnePassPeakEstimator


class Estimated(ConstantMethod):
    """An ablated neuron is what an estimator makes of its histogram over the calibration data.

    Attributes:
        estimator: which one.
    """

    statistics = (LatticeHistogram,)
    estimator: ClassVar[PeakEstimator]

    def values(self, site: Site, statistics: SiteStatistics) -> Tensor:
        """The estimates."""
        return self.estimator(statistics[LatticeHistogram].histogram)


class Mode(Estimated):
    """An ablated neuron is its most frequent value, from a smoothed histogram (see ``statistics.SmoothedMode``).

    Example:
        >>> import torch
        >>> statistic = LatticeHistogram(neurons=1)
        >>> statistic.update(torch.tensor([[[1.0], [2.0], [2.0], [2.0], [9.0]]]))
        >>> statistics = SiteStatistics("attn.proj", {LatticeHistogram: statistic})
        >>> round(Mode().values(Site("attn.proj", 1), statistics).item())
        2
    """

    name = "mode"
    estimator = SmoothedMode()


class OnePassPeak(Estimated):
    """An ablated neuron is its peak without a second calibration epoch (see ``statistics.OnePassPeak``)."""

    name = "one-pass-peak"
    estimator = OnePassPeakEstimator()


class HalfSampleMode(Estimated):
    """An ablated neuron is its half-sample mode (see ``statistics.HalfSampleMode``)."""

    name = "half-sample-mode"
    estimator = HalfSampleModeEstimator()


class Median(Estimated):
    """An ablated neuron is its median (see ``statistics.Median``)."""

    name = "median"
    estimator = MedianEstimator()
