"""The order of a quantity that calibration has measured."""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_ablate.choices.base import Ordered, Unit
from lightning_ablate.conditions import Selection
from lightning_ablate.errors import ConfigError, StatisticsError
from lightning_ablate.sites import Site
from lightning_ablate.statistics import FOUND, ActivationStatistic, Covariance, Histogram, Moments, SiteStatistics

Quantity = Literal[
    "sd", "rms", "skewness", "kurtosis", "gap", "weighted-sd", "weighted-rms", "unexplained", "surgeon", "divergence"
]


class Ranked(Ordered):
    """The order of a quantity that calibration measured of each unit, the same for every seed.

    Args:
        by: the quantity. ``sd``: the standard deviation. ``rms``: the root of the mean square. ``skewness`` and
            ``kurtosis`` (the excess): without their sign. ``gap``: from mean to mode in standard deviations.
            ``weighted-sd`` (FLAP, An et al. 2024) and ``weighted-rms`` (Wanda, Sun et al. 2024): times the norm of the
            projection's column that reads the neuron. ``unexplained``: the standard deviation of what all other neurons
            of the site don't explain of it, times that norm. ``surgeon``: units are taken one by one, each time the
            one whose loss the others can best make good (optimal brain surgeon, Hassibi & Stork 1993).
            ``divergence``: how far ablating the unit alone is estimated to move the predictions (KL divergence), the
            second order of its attribution. Except for ``surgeon``, a unit has the mean of its neurons or heads.
        first: which end is ablated first.
        unit: ``neuron``, ``head`` or a number of neurons side by side.
        under: the method under which units were attributed; None takes the first one.
        across: of what a fraction is taken: of each ``site``, or of all ``sites`` together, some of which may then lose
            more than others.

    Example:
        >>> site, moments = Site("blocks.0.attn.proj", 3), Moments(neurons=3)
        >>> moments.update(torch.tensor([[[1.0, 0.1, -5.0]]]))
        >>> statistics = SiteStatistics(site.name, {Moments: moments})
        >>> Ranked("rms", first="highest").order(site, 0, statistics).tolist()
        [2, 0, 1]
    """

    seeded = False

    def __init__(
        self,
        by: Quantity = "sd",
        first: Literal["lowest", "highest"] = "lowest",
        unit: Unit | int = "neuron",
        under: str | None = None,
        across: Literal["site", "sites"] = "site",
    ) -> None:
        super().__init__(unit)
        ends, wholes = Literal["lowest", "highest"], Literal["site", "sites"]
        for name, given, known in (("by", by, Quantity), ("first", first, ends), ("across", across, wholes)):
            if given not in get_args(known):
                names = ", ".join(get_args(known))
                raise ConfigError(f"{name} is {given!r}, expected one of {names} (--ablation.neurons)")
        if across == "sites" and by == "surgeon":
            raise ConfigError("the surgeon's order is of one site; expected across: site (--ablation.neurons.across)")
        self.by, self.first, self.under, self.across = by, first, under, across
        self.attribution = (under or "") if by == "divergence" else None
        more: type[ActivationStatistic] = Histogram if by == "gap" else Covariance
        self.statistics = (Moments, more) if by in ("gap", "unexplained", "surgeon") else (Moments,)

    def order(self, site: Site, seed: int, statistics: SiteStatistics | None = None) -> Tensor:
        """From the lowest value, or the highest; equal units in the order of the site."""
        if self.by == "surgeon" and statistics is not None:
            order = statistics[Covariance].order(statistics.weight, site.width // self.units(site))
            return order if self.first == "lowest" else order.flip(0)
        return self._sorted(self.values(site, statistics))

    def values(self, site: Site, statistics: SiteStatistics | None) -> Tensor:
        """The quantity of each unit of a site, ``(units,)`` on the CPU."""
        if statistics is None:
            raise ConfigError(f"ranking by {self.by} needs the statistics of the site, and got none")
        values = self._attributed(site, statistics) if self.by == "divergence" else self._values(statistics)
        return values.cpu().view(self.units(site), -1).mean(1)

    def counts(self, sites: Sequence[Site]) -> tuple[int, ...]:
        """How many units there are, of each site of which a fraction is taken, or of all together."""
        return super().counts(sites) if self.across == "site" else (sum(map(self.units, sites)),)

    def mask(self, selection: Selection, site: Site, statistics: SiteStatistics | None = None) -> Tensor:
        """The first units of the order; ConfigError where that is one of all sites."""
        if self.across == "sites":
            raise ConfigError("a ranking across sites has no mask of a single one; use `masks_of`")
        return super().mask(selection, site, statistics)

    def masks_of(self, selection: Selection, known: Mapping[Site, SiteStatistics]) -> dict[Site, Tensor]:
        """The first units of each site's order, or of the one order of all sites."""
        if self.across == "site":
            return super().masks_of(selection, known)
        values = [self.values(site, statistics) for site, statistics in known.items()]
        order = self._sorted(torch.cat(values))
        taken = torch.zeros(len(order), dtype=torch.bool)
        taken[order[: round(selection.fraction * len(order))]] = True
        parts = zip(known, torch.split(taken, [len(own) for own in values]), strict=True)
        return {site: own.repeat_interleave(site.width // len(own)) for site, own in parts}

    def _sorted(self, values: Tensor) -> Tensor:
        return values.argsort(stable=True, descending=self.first == "highest")

    def _values(self, statistics: SiteStatistics) -> Tensor:
        moments = statistics[Moments]
        if self.by == "gap":
            gap = moments.mean - statistics[Histogram].centres.mode
            return torch.where(moments.sd > 0, gap / moments.sd, 0.0).abs()
        if self.by == "unexplained":
            values = statistics[Covariance].unexplained.sqrt()
        else:
            values = getattr(moments, self.by.removeprefix("weighted-")).abs()
        if self.by in ("unexplained", "weighted-sd", "weighted-rms"):
            return values * statistics.weight.float().norm(dim=1).to(values.device).to(values.dtype)
        return values

    def _attributed(self, site: Site, statistics: SiteStatistics) -> Tensor:
        """The second order of heads, if units are made of heads, or of neurons; StatisticsError if there is none."""
        known = statistics.attributed
        under = self.under or next(iter(known), "")
        if under not in known:
            raise StatisticsError(
                f"ranking by divergence needs the attribution of {under or 'some method'} at {site.name}, there is "
                f"{', '.join(known) or 'none'}: run `fit` with it (--ablation.attribution.methods '[mean]')"
            )
        first, estimates = (known[under][FOUND.index(order)] for order in ("first", "second"))
        if bool(first.any()) and not bool(estimates.any()):
            raise StatisticsError(
                f"the attribution of {under} at {site.name} is that of a metric, whose divergence isn't estimated: run "
                "`fit` without --ablation.attribution.metric"
            )
        heads = site.heads or 0
        whole = self.unit != "neuron" and heads and heads % self.units(site) == 0
        return estimates[site.width : site.width + heads] if whole else estimates[: site.width]
