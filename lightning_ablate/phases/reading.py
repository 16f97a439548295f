"""What single heads read: four scores of their attention, and its maps where they matter most."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lightning_ablate.modules import AblationModule
from lightning_ablate.phases.units import parsed
from lightning_ablate.sites import Site, attended

SHOWN = 10  # positions of each unit and method whose attention is kept
_NONE = (
    "its kernel is fused, it works in windows, the site isn't self-attention, or no single position predicts; "
    "--model.attn_implementation eager may help"
)


class Head(NamedTuple):
    """A head of a site."""

    site: Site
    number: int


Weights = Mapping[tuple[Site, int], Tensor]
"""Of each head its attention, ``(batch, queries, keys)`` float32."""


class Reader:
    """Reads the attention of single heads of ``self-attention``, by the names of their units.

    Attributes:
        why: why nothing was read; empty if something was.
    """

    def __init__(self, module: AblationModule, heads: Mapping[str, Head]) -> None:
        self.module, self.why = module, _NONE if heads else "no single head is explained"
        self.heads = {unit: head for unit, head in heads.items() if head.site.kind == "self-attention"}
        self._sums = {unit: np.zeros(4) for unit in self.heads}  # previous, first, itself, and how many positions
        self._induction, self._tried = dict[str, float](), False
        self._maps: dict[str, dict[tuple[int, int], np.ndarray]] = {unit: {} for unit in self.heads}

    @property
    def by_site(self) -> dict[Site, list[int]]:
        """The numbers of the heads of each site."""
        found: dict[Site, list[int]] = {}
        for site, number in self.heads.values():
            found.setdefault(site, []).append(number)
        return found

    def repeated(self, batch: Any) -> None:
        """Scores induction: the attention of a random text's second run to what followed each token in the first."""
        twice = None if self._tried or not self.heads else self.module.repeated(batch)
        self._tried = True
        if twice is None:
            return
        with attended(self.module.target, self.by_site) as weights:
            self.module.hidden(twice)
        for unit, head in self.heads.items():
            if head in weights:
                own = weights[head][0]
                half = len(own) // 2
                places = torch.arange(half, 2 * half, device=own.device)
                self._induction[unit] = float(own[places, places - half + 1].mean())

    def add(self, batch: Any, weights: Weights, rows: Tensor, position: Tensor) -> None:
        """Adds the scores of the scored positions: their rows in the batch and places, ``(n,)`` int64."""
        for unit, head in self.heads.items():
            own = self._at(weights, head, rows, position)
            if own is None:
                continue
            valid = self.module.valid_at(head.site, batch)
            first = torch.zeros_like(rows) if valid is None else valid.expand(-1, own.shape[1]).int().argmax(1)[rows]
            later = (position > first + 1).nonzero().squeeze(1)
            keys = torch.stack([position - 1, first, position])[:, later]
            read = own[later].gather(1, keys.T).double().sum(0)
            self._sums[unit] += np.array([*read.tolist(), len(later)])
            self.why = ""

    def keep(
        self,
        unit: str,
        weights: Weights,
        rows: Tensor,
        examples: Tensor,
        position: Tensor,
        change: Tensor,
    ) -> None:
        """Keeps the maps of a head at the positions of a batch with the largest ``change`` ``(n,)``."""
        if unit not in self.heads:
            return
        largest = change.topk(min(SHOWN, len(change))).indices.to(rows.device)
        own = self._at(weights, self.heads[unit], rows[largest], position[largest])
        if own is not None:
            keys = zip(examples[largest].tolist(), position[largest].tolist(), strict=True)
            self._maps[unit] |= dict(zip(keys, own.cpu().numpy(), strict=True))

    def tables(self, evidence: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The tables ``attention`` and ``reads`` of :class:`Evidence`, over all processes, which must all call it."""
        found = self.module.gathered((self._maps, self._sums, self._induction))
        maps: dict[str, dict[tuple[int, int], np.ndarray]] = {unit: {} for unit in self.heads}
        sums, rows, reads = {unit: np.zeros(4) for unit in self.heads}, [], []
        for own_maps, own_sums, _ in found:
            for unit in self.heads:
                maps[unit] |= own_maps[unit]
                sums[unit] += own_sums[unit]
        for (unit, _), own in evidence.groupby(["unit", "method"], sort=False, observed=True):
            for one in own.nlargest(SHOWN, "change").itertuples():
                weights = maps.get(unit, {}).pop((one.example, one.position), None)
                if weights is not None:
                    rows.append([unit, one.example, one.position, weights])
        for unit, (*read, count) in sums.items():
            if count:
                reads.append([unit, *(np.array(read) / count), found[0][2].get(unit, np.nan)])
        attention = pd.DataFrame(rows, columns=["unit", "example", "position", "weights"])
        return attention, pd.DataFrame(reads, columns=["unit", "previous", "first", "itself", "induction"])

    def _at(self, weights: Weights, head: Head, rows: Tensor, position: Tensor) -> Tensor | None:
        """The attention of a head from scored positions, ``(n, keys)``; None where it can't be known."""
        places = self.module.position_at(head.site, position)
        if head not in weights or places is None or not len(places) or int(places.min()) < 0:
            return None
        own = weights[head]
        return own[rows, places] if own.shape[1] == own.shape[2] > int(places.max()) else None


def heads_among(masks: Mapping[str, Mapping[Site, Tensor]]) -> dict[str, Head]:
    """The units that are heads of a single site, from the masks of all units."""
    found = {}
    for unit, by_site in masks.items():
        _, level, number = parsed(unit)
        if level == "head" and len(by_site) == 1:
            found[unit] = Head(next(iter(by_site)), number)
    return found
