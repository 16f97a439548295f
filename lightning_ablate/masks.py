"""Which neurons go: nested in the fraction, fixed by the seed, and the same on every machine of a run."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_ablate.errors import ConfigError, SiteError
from lightning_ablate.sites import Site
from lightning_ablate.statistics import (
    ActivationStatistic,
    LatticeHistogram,
    Magnitude,
    Moments,
    SiteStatistics,
    SmoothedMode,
)

Unit = Literal["neuron", "head"]


@dataclass(frozen=True)
class Selection:
    """What one condition ablates, whatever the method.

    Attributes:
        fraction: share of the units that go, 0 to 1, in each site or in the part it is confined to.
        seed: of the choice; None where it can't matter.
        part: name of the one site or layer it is confined to; empty for all sites.
        head: the one head it is confined to; None for all.
    """

    fraction: float
    seed: int | None = None
    part: str = ""
    head: int | None = None


class NeuronChoice(ABC):
    """Chooses which neurons of a site are ablated. Subclass it to choose in another way.

    Attributes:
        statistics: what calibration must gather for it.
    """

    statistics: ClassVar[tuple[type[ActivationStatistic], ...]] = ()

    @abstractmethod
    def selections(self, sites: Sequence[Site], fractions: Sequence[float], seeds: Sequence[int]) -> list[Selection]:
        """What is ablated in turn, each distinct selection once and none of them empty.

        Args:
            sites: of the target.
            fractions: those asked for, ascending, 0 to 1.
            seeds: those asked for.
        """

    def draw(self, sites: Sequence[Site], seed: int) -> Selection:
        """What some condition could ablate, its fraction uniform from 0 to 1; values are learned under such draws."""
        generator, found = torch.Generator().manual_seed(seed), list[Selection]()
        while not found:  # a small fraction can come to no unit
            found = self.selections(sites, [1 - torch.rand((), generator=generator).item()], [seed])
        return found[int(torch.randint(len(found), (), generator=generator))]

    @abstractmethod
    def mask(self, selection: Selection, site: Site, statistics: SiteStatistics | None = None) -> Tensor:
        """The neurons of a site that a selection ablates.

        Args:
            selection: one of :meth:`selections`.
            site: whose neurons.
            statistics: of the site, those that the choice needs.

        Returns:
            ``(neurons,)`` bool on the CPU, True for the ablated ones.
        """


class OrderedChoice(NeuronChoice):
    """Takes the units of a site in an order: a fraction f takes the first ``round(f * units)``.

    Args:
        unit: ``neuron``, or ``head`` for all neurons of an attention head together.

    Attributes:
        seeded: whether the order depends on the seed.
    """

    seeded: ClassVar[bool] = True

    def __init__(self, unit: Unit = "neuron") -> None:
        self.unit = unit

    @abstractmethod
    def order(self, site: Site, seed: int, statistics: SiteStatistics | None = None) -> Tensor:
        """The units of a site, first to go first: a permutation ``(units,)`` int64 on the CPU."""

    def units(self, site: Site) -> int:
        """How many units a site has."""
        return site.width if self.unit == "neuron" else heads_of(site)

    def selections(self, sites: Sequence[Site], fractions: Sequence[float], seeds: Sequence[int]) -> list[Selection]:
        """Every fraction with every seed; at a fraction of 1 the seed can't matter.

        Of fractions that come to the same number of units in every site the first one, and none that comes to no unit.
        """
        taken: dict[object, float] = {}
        for fraction in fractions:
            units = tuple(round(fraction * self.units(site)) for site in sites) or (fraction,)
            if any(units):
                taken.setdefault(units, fraction)
        pairs = [(f, seed if self.seeded and f < 1 else None) for f in taken.values() for seed in seeds]
        return [Selection(fraction, seed) for fraction, seed in dict.fromkeys(pairs)]

    def mask(self, selection: Selection, site: Site, statistics: SiteStatistics | None = None) -> Tensor:
        """The first units of the order, see :meth:`NeuronChoice.mask`."""
        units = self.units(site)
        mask = torch.zeros(units, dtype=torch.bool)
        mask[self.order(site, selection.seed or 0, statistics)[: round(selection.fraction * units)]] = True
        return mask.repeat_interleave(site.width // units)


class RandomNeurons(OrderedChoice):
    """A random order of its own for every site and seed (the paper's choice).

    Args:
        unit: ``neuron``, or ``head`` for all neurons of an attention head together.

    Example:
        >>> site = Site("blocks.0.attn.proj", 10)
        >>> half, most = (RandomNeurons().mask(Selection(fraction, 42), site) for fraction in (0.5, 0.9))
        >>> int(half.sum()), int(most.sum()), bool((half <= most).all())
        (5, 9, True)
    """

    def order(self, site: Site, seed: int, statistics: SiteStatistics | None = None) -> Tensor:
        """A permutation drawn from the hash of (seed, site name, units)."""
        units = self.units(site)
        return torch.randperm(units, generator=torch.Generator().manual_seed(seed_of(seed, site.name, units)))


class Sorted(OrderedChoice):
    """The order of what the calibration measured of each unit, the same for every seed.

    Attributes:
        descending: whether the highest values go first.
    """

    seeded = False
    descending = False

    def order(self, site: Site, seed: int, statistics: SiteStatistics | None = None) -> Tensor:
        """From the lowest, or the highest, value on; of equal units the first in the site goes first."""
        if statistics is None:
            raise ConfigError(f"{type(self).__name__} needs the statistics of the site")
        values = self.values(statistics).cpu().view(self.units(site), -1).mean(1)
        return values.argsort(stable=True, descending=self.descending)

    @abstractmethod
    def values(self, statistics: SiteStatistics) -> Tensor:
        """What the order goes by, ``(neurons,)``; of a head the mean over its neurons."""


class ByImportance(Sorted):
    """The order of how much a unit does over the calibration data.

    Args:
        by: ``sd``, the standard deviation, or ``magnitude``, the mean absolute value; of a head the mean over its
            neurons.
        first: which end goes first.
        unit: ``neuron``, or ``head`` for all neurons of an attention head together.

    Example:
        >>> site, magnitude = Site("blocks.0.attn.proj", 3), Magnitude(neurons=3)
        >>> magnitude.update(torch.tensor([[[1.0, 0.1, -5.0]]]))
        >>> statistics = SiteStatistics(site.name, {Magnitude: magnitude})
        >>> ByImportance("magnitude", first="highest").order(site, 0, statistics).tolist()
        [2, 0, 1]
    """

    statistics = (Moments, Magnitude)

    def __init__(
        self,
        by: Literal["sd", "magnitude"] = "sd",
        first: Literal["lowest", "highest"] = "lowest",
        unit: Unit = "neuron",
    ) -> None:
        super().__init__(unit)
        self.by, self.first, self.descending = by, first, first == "highest"

    def values(self, statistics: SiteStatistics) -> Tensor:
        """The importance, see :meth:`Sorted.values`."""
        return statistics[Moments].sd if self.by == "sd" else statistics[Magnitude].mean


class ByShape(Sorted):
    """The order of how far a unit's distribution is from a well-behaved one, symmetric around one value.

    With a fraction of 0.25, say, only the quarter of typical, or of atypical, neurons goes.

    Args:
        by: ``skewness``, ``kurtosis`` (the excess), both without their sign, or ``gap``, the distance of mean and
            mode in standard deviations; of a head the mean over its neurons.
        first: which end goes first.
        unit: ``neuron``, or ``head`` for all neurons of an attention head together.

    Example:
        >>> site, moments = Site("blocks.0.attn.proj", 2), Moments(neurons=2)
        >>> moments.update(torch.tensor([[[1.0, 1.0], [2.0, 1.1], [3.0, 5.0]]]))
        >>> statistics = SiteStatistics(site.name, {Moments: moments})
        >>> ByShape("skewness", first="atypical").order(site, 0, statistics).tolist()
        [1, 0]
    """

    statistics = (Moments, LatticeHistogram)

    def __init__(
        self,
        by: Literal["skewness", "kurtosis", "gap"] = "skewness",
        first: Literal["typical", "atypical"] = "typical",
        unit: Unit = "neuron",
    ) -> None:
        super().__init__(unit)
        self.by, self.first, self.descending = by, first, first == "atypical"

    def values(self, statistics: SiteStatistics) -> Tensor:
        """The deviation from the typical shape, see :meth:`Sorted.values`."""
        moments = statistics[Moments]
        if self.by == "gap":
            gap = moments.mean - SmoothedMode()(statistics[LatticeHistogram].histogram)
            return torch.where(moments.sd > 0, gap / moments.sd, 0.0).abs()
        return (moments.skewness if self.by == "skewness" else moments.kurtosis).abs()


class EachHead(NeuronChoice):
    """Every attention head alone, one after the other: a map of their importance. Fractions play no part.

    Example:
        >>> site = Site("blocks.0.attn.proj", 4, heads=2)
        >>> selections = EachHead().selections([site], [], [])
        >>> [EachHead().mask(selection, site).tolist() for selection in selections]
        [[True, True, False, False], [False, False, True, True]]
    """

    def selections(self, sites: Sequence[Site], fractions: Sequence[float], seeds: Sequence[int]) -> list[Selection]:
        """One for every head of every site."""
        return [Selection(1.0, None, site.name, head) for site in sites for head in range(heads_of(site))]

    def mask(self, selection: Selection, site: Site, statistics: SiteStatistics | None = None) -> Tensor:
        """The neurons of the one head, see :meth:`NeuronChoice.mask`."""
        mask = torch.zeros(heads_of(site), dtype=torch.bool)
        if selection.part == site.name and selection.head is not None:
            mask[selection.head] = True
        return mask.repeat_interleave(site.width // heads_of(site))


class EachLayer(NeuronChoice):
    """All chosen sites of every layer, one layer after the other. Fractions play no part.

    Example:
        >>> sites = [Site("h.0.attn.proj", 2, layer="h.0"), Site("h.1.attn.proj", 2, layer="h.1")]
        >>> first = EachLayer().selections(sites, [], [])[0]
        >>> [EachLayer().mask(first, site).tolist() for site in sites]
        [[True, True], [False, False]]
    """

    def selections(self, sites: Sequence[Site], fractions: Sequence[float], seeds: Sequence[int]) -> list[Selection]:
        """One for every layer; a site outside of any layer is one of its own."""
        return [Selection(1.0, None, part) for part in dict.fromkeys(site.layer or site.name for site in sites)]

    def mask(self, selection: Selection, site: Site, statistics: SiteStatistics | None = None) -> Tensor:
        """All neurons of the layer's sites, see :meth:`NeuronChoice.mask`."""
        return torch.full((site.width,), selection.part == (site.layer or site.name))


def heads_of(site: Site) -> int:
    """The number of heads of a site.

    Raises:
        SiteError: if it has none, or they don't lie side by side in its neurons.
    """
    if site.heads is None:
        raise SiteError(
            f"the site {site.name} ({site.kind}, {site.width} neurons) has no heads that lie side by side; choose "
            "neurons, or leave the site out (--ablation.sites)"
        )
    return site.heads


def seed_of(*parts: object) -> int:
    """A seed of 63 bits that depends on every part, so that nearby seeds and names give unrelated draws."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
