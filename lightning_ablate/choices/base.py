"""Choices of units by an order: masks nested in the fraction, fixed by the seed, the same in every process."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from lightning_ablate.conditions import Selection
from lightning_ablate.errors import ConfigError, SiteError
from lightning_ablate.seeds import seed_of
from lightning_ablate.sites import Site, heads_of
from lightning_ablate.statistics import ActivationStatistic, SiteStatistics

Unit = Literal["neuron", "head"]


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

    def masks_of(self, selection: Selection, known: Mapping[Site, SiteStatistics]) -> dict[Site, Tensor]:
        """The masks of all sites; override it for a choice that must see all sites together."""
        return {site: self.mask(selection, site, statistics) for site, statistics in known.items()}

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

    def counts(self, sites: Sequence[Site]) -> tuple[int, ...]:
        """How many units there are, of each site of which a fraction is taken."""
        return tuple(self.units(site) for site in sites)

    def selections(self, sites: Sequence[Site], fractions: Sequence[float], seeds: Sequence[int]) -> list[Selection]:
        """Every fraction with every seed; one seed at a fraction of 1, where all units are ablated.

        Fractions that take the same number of units of every site count once, as the first of them. One that takes all
        units is 1, and one that takes none is left out.
        """
        taken: dict[object, float] = {}
        whole = self.counts(sites)
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
