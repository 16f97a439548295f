"""Statistics of neurons, gathered batch by batch and merged over ranks; one torchmetrics.Metric a file."""

from lightning_ablate.statistics.base import ActivationStatistic, SiteStatistics
from lightning_ablate.statistics.covariance import Covariance
from lightning_ablate.statistics.estimators import (
    HalfSampleMode,
    Median,
    OnePassPeak,
    PeakEstimator,
    SmoothedMode,
    count_modes,
)
from lightning_ablate.statistics.histogram import RangeHistogram
from lightning_ablate.statistics.lattice import Histogram, LatticeHistogram
from lightning_ablate.statistics.magnitude import Magnitude
from lightning_ablate.statistics.moments import Moments

__all__ = [
    "ActivationStatistic",
    "Covariance",
    "HalfSampleMode",
    "Histogram",
    "LatticeHistogram",
    "Magnitude",
    "Median",
    "Moments",
    "OnePassPeak",
    "PeakEstimator",
    "RangeHistogram",
    "SiteStatistics",
    "SmoothedMode",
    "count_modes",
]
