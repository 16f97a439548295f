"""Statistics of neurons, gathered batch by batch and merged over ranks; each file has one torchmetrics.Metric."""

from lightning_ablate.statistics.base import FOUND, ActivationStatistic, SiteStatistics, with_needs
from lightning_ablate.statistics.covariance import Covariance, HeadCovariance, solved
from lightning_ablate.statistics.histogram import Histogram
from lightning_ablate.statistics.moments import Moments
from lightning_ablate.statistics.positional import MeanByPosition
