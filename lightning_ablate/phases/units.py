"""Single units by their names, and which of them a run explains."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Tensor

from lightning_ablate.attribution import Attribution
from lightning_ablate.choices import Choice, Only
from lightning_ablate.conditions import Selection
from lightning_ablate.errors import ConfigError, SiteError
from lightning_ablate.methods import AblationMethod, Mean
from lightning_ablate.sites import Site
from lightning_ablate.statistics import SiteStatistics
from lightning_ablate.sweep import Sweep

_NAME = re.compile(r"(.+) (head|neuron) (\d+)")


@dataclass(frozen=True)
class Explain:
    """The units whose evidence is gathered, and on how many evaluation examples, the first ones by their indices.

    ``units`` is how many of the largest ones, or the names of units. ConfigError for a number out of range.
    """

    units: int | Sequence[str] = 0
    examples: int = 64

    def __post_init__(self) -> None:
        """Checks the numbers."""
        if isinstance(self.units, int) and self.units < 0:
            raise ConfigError(f"explain is {self.units}, expected at least 0, or names of units (--ablation.explain)")
        if self.examples < 1:
            raise ConfigError(f"explain_examples is {self.examples}, expected at least 1 (--ablation.explain_examples)")


class Units(Choice):
    """Single units, each alone, by their names: ``PATH head 0``, ``PATH neuron 5``, the path of a site or a layer."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def selections(self, sites: Sequence[Site], fractions: Sequence[float], seeds: Sequence[int]) -> list[Selection]:
        """One for each unit; SiteError if the target has no such unit."""
        named = {name: site for site in sites for name in (site.name, site.name.partition("#")[0])}
        whole = {name: site for site in sites for name in (site.name, site.path, site.layer) if name}
        for name in self.names:
            path, level, number = parsed(name)
            known = named if level else named | whole
            if path not in known:
                (meant,) = get_close_matches(path, known, 1, 0.0)
                raise SiteError(f"there is no unit {name!r}, did you mean {name.replace(path, meant)!r}?")
            count = known[path].width if level == "neuron" else known[path].heads or 0
            if level and number >= count:
                raise SiteError(f"there is no unit {name!r}, {path} has {count} {level}s")
        return [Selection(1.0, None, name) for name in self.names]

    def mask(self, selection: Selection, site: Site, statistics: SiteStatistics | None = None) -> Tensor:
        """The neurons of the one unit."""
        path, level, number = parsed(selection.part)
        if level:
            given = {path: [number]}
            one = Only(heads=given) if level == "head" else Only(neurons=given)
            return one.mask(selection, site)
        return torch.full((site.width,), path in (site.name, site.path, site.layer))


def parsed(name: str) -> tuple[str, str, int]:
    """The path, level (``head``, ``neuron``, or empty for a whole site or layer) and number in a unit's name."""
    match = _NAME.fullmatch(name)
    return (name, "", 0) if match is None else (match[1], match[2], int(match[3]))


def check_explained(explain: Explain, sweep: Sweep, attribution: Attribution, sites: Sequence[Site]) -> int:
    """How many conditions evidence takes; ConfigError or SiteError unless the run will have the units to explain."""
    methods, units = explaining(sweep, attribution), explain.units
    if not isinstance(units, int):
        Units(units).selections(sites, (), ())
        if unfit := [method.name for method in methods if not (method.attributable or method.constant)]:
            raise ConfigError(f"{unfit[0]} can't ablate a unit alone (--ablation.explain); leave it out")
        return len(units) * len(methods)
    attributed = min(sum(site.width for site in sites), sum(site.heads or 0 for site in sites) or units)
    count = attributed if attribution.methods else len(parts_of(sweep, sites))
    if count < units:
        raise ConfigError(
            f"explain is {units}, expected at most {count}, as many single units as the run ranks"
            if count
            else f"explain is {units}, and the run ranks no single units; ablate each head alone "
            "(--ablation.neurons EachHead), attribute them (--ablation.attribution.methods '[mean]'), or name those to "
            "explain (--ablation.explain '[PATH head 0]')"
        )
    levels = 1 + any(site.heads for site in sites) if attribution.methods else 1
    return levels * units * len(methods)


def explaining(sweep: Sweep, attribution: Attribution) -> tuple[AblationMethod, ...]:
    """The methods that ablate the units: those of the attribution, else of the sweep, else the mean."""
    return attribution.each or sweep.methods or (Mean(),)


def parts_of(sweep: Sweep, sites: Sequence[Site]) -> dict[Selection, str]:
    """The selections of a sweep that ablate one unit, site or layer alone, and its name."""
    chosen = sweep.neurons.selections(sites, sorted(map(float, sweep.fractions)), sweep.seeds)
    paths = {name for site in sites for name in (site.name, site.path, site.layer)}
    named = {one: one.part if one.head is None else f"{one.part} head {one.head}" for one in chosen if one.part}
    return {one: name for one, name in named.items() if parsed(name)[0] in paths}
