"""Intervals of the curves, and of paired differences between methods, from a bootstrap over examples."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import combinations
from typing import Any

import numpy as np

from lightning_ablate.sweep import BASELINE, Condition

COMPARED = ("top1", "cross_entropy")
_RESAMPLES, _AT_A_TIME, _LEVEL = 2_000, 100, 0.95
_PAIRS = 6  # that a table shows


@dataclass(frozen=True)
class Comparison:
    """How much more one method scores than another, on the same neurons and the same examples.

    Attributes:
        metric: ``top1`` (share of the scored positions) or ``cross_entropy`` (nats per scored position).
        fraction: share of the units that was ablated.
        method: the one.
        other: the other.
        difference: of the first above the second, mean over the seeds.
        low: lower end of its 95% interval over examples, the choices of neurons being those of the run.
        high: upper end.
        seed_sd: standard deviation of the difference over the seeds; None for a single one.
        part: the one site or layer that was ablated; empty where all of them were.
        head: the one head that was ablated; None where all of them were.
    """

    metric: str
    fraction: float
    method: str
    other: str
    difference: float
    low: float
    high: float
    seed_sd: float | None
    part: str = ""
    head: int | None = None

    def __str__(self) -> str:
        """Top-1 in percentage points, cross-entropy in nats."""
        scale, digits, unit = (100, 2, "points") if self.metric == "top1" else (1, 4, "nats")
        ends = ", ".join(f"{scale * value:+.{digits}f}" for value in (self.low, self.high))
        what = f"{self.method} − {self.other} at {100 * self.fraction:g}%"
        return f"{what}: {scale * self.difference:+.{digits}f} {unit} [{ends}]"


@dataclass(frozen=True)
class Interval:
    """How well one point of a method's curve is known, or the area under its damage.

    Attributes:
        metric: ``top1`` (share of the scored positions) or ``cross_entropy`` (nats per scored position).
        method: what replaced the neurons; ``none`` for the baseline.
        fraction: share of the units that was ablated; None for the area: what the method's scores differ from those of
            the baseline, averaged over all fractions from 0 to the largest (trapezoids).
        mean: the figure, mean over the seeds.
        low: lower end of its 95% interval over examples, the choices of neurons being those of the run.
        high: upper end.
        seed_sd: standard deviation over the seeds; None for a single one.
    """

    metric: str
    method: str
    fraction: float | None
    mean: float
    low: float
    high: float
    seed_sd: float | None


def intervals(
    conditions: Sequence[Condition], positions: np.ndarray, sums: Mapping[str, np.ndarray], seed: int = 0
) -> list[Interval]:
    """How well the curves of a sweep of whole targets are known, by the bootstrap of :func:`compare`.

    Args:
        conditions: of the sweep, the baseline first.
        positions: see :func:`compare`.
        sums: see :func:`compare`.
        seed: of the draws.

    Example:
        >>> conditions = [BASELINE, Condition("zero", 0.5, None), Condition("zero", 1.0, None)]
        >>> sums = {"top1": np.array([[4.0, 4.0], [3.0, 3.0], [0.0, 0.0]]), "cross_entropy": np.zeros((3, 2))}
        >>> [(one.fraction, one.mean) for one in intervals(conditions, np.array([4, 4]), sums)[:4]]
        [(0.0, 1.0), (0.5, 0.75), (1.0, 0.0), (None, -0.375)]
    """
    counted = positions > 0
    positions = positions[counted].astype(np.float64)
    curves: dict[str, dict[float, dict[int | None, int]]] = {BASELINE.method: {0.0: {None: 0}}}
    for (fraction, part, _), methods in _cells(conditions).items():
        for method, seeds in methods.items() if not part else ():
            curves.setdefault(method, {})[fraction] = seeds
    if len(curves) < 2 or len(positions) < 2:
        return []
    points: list[tuple[str, str, float | None]] = []
    columns, by_seed = [], []
    for metric in COMPARED:
        own = sums[metric][:, counted]
        for method, curve in curves.items():
            for fraction, indices in curve.items():
                each = own[list(indices.values())]
                points.append((metric, method, fraction))
                columns.append(each.mean(0))
                by_seed.append(each.sum(1) / positions.sum())
            if method == BASELINE.method:
                continue
            points.append((metric, method, None))
            each = _areas(curve, own - own[0])
            columns.append(each.mean(0))
            by_seed.append(each.sum(1) / positions.sum())
    low, high = _intervals(np.stack(columns, 1), positions, seed)
    found = []
    for number, (point, seeds) in enumerate(zip(points, by_seed, strict=True)):
        sd = float(seeds.std(ddof=1)) if len(seeds) > 1 else None
        found.append(Interval(*point, float(seeds.mean()), float(low[number]), float(high[number]), sd))
    return found


def _areas(curve: Mapping[float, Mapping[int | None, int]], damage: np.ndarray) -> np.ndarray:
    """The mean damage over the fractions, ``(seeds, examples)``, of that of each condition ``(conditions, examples)``.

    Where the seed doesn't matter, at a fraction of 1, the same condition counts for all seeds.
    """
    fractions = sorted(curve)
    seeds = max(curve.values(), key=len)
    heights = [np.zeros((len(seeds), damage.shape[1]))]
    for fraction in fractions:
        at = curve[fraction]
        heights.append(damage[[at[seed] if seed in at else next(iter(at.values())) for seed in seeds]])
    return np.asarray(np.trapezoid(np.stack(heights), [0.0, *fractions], axis=0) / fractions[-1])


def compare(
    conditions: Sequence[Condition], positions: np.ndarray, sums: Mapping[str, np.ndarray], seed: int = 0
) -> list[Comparison]:
    """Compares every two methods at every fraction, by a percentile bootstrap (Efron & Tibshirani 1993).

    Examples are drawn with replacement, the same ones for all conditions; a score is a sum over the examples drawn by
    the number of their scored positions.

    Args:
        conditions: of the sweep.
        positions: ``(examples,)``, how many of each example's positions were scored.
        sums: by metric, ``(conditions, examples)`` float64, its sum over these positions.
        seed: of the draws.

    Example:
        >>> conditions = [Condition("zero", 1.0, None), Condition("mean", 1.0, None)]
        >>> sums = {"top1": np.array([[1.0, 2.0], [2.0, 3.0]]), "cross_entropy": np.zeros((2, 2))}
        >>> print(compare(conditions, np.array([4, 4]), sums)[0])
        zero − mean at 100%: -25.00 points [-25.00, -25.00]
    """
    counted = positions > 0
    positions = positions[counted].astype(np.float64)
    cells: list[tuple[Any, ...]] = []
    differences, by_seed = [], []
    for (fraction, part, head), rows in _cells(conditions).items():
        for method, other in combinations(rows, 2):
            pairs = _pairs(rows[method], rows[other])
            for metric in COMPARED:
                each = np.stack([sums[metric][one, counted] - sums[metric][two, counted] for one, two in pairs])
                cells.append((metric, fraction, method, other, part, head))
                differences.append(each.mean(0))
                by_seed.append(each.sum(1) / positions.sum())
    if not cells or len(positions) < 2:
        return []
    low, high = _intervals(np.stack(differences, 1), positions, seed)
    found = []
    for number, ((metric, fraction, method, other, part, head), seeds) in enumerate(zip(cells, by_seed, strict=True)):
        sd = float(seeds.std(ddof=1)) if len(seeds) > 1 else None
        three = float(seeds.mean()), float(low[number]), float(high[number])
        found.append(Comparison(metric, fraction, method, other, *three, sd, part, head))
    return found


def table(comparisons: Sequence[Comparison]) -> str:
    """The differences in top-1, and in cross-entropy, at the fraction closest to a half, a line a pair.

    Of more than six pairs, those of methods next to each other by their cross-entropy.
    """
    if not comparisons or any(one.part for one in comparisons):
        return ""
    middle = middle_of(comparisons)
    here = [one for one in comparisons if one.fraction == middle]
    pairs = list(dict.fromkeys((one.method, one.other) for one in here))
    lines = ["[95% interval over examples, the choices of neurons being those of the run]"]
    if len(pairs) > _PAIRS:
        ranks = ranked(here)
        lines = [f"{lines[0]}; all {len(pairs)} pairs: comparisons.csv"]
        here = [one for one in here if abs(ranks.index(one.method) - ranks.index(one.other)) == 1]
    shown = {metric: [str(one) for one in here if one.metric == metric] for metric in COMPARED}
    width = max(map(len, shown["top1"]))
    rows = [f"{one.ljust(width)}   {other.partition(': ')[2]}" for one, other in zip(*shown.values(), strict=True)]
    return "\n".join([*rows, "", *lines])


def middle_of(comparisons: Sequence[Comparison]) -> float:
    """The fraction closest to a half."""
    return min({one.fraction for one in comparisons}, key=lambda fraction: abs(fraction - 0.5))


def ranked(comparisons: Sequence[Comparison]) -> list[str]:
    """The methods of comparisons at one fraction, the one that leaves the least cross-entropy first."""
    above: dict[str, float] = {}
    for one in comparisons:
        if one.metric == "cross_entropy":
            above[one.method] = above.get(one.method, 0.0) + one.difference
            above[one.other] = above.get(one.other, 0.0) - one.difference
    return sorted(above, key=lambda method: above[method])


def as_csv(rows: Sequence[Comparison] | Sequence[Interval], kind: type[Comparison] | type[Interval]) -> str:
    """A row each, with a header; floats to ten digits, empty where there is nothing."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(kind))
    writer.writerows([f"{v:.10g}" if isinstance(v, float) else v for v in astuple(row)] for row in rows)
    return text.getvalue()


def _intervals(differences: np.ndarray, positions: np.ndarray, seed: int) -> np.ndarray:
    """The ends of the intervals, ``(2, comparisons)``, of differences ``(examples, comparisons)``."""
    generator, examples = np.random.default_rng(seed), len(positions)
    columns, ratios = np.column_stack([positions, differences]), []
    for _ in range(_RESAMPLES // _AT_A_TIME):
        drawn = generator.multinomial(examples, np.full(examples, 1 / examples), size=_AT_A_TIME)
        totals = drawn.astype(np.float64) @ columns
        ratios.append(totals[:, 1:] / totals[:, :1])
    return np.quantile(np.concatenate(ratios), [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], axis=0)


def _cells(
    conditions: Sequence[Condition],
) -> dict[tuple[float, str, int | None], dict[str, dict[int | None, int]]]:
    """By fraction and part, of each method the conditions' indices by seed."""
    cells: dict[tuple[float, str, int | None], dict[str, dict[int | None, int]]] = {}
    for index, condition in enumerate(conditions):
        if condition != BASELINE:
            cell = cells.setdefault((condition.fraction, condition.part, condition.head), {})
            cell.setdefault(condition.method, {})[condition.seed] = index
    return cells


def _pairs(one: Mapping[int | None, int], other: Mapping[int | None, int]) -> list[tuple[int, int]]:
    """The conditions of the same seeds; where a seed doesn't matter to one, its only one against all of the other."""
    return list(_matched(one, other)) or [(a, b) for a in one.values() for b in other.values()]


def _matched(one: Mapping[int | None, int], other: Mapping[int | None, int]) -> Iterator[tuple[int, int]]:
    for seed, index in one.items():
        if seed in other:
            yield index, other[seed]
