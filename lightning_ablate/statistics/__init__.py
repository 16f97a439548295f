"""Statistics of neurons, gathered batch by batch and merged over ranks; one torchmetrics.Metric a file."""

from lightning_ablate.statistics.base import ActivationStatistic, SiteStatistics
from lightning_ablate.statistics.covariance import Covariance, HeadCovariance
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
from lightning_ablate.statistics.positional import MeanByPosition

__all__ = [
    "ActivationStatistic",
    "Covariance",
    "HalfSampleMode",
    "HeadCovariance",
    "Histogram",
    "LatticeHistogram",
    "Magnitude",
    "MeanByPosition",
    "Median",
    "Moments",
    "OnePassPeak",
    "PeakEstimator",
    "RangeHistogram",
    "SiteStatistics",
    "SmoothedMode",
    "count_modes",
]
