"""Units by their names: each head, layer or expert alone, or exactly those given."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_ablate.choices.base import Choice
from lightning_ablate.conditions import Selection
from lightning_ablate.errors import ConfigError, SiteError, few
from lightning_ablate.sites import Site, given_for, heads_of
from lightning_ablate.statistics import SiteStatistics


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


class EachExpert(Choice):
    """Every expert of a mixture alone, one after the other. Fractions don't matter."""

    def selections(self, sites: Sequence[Site], fractions: Sequence[float], seeds: Sequence[int]) -> list[Selection]:
        """One for every expert; SiteError if there is none."""
        experts = [site.name for site in sites if site.expert is not None]
        if sites and not experts:
            raise SiteError("EachExpert found no experts (--ablation.neurons); choose them by --ablation.sites experts")
        return [Selection(1.0, None, name) for name in experts]

    def mask(self, selection: Selection, site: Site, statistics: SiteStatistics | None = None) -> Tensor:
        """All neurons of the one expert."""
        return torch.full((site.width,), selection.part == site.name)


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
        known = {name: site for site in sites for name in (site.name.partition("#")[0], site.name)}
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
