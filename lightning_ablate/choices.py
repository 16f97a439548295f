"""Which units are ablated: masks nested in the fraction, fixed by the seed, the same in every process."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from lightning_ablate.conditions import Selection
from lightning_ablate.errors import ConfigError, SiteError, StatisticsError, few
from lightning_ablate.seeds import seed_of
from lightning_ablate.sites import Site, given_for, heads_of
from lightning_ablate.statistics import FOUND, ActivationStatistic, Covariance, Histogram, Moments, SiteStatistics

Unit = Literal["neuron", "head"]
Quantity = Literal[
    "sd", "rms", "skewness", "kurtosis", "gap", "weighted-sd", "weighted-rms", "unexplained", "surgeon", "attribution"
]


class Choice(ABC):
    """Chooses which neurons of a site are ablated. Subclass it to choose in another way.

    Attributes:
        statistics: what calibration must gather for it.
        attribution: the method by whose attribution it ranks units, empty for the first one; None if it doesn't.
    """

    statistics: tuple[type[ActivationStatistic], ...] = ()
    attribution: str | None = None

    @abstractmethod
    def selections(self, sites: Sequence[Site], fractions: Sequence[float], seeds: Sequence[int]) -> list[Selection]:
        """Every distinct selection once, none of them empty; the fractions given ascend from 0 to 1."""

    @abstractmethod
    def mask(self, selection: Selection, site: Site, statistics: SiteStatistics | None = None) -> Tensor:
        """The neurons of a site that one of :meth:`selections` ablates: ``(neurons,)`` bool on the CPU."""

    def draw(self, sites: Sequence[Site], seed: int) -> Selection:
        """A random selection, with a fraction uniform from 0 to 1; learning draws one for each example."""
        generator, found = torch.Generator().manual_seed(seed), list[Selection]()
        while not found:  # a small fraction can come to no unit
            found = self.selections(sites, [1 - torch.rand((), generator=generator).item()], [seed])
        return found[int(torch.randint(len(found), (), generator=generator))]


class Ordered(Choice):
    """Takes the units of a site in an order: a fraction f takes the first ``round(f * units)``.

    Args:
        unit: ``neuron``; ``head``, all neurons of an attention head together; or a number of neurons side by side. For
            the query heads that share a key and value head, that is their number times the width of a head.
    """

    seeded: ClassVar[bool] = True  # whether the order depends on the seed

    def __init__(self, unit: Unit | int = "neuron") -> None:
        if unit not in get_args(Unit) and not (type(unit) is int and unit > 0):
            raise ConfigError(f"unit is {unit!r}, expected neuron, head or a number of neurons (--ablation.neurons)")
        self.unit = unit

    @abstractmethod
    def order(self, site: Site, seed: int, statistics: SiteStatistics | None = None) -> Tensor:
        """The units of a site, first to go first: a permutation ``(units,)`` int64 on the CPU."""

    def units(self, site: Site) -> int:
        """How many units a site has; SiteError if it can't be divided into such."""
        if not isinstance(self.unit, int):
            return site.width if self.unit == "neuron" else heads_of(site)
        if site.width % self.unit:
            raise SiteError(f"{site.name} has {site.width} neurons, expected units of {self.unit} to fill it")
        return site.width // self.unit

    def selections(self, sites: Sequence[Site], fractions: Sequence[float], seeds: Sequence[int]) -> list[Selection]:
        """Every fraction with every seed; one seed at a fraction of 1, where all units are ablated.

        Fractions that take the same number of units of every site count once, as the first of them. One that takes all
        units is 1, and one that takes none is left out.
        """
        taken: dict[object, float] = {}
        whole = tuple(self.units(site) for site in sites)
        for fraction in fractions:
            units = tuple(round(fraction * count) for count in whole) or (fraction,)
            if any(units):
                taken.setdefault(units, 1.0 if units == whole else fraction)
        pairs = [(f, seed if self.seeded and f < 1 else None) for f in taken.values() for seed in seeds]
        return [Selection(fraction, seed) for fraction, seed in dict.fromkeys(pairs)]

    def mask(self, selection: Selection, site: Site, statistics: SiteStatistics | None = None) -> Tensor:
        """The first units of the order."""
        units = self.units(site)
        mask = torch.zeros(units, dtype=torch.bool)
        mask[self.order(site, selection.seed or 0, statistics)[: round(selection.fraction * units)]] = True
        return mask.repeat_interleave(site.width // units)


class Random(Ordered):
    """A random order of its own for every site and seed (the paper's choice).

    Example:
        >>> site = Site("blocks.0.attn.proj", 10)
        >>> half, most = (Random().mask(Selection(fraction, 42), site) for fraction in (0.5, 0.9))
        >>> int(half.sum()), int(most.sum()), bool((half <= most).all())
        (5, 9, True)
    """

    def order(self, site: Site, seed: int, statistics: SiteStatistics | None = None) -> Tensor:
        """A permutation drawn from the hash of (seed, site name, units)."""
        units = self.units(site)
        return torch.randperm(units, generator=torch.Generator().manual_seed(seed_of(seed, site.name, units)))


class Ranked(Ordered):
    """The order of a quantity that calibration measured of each unit, the same for every seed.

    Args:
        by: the quantity. ``sd``: the standard deviation. ``rms``: the root of the mean square. ``skewness`` and
            ``kurtosis`` (the excess): without their sign. ``gap``: from mean to mode in standard deviations.
            ``weighted-sd`` (FLAP, An et al. 2024) and ``weighted-rms`` (Wanda, Sun et al. 2024): times the norm of the
            projection's column that reads the neuron. ``unexplained``: the standard deviation of what all other neurons
            of the site don't explain of it, times that norm. ``surgeon``: units are taken one by one, each time the
            one whose loss the others can best make good (optimal brain surgeon, Hassibi & Stork 1993).
            ``attribution``: the estimated effect of ablating the unit alone. Except for ``surgeon``, a unit has the
            mean of its neurons, or of its heads' attributions.
        first: which end is ablated first.
        unit: ``neuron``, ``head`` or a number of neurons side by side.
        under: the method under which units were attributed; None takes the first one.

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
    ) -> None:
        super().__init__(unit)
        for name, given, known in (("by", by, Quantity), ("first", first, Literal["lowest", "highest"])):
            if given not in get_args(known):
                names = ", ".join(get_args(known))
                raise ConfigError(f"{name} is {given!r}, expected one of {names} (--ablation.neurons)")
        self.by, self.first, self.under = by, first, under
        self.attribution = (under or "") if by == "attribution" else None
        more: type[ActivationStatistic] = Histogram if by == "gap" else Covariance
        self.statistics = (Moments, more) if by in ("gap", "unexplained", "surgeon") else (Moments,)

    def order(self, site: Site, seed: int, statistics: SiteStatistics | None = None) -> Tensor:
        """From the lowest value, or the highest; equal units in the order of the site."""
        if statistics is None:
            raise ConfigError(f"ranking by {self.by} needs the statistics of the site, and got none")
        if self.by == "surgeon":
            order = statistics[Covariance].order(statistics.weight, site.width // self.units(site))
            return order if self.first == "lowest" else order.flip(0)
        values = self._attributed(site, statistics) if self.by == "attribution" else self._values(statistics)
        values = values.cpu().view(self.units(site), -1).mean(1)
        return values.argsort(stable=True, descending=self.first == "highest")

    def _values(self, statistics: SiteStatistics) -> Tensor:
        moments = statistics[Moments]
        if self.by == "gap":
            gap = moments.mean - statistics[Histogram].places.mode
            return torch.where(moments.sd > 0, gap / moments.sd, 0.0).abs()
        if self.by == "unexplained":
            values = statistics[Covariance].unexplained.sqrt()
        else:
            values = getattr(moments, self.by.removeprefix("weighted-")).abs()
        if self.by in ("unexplained", "weighted-sd", "weighted-rms"):
            return values * statistics.weight.float().norm(dim=1).to(values.device).to(values.dtype)
        return values

    def _attributed(self, site: Site, statistics: SiteStatistics) -> Tensor:
        """The estimates of heads, if units are made of heads, or of neurons; StatisticsError if there are none."""
        known = statistics.attributed
        under = self.under or next(iter(known), "")
        if under not in known:
            raise StatisticsError(
                f"ranking by attribution needs that of {under or 'some method'} at {site.name}, there is "
                f"{', '.join(known) or 'none'}: run `fit` with it (--ablation.attribution.methods '[mean]')"
            )
        estimates, heads = known[under][FOUND.index("estimate")], site.heads or 0
        whole = self.unit != "neuron" and heads and heads % self.units(site) == 0
        return estimates[site.width : site.width + heads] if whole else estimates[: site.width]


class EachHead(Choice):
    """Every attention head alone, one after the other: a map of their importance. Fractions don't matter."""

    def selections(self, sites: Sequence[Site], fractions: Sequence[float], seeds: Sequence[int]) -> list[Selection]:
        """One for every head of every site."""
        return [Selection(1.0, None, site.name, head) for site in sites for head in range(heads_of(site))]

    def mask(self, selection: Selection, site: Site, statistics: SiteStatistics | None = None) -> Tensor:
        """The neurons of the one head."""
        return Only(heads={selection.part: [selection.head or 0]}).mask(selection, site)


class EachLayer(Choice):
    """Every layer alone, with all of its sites, one after the other. Fractions don't matter."""

    def selections(self, sites: Sequence[Site], fractions: Sequence[float], seeds: Sequence[int]) -> list[Selection]:
        """One for every layer; a site outside of all layers counts as one."""
        return [Selection(1.0, None, part) for part in dict.fromkeys(site.layer or site.name for site in sites)]

    def mask(self, selection: Selection, site: Site, statistics: SiteStatistics | None = None) -> Tensor:
        """All neurons of the layer's sites."""
        return torch.full((site.width,), selection.part == (site.layer or site.name))


class Only(Choice):
    """Exactly the given heads and neurons, all together. Fractions and seeds don't matter.

    Args:
        heads: which heads, by the name of their site; the path of a module stands for all its uses.
        neurons: which neurons, likewise.
        label: what the column ``part`` of results calls them; by default their sites and numbers.

    Example:
        >>> site = Site("h.0.attn.proj", 4, heads=2)
        >>> choice = Only(heads={"h.0.attn.proj": [1]})
        >>> (selection,) = choice.selections([site], [], [])
        >>> selection.part, choice.mask(selection, site).tolist()
        ('h.0.attn.proj head 1', [False, False, True, True])
    """

    def __init__(
        self,
        heads: Mapping[str, Sequence[int]] | None = None,
        neurons: Mapping[str, Sequence[int]] | None = None,
        label: str | None = None,
    ) -> None:
        self.heads, self.neurons = dict(heads or {}), dict(neurons or {})
        if not any(numbers for *_, numbers in self._given()):
            raise ConfigError(
                "no heads and no neurons are named, expected some: heads={SITE: [0]} (--ablation.neurons.heads "
                "'{SITE: [0]}')"
            )
        self.label = label or self._listed()

    def selections(self, sites: Sequence[Site], fractions: Sequence[float], seeds: Sequence[int]) -> list[Selection]:
        """The one; SiteError if the target has no such site, head or neuron."""
        known = {name: site for site in sites for name in (site.path, site.name)}
        for kind, name, numbers in self._given():
            if name not in known:
                names = few(site.name for site in sites)
                raise SiteError(f"there is no site {name!r} (--ablation.neurons), expected one of {names}")
            count = heads_of(known[name]) if kind == "head" else known[name].width
            if bad := [number for number in numbers if not 0 <= number < count]:
                raise SiteError(f"{name} has no {kind} {bad[0]} (--ablation.neurons), expected 0 to {count - 1}")
        return [Selection(1.0, None, self.label)]

    def mask(self, selection: Selection, site: Site, statistics: SiteStatistics | None = None) -> Tensor:
        """Those of the site."""
        mask = torch.zeros(site.width, dtype=torch.bool)
        if heads := given_for(site, self.heads):
            mask.view(heads_of(site), -1)[list(heads)] = True
        mask[list(given_for(site, self.neurons) or ())] = True
        return mask

    def _given(self) -> list[tuple[str, str, Sequence[int]]]:
        return [("head", *some) for some in self.heads.items()] + [("neuron", *some) for some in self.neurons.items()]

    def _listed(self) -> str:
        listed = [f"{name} {kind}{'s' * (len(n) > 1)} {', '.join(map(str, n))}" for kind, name, n in self._given()]
        if len("; ".join(listed)) <= 80:
            return "; ".join(listed)
        counts = {"heads": sum(map(len, self.heads.values())), "neurons": sum(map(len, self.neurons.values()))}
        counted = " and ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        return f"{counted} of {len({*self.heads, *self.neurons})} sites"
