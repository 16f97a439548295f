"""What every unit is worth: the estimated effect of ablating it alone, in nats, from a few backward passes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, cast

import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from lightning_ablate.agreement import GROUP, scale_of, weighed
from lightning_ablate.conditions import listed
from lightning_ablate.errors import ConfigError
from lightning_ablate.methods import AblationMethod, method_of
from lightning_ablate.methods.draws import hashed
from lightning_ablate.metrics import Scored
from lightning_ablate.seeds import seed_of
from lightning_ablate.sites import Site, exact_device
from lightning_ablate.statistics import FOUND

BOUND = 25.0  # nats of an example at which what one position does to it levels off
_KEYS = ["method", "site", "level", "unit"]
FOUND_AT = 0.05  # the q up to which a unit counts as found
SUMS = ("first", "second", "estimate", "square", "with_n")  # what is summed over the examples of each unit


class Measured(NamedTuple):
    """The effect of ablating a unit alone, as it was measured."""

    method: str
    site: str
    level: str
    unit: int
    picked: str  # largest, random, or all
    verified: float  # nats per scored position, as the standard error
    verified_se: float

    @classmethod
    def of(cls, row: Sequence[Any]) -> Self:
        """From a list; ValueError or TypeError if it has another form."""
        method, site, level, unit, chosen, effect, error = row
        if math.isinf(effect) or math.isinf(error):
            raise ValueError(f"the effect of {level} {unit} of {site} is {effect} ± {error}, expected finite numbers")
        return cls(str(method), str(site), str(level), int(unit), str(chosen), float(effect), float(error))


@dataclass(frozen=True)
class Attribution:
    """Options of attribution: the estimated effect of ablating every neuron, head and site alone.

    Args:
        methods: the replacements under which units are attributed, as ``--ablation.methods``; none by default.
        draws: random backward passes for the second-order term.
        verify: N: ablate and measure the N largest and N random neurons, and as many heads.
        heads: whether all heads are measured: each is ablated alone, on the examples that are attributed. None measures
            them where that takes no more forward passes than the estimates.
        examples: how many calibration examples are used, the first ones by their indices; None takes all.
        metric: the module's own metric whose loss is attributed, to first order; None takes the cross-entropy.
    """

    methods: Sequence[AblationMethod | str] | str = ()
    draws: int = 8
    verify: int = 0
    heads: bool | None = None
    examples: int | None = None
    metric: str | None = None

    def __post_init__(self) -> None:
        """Makes the methods that are named, and checks the numbers; ConfigError."""
        made = tuple(method_of(method, "--ablation.attribution.methods") for method in listed(self.methods))
        object.__setattr__(self, "methods", made)
        if self.draws < 1 or self.verify < 0 or (self.examples is not None and self.examples < 1):
            raise ConfigError(
                f"draws is {self.draws}, verify {self.verify} and examples {self.examples}; expected at least 1, 0 and "
                "1 (--ablation.attribution.draws, ...)"
            )
        if (self.verify or self.metric is not None) and not made:
            raise ConfigError("attribution names no methods, expected some (--ablation.attribution.methods '[mean]')")
        names = [method.name for method in made]
        if len(set(names)) < len(names):
            raise ConfigError(
                f"attribution names {', '.join(names)}, expected each once (--ablation.attribution.methods)"
            )

    @property
    def each(self) -> tuple[AblationMethod, ...]:
        """The methods, as instances."""
        return cast(tuple[AblationMethod, ...], self.methods)

    @property
    def sources(self) -> int:
        """How many other inputs of each batch the methods read."""
        return len({method.source for method in self.each} - {None})

    @property
    def passes(self) -> float:
        """What the estimates take of a batch, in forward passes; one backward counts as two."""
        return 1 + self.sources + 2.0 * (1 + self.draws if self.metric is None else 1)

    def used(self, examples: Tensor) -> Tensor:
        """Which of a batch's ``examples`` ``(batch,)`` int64 are used, bool; none that only fills the batch."""
        return (examples >= 0) if self.examples is None else (examples >= 0) & (examples < self.examples)


def levels_of(site: Site) -> dict[str, int]:
    """The levels of a site's units, and how many neurons one unit has: a neuron, a head, the whole site."""
    heads = {"head": site.width // site.heads} if site.heads else {}
    return {"neuron": 1, **heads, "site": site.width}


def cotangents(scored: Scored, rows: Tensor, draws: int) -> Any:
    """Gradients with respect to the logits, ``(n, classes)``: of the cross-entropy, then ``draws`` random ones.

    A random one is ``√p s − p Σ √p s`` with signs s and the target's predictions p. Its mean is 0 and its covariance
    ``diag(p) − p pᵀ``, the Fisher information, so squares of what comes back estimate the Fisher without bias. Random
    signs have lighter tails than random labels. They are hashed from the example and the place of the position among
    its scored ones, so they don't depend on the batch.

    Args:
        scored: the scored positions.
        rows: the row in the batch of each position's example, ``(n,)`` int64; positions below 0 don't count.
        draws: how many random ones.
    """
    counts = (rows >= 0).unsqueeze(1)
    probabilities = scored.logits.detach().float().softmax(1)
    truth = torch.zeros_like(probabilities).scatter_(1, scored.targets.unsqueeze(1), 1.0)
    yield ((probabilities - truth) * counts).to(scored.logits.dtype)
    del truth
    roots = probabilities.sqrt() * counts
    ordered, order = rows.sort(stable=True)
    places = torch.empty_like(rows)
    places[order] = torch.arange(len(rows), device=rows.device) - torch.searchsorted(ordered, ordered)
    words = torch.arange(-(-roots.shape[1] // 64), device=rows.device)
    bits = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=rows.device)
    for draw in range(draws):
        drawn = hashed(seed_of("attribution", draw), scored.example.unsqueeze(1), places.unsqueeze(1), words)
        signs = (drawn.view(torch.uint8).unsqueeze(2) & bits).flatten(1)[:, : roots.shape[1]] > 0
        signed = torch.where(signs, roots, -roots)
        yield (signed - probabilities * signed.sum(1, keepdim=True)).to(scored.logits.dtype)


def orders(moved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First and second orders of each example and unit, and the estimate, each ``(examples, units)`` float64.

    The estimate is the sum of both orders, damped by position: one whose own second order is q nats counts
    ``1 / (1 + q / BOUND)``. The quadratic overestimates there, as losses level off, and a few positions, above all the
    first ones of a text, would outweigh all others.

    Args:
        moved: gradient times change, ``(1 + draws, examples, positions, units)``, for each of the cotangents.
    """
    moved = moved.to(exact_device(moved.device))
    weight = 1 / (1 + moved[1:].square().mean(0) / (2 * BOUND))
    sums = (one.sum(2, dtype=torch.float64) for one in (moved, moved * weight))
    (first, second), bounded = ((one[0], 0.5 * one[1:].square().mean(0)) for one in sums)
    return first, second, bounded[0] + bounded[1]


def per_position(sums: Tensor, n: Tensor) -> Tensor:
    """The columns ``FOUND`` of each unit, ``(FOUND, units)`` float64, nats per scored position.

    Args:
        sums: over the examples, see ``SUMS``, ``(SUMS, units)`` float64.
        n: the sums over the examples of their scored positions and of the squares of these, ``(2,)`` float64.
    """
    first, second, estimate, square, with_n = sums / n[0]
    if n[1] == n[0].square():  # a single example
        square = square + torch.nan
    spread = square - 2 * estimate * with_n + estimate.square() * n[1] / n[0]
    examples = (n[0].square() / n[1]).expand_as(first)  # of equal length, whose mean would spread as much
    return torch.stack([first, second, estimate, (spread.clamp_min(0) / n[0]).sqrt(), examples])


def table_of(attributed: Mapping[str, Mapping[Site, Tensor]], measured: Sequence[Measured] = ()) -> pd.DataFrame:
    """One row per method and unit: what ablating the unit alone is estimated to cost.

    Columns: method, site, kind (of the site), level (neuron, head or site), unit (index in the site), and, in nats per
    scored position: first and second (order), estimate (their sum, bounded) and se (its standard error over examples),
    and how many examples there were, counted as equally long ones. q is of the two-sided t test over examples that the
    estimate is 0 (where all heads are measured, the effect), see :func:`q_values`, among the units of one method, level
    and kind. se and q are of the sampled examples only and don't know what the expansion leaves out. If units were
    measured, also picked (``largest``, ``random``, or ``all`` where all heads are), verified (the measured effect),
    verified_se, and calibrated: the estimate with its second order times :func:`scale_of`.

    Args:
        attributed: method → site → ``(FOUND, units)`` float64.
        measured: the units that were measured.
    """
    frames = []
    for method, by_site in attributed.items():
        for site, found in by_site.items():
            units = [(level, unit) for level, size in levels_of(site).items() for unit in range(site.width // size)]
            frame = pd.DataFrame(units, columns=["level", "unit"]).assign(method=method, site=site.name, kind=site.kind)
            frames.append(frame[[*_KEYS, "kind"]].assign(**dict(zip(FOUND, found.cpu().numpy(), strict=True))))
    table = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=[*_KEYS, "kind", *FOUND])
    effect, error, found = table["estimate"], table["se"], pd.DataFrame(index=table.index)
    if measured:
        found = table[_KEYS].merge(pd.DataFrame(measured), how="left", on=_KEYS)[list(Measured._fields[4:])]
        every = found["picked"] == "all"
        effect, error = found["verified"].where(every, effect), found["verified_se"].where(every, error)
    free = table["examples"].astype(float) - 1  # degrees of freedom
    z = (effect / error).abs().mask(effect == 0, 0.0).astype(float)
    p = 2 * stats.t.sf(z * (free / (free + 1)) ** 0.5, free)
    table["q"] = q_values(pd.Series(p, table.index), [table[name] for name in GROUP])
    table = pd.concat([table, found], axis=1)
    if not measured:
        return table
    for _, own in table.groupby(GROUP, sort=False):
        scale = float(scale_of(weighed(own.dropna(subset="verified"), len(own)).sum(1)))
        table.loc[own.index, "calibrated"] = own["first"] + scale * (own["estimate"] - own["first"])
    return table


def worth(table: pd.DataFrame) -> pd.Series:
    """What each unit of :func:`table_of` is worth: the measured effect, or the estimate where it wasn't measured."""
    return table["verified"].fillna(table["estimate"]) if "verified" in table else table["estimate"]


def q_values(p: pd.Series, groups: Sequence[pd.Series]) -> pd.Series:
    """The smallest rates of false discoveries, within each group, at which p-values count as found; NaN where p is NaN.

    By Benjamini & Hochberg 1995. The rate is guaranteed where tests are independent or depend on one another
    positively.
    """
    found = p.astype(float)
    for _, own in found.dropna().groupby([group[p.notna()] for group in groups], sort=False, dropna=False):
        found[own.index] = stats.false_discovery_control(own)
    return found
