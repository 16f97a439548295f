"""What every unit is worth: the estimated effect of ablating it alone, in nats, from a few backward passes."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from lightning_ablate.conditions import listed
from lightning_ablate.errors import ConfigError
from lightning_ablate.methods import AblationMethod, method_of
from lightning_ablate.metrics import Scored
from lightning_ablate.seeds import seed_of
from lightning_ablate.sites import Site, exact_device
from lightning_ablate.statistics import FOUND

BOUND = 25.0  # nats of an example at which what one position does to it levels off
_KEYS = ["method", "site", "level", "unit"]
GROUP = ["method", "level", "kind"]  # what is picked and compared together
FOUND_AT = 0.05  # the q up to which a unit counts as found
SUMS = ("first", "second", "estimate", "square", "with_n")  # what is summed over the examples of each unit


@dataclass(frozen=True)
class Attribution:
    """Options of attribution: the estimated effect of ablating every neuron, head and site alone.

    Args:
        methods: the replacements under which units are attributed, as ``--ablation.methods``; none by default.
        draws: random backward passes for the second-order term.
        verify: N: ablate and measure the N largest and N random neurons, and as many heads.
        examples: how many calibration examples are used, the first ones by their indices; None takes all.
        metric: the module's own metric whose loss is attributed, to first order; None takes the cross-entropy.
    """

    methods: Sequence[AblationMethod | str] | str = ()
    draws: int = 8
    verify: int = 0
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

    def used(self, examples: Tensor) -> Tensor:
        """Which of a batch's ``examples`` ``(batch,)`` int64 are used, bool; none that only fills the batch."""
        return (examples >= 0) if self.examples is None else (examples >= 0) & (examples < self.examples)


def levels_of(site: Site) -> dict[str, int]:
    """The levels of a site's units, and how many neurons one unit has: a neuron, a head, the whole site."""
    heads = {"head": site.width // site.heads} if site.heads else {}
    return {"neuron": 1, **heads, "site": site.width}


def cotangents(scored: Scored, rows: Tensor, examples: Sequence[int], draws: int) -> Any:
    """Gradients with respect to the logits, ``(n, classes)``: of the cross-entropy, then ``draws`` random ones.

    A random one is ``√p s − p Σ √p s`` with signs s and the target's predictions p. Its mean is 0 and its covariance
    ``diag(p) − p pᵀ``, the Fisher information, so squares of what comes back estimate the Fisher without bias. Random
    signs have lighter tails than random labels. They depend on the example and the position, not on the batch.

    Args:
        scored: the scored positions.
        rows: the row in the batch of each position's example, ``(n,)`` int64; positions below 0 don't count.
        examples: the indices of the batch's examples.
        draws: how many random ones.
    """
    counts = (rows >= 0).unsqueeze(1)
    probabilities = scored.logits.detach().float().softmax(1)
    truth = torch.zeros_like(probabilities).scatter_(1, scored.targets.unsqueeze(1), 1.0)
    yield ((probabilities - truth) * counts).to(scored.logits.dtype)
    del truth
    roots = probabilities.sqrt()
    for draw in range(draws):
        signed = torch.zeros_like(roots)
        for row, example in enumerate(examples):
            own = (rows == row).nonzero().squeeze(1)
            if len(own):
                generator = torch.Generator().manual_seed(seed_of("attribution", draw, example))
                signs = torch.randint(2, (len(own), roots.shape[1]), generator=generator, dtype=torch.int8)
                signed[own] = roots[own] * (2 * signs - 1).to(roots)
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


def table_of(attributed: Mapping[str, Mapping[Site, Tensor]], measured: Sequence[Sequence[Any]] = ()) -> pd.DataFrame:
    """One row per method and unit: what ablating the unit alone is estimated to cost.

    Columns: method, site, kind (of the site), level (neuron, head or site), unit (index in the site), and, in nats per
    scored position: first and second (order), estimate (their sum, bounded) and se (its standard error over examples),
    and how many examples there were, counted as equally long ones. q is of the two-sided t test over examples that the
    estimate is 0, see :func:`q_values`, among the units of one method, level and kind. If units were verified, also
    picked (``largest`` or ``random``), verified (the measured effect), verified_se, and calibrated: the estimate with
    its second order times :func:`scale_of`.

    Args:
        attributed: method → site → ``(FOUND, units)`` float64.
        measured: for each verified unit its method, site, level, unit, picked, verified and verified_se.
    """
    frames = []
    for method, by_site in attributed.items():
        for site, found in by_site.items():
            units = [(level, unit) for level, size in levels_of(site).items() for unit in range(site.width // size)]
            frame = pd.DataFrame(units, columns=["level", "unit"]).assign(method=method, site=site.name, kind=site.kind)
            frames.append(frame[[*_KEYS, "kind"]].assign(**dict(zip(FOUND, found.cpu().numpy(), strict=True))))
    table = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=[*_KEYS, "kind", *FOUND])
    free = table["examples"].astype(float) - 1  # degrees of freedom
    z = (table["estimate"] / table["se"]).abs().mask(table["estimate"] == 0, 0.0).astype(float)
    p = 2 * stats.t.sf(z * (free / (free + 1)) ** 0.5, free)
    table["q"] = q_values(pd.Series(p, table.index), [table[name] for name in GROUP])
    if not measured:
        return table
    columns = [*_KEYS, "picked", "verified", "verified_se"]
    table = table.merge(pd.DataFrame(list(measured), columns=columns), how="left", on=_KEYS)
    for _, own in table.groupby(GROUP, sort=False):
        scale = float(scale_of(_weighed(own.dropna(subset="verified"), len(own)).sum(1)))
        table.loc[own.index, "calibrated"] = own["first"] + scale * (own["estimate"] - own["first"])
    return table


def q_values(p: pd.Series, groups: Sequence[pd.Series]) -> pd.Series:
    """The smallest rates of false discoveries, within each group, at which p-values count as found; NaN where p is NaN.

    By Benjamini & Hochberg 1995. The rate is guaranteed where tests are independent or depend on one another
    positively.
    """
    found = p.astype(float)
    for _, own in found.dropna().groupby([group[p.notna()] for group in groups], sort=False, dropna=False):
        found[own.index] = stats.false_discovery_control(own)
    return found


def scale_of(sums: np.ndarray) -> np.ndarray:
    """The factor of the second order with which the verified units' estimates add up to their effects; at least 0.

    The first order is exact for small changes. The second ranks units well, but it leaves out higher orders, which
    grow with it. The factor is a ratio estimate (Horvitz & Thompson 1952).

    Args:
        sums: ``(3, ...)`` float64, sums of what :func:`_weighed` returns.

    Returns:
        ``(...)`` float64, NaN where there is no second order.
    """
    second, missing, first = sums
    known = second > 1e-9 * first  # more than rounding
    return np.divide(missing, second, out=np.full_like(second, np.nan), where=known).clip(0)


def _weighed(verified: pd.DataFrame, count: int) -> np.ndarray:
    """Second order, effect minus first order, and size of the first order, ``(3, verified)``, each times a weight.

    The weight is the number of units, of ``count``, that a verified unit stands for: the largest for themselves, the
    random ones for all others.
    """
    first, estimate, effect = verified[["first", "estimate", "verified"]].to_numpy(dtype=np.float64).T
    largest = (verified["picked"] == "largest").to_numpy()
    weights = np.where(largest, 1.0, (count - largest.sum()) / max(1, (~largest).sum()))
    return weights * np.stack([estimate - first, effect - first, np.abs(first)])


def picked(frame: pd.DataFrame, count: int, seed: int = 0) -> pd.DataFrame:
    """The units to verify, in each of ``GROUP``: ``count`` of the largest estimates and as many random others.

    They are rows of the frame, without whole sites, with a column ``picked``: ``largest`` or ``random``.
    """
    found = []
    for group, rows in frame[frame["level"] != "site"].groupby(GROUP, sort=False):
        largest = rows.nlargest(count, "estimate")
        others = rows.drop(largest.index)
        generator = np.random.default_rng(seed_of("verify", seed, *group))
        drawn = others.iloc[np.sort(generator.permutation(len(others))[:count])]
        found += [largest.assign(picked="largest"), drawn.assign(picked="random")]
    return pd.concat(found)


def trust(frame: pd.DataFrame, resamples: int = 1000) -> pd.DataFrame:
    """How well estimates agree with verified effects: one row for each of ``GROUP`` with three verified units or more.

    Columns: units (number of verified ones), pearson, spearman, slope (of the effects on the estimates) and scale (see
    :func:`scale_of`). ``_low`` and ``_high`` are the ends of their 95% intervals, by a bootstrap over units. For the
    scale, the largest units are in each sample, as they were not drawn.
    """
    rows = []
    for group, every in frame.groupby(GROUP, sort=False):
        own = every.dropna(subset="verified")
        if len(own) < 3:
            continue
        pairs, weighed = own[["estimate", "verified"]].to_numpy().T, _weighed(own, len(every))
        fixed, others = (weighed[:, own["picked"] == kind] for kind in ("largest", "random"))
        generator = np.random.default_rng(0)
        drawn, again = (generator.integers(max(1, n), size=(resamples, n)) for n in (len(own), others.shape[1]))
        with warnings.catch_warnings(action="ignore"):  # a sample of a single unit has no correlation
            whole = [*_agreement(*pairs), scale_of(weighed.sum(1))]
            sampled = [*_agreement(*pairs[:, drawn]), scale_of(fixed.sum(1)[:, None] + others[:, again].sum(2))]
            low, high = np.where(np.isnan(whole), np.nan, np.nanpercentile(sampled, [2.5, 97.5], axis=1))
        rows.append([*group, len(own), *np.stack([whole, low, high], 1).ravel()])
    names = [f"{name}{end}" for name in ("pearson", "spearman", "slope", "scale") for end in ("", "_low", "_high")]
    return pd.DataFrame(rows, columns=[*GROUP, "units", *names])


def _agreement(estimate: np.ndarray, effect: np.ndarray) -> tuple[np.ndarray, ...]:
    """Pearson's and Spearman's correlation, and the slope of the effect on the estimate, along the last axis."""
    pearson = stats.pearsonr(estimate, effect, axis=-1).statistic
    spearman = stats.pearsonr(*(stats.rankdata(values, axis=-1) for values in (estimate, effect)), axis=-1).statistic
    return pearson, spearman, pearson * effect.std(-1) / estimate.std(-1)
