"""The scores of a sweep, and the tables that follow from them."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import combinations, product
from typing import Any, Self

import numpy as np
import pandas as pd

from lightning_ablate.attribution import q_values
from lightning_ablate.errors import ConfigError, DataError
from lightning_ablate.files import base_name
from lightning_ablate.metrics import METRICS
from lightning_ablate.results import byexample, frames
from lightning_ablate.results.bootstrap import intervals, p_values, sequences
from lightning_ablate.results.byexample import ByExample
from lightning_ablate.results.frames import BASELINE, Cell, Contrast, by_data

_COMPARED = ("top1", "cross_entropy")


def q_name(metric: str) -> str:
    """The column of a metric's q-values."""
    return "q" if metric == "cross_entropy" else f"{metric}_q"


class Scores:
    """What every condition of a sweep scored, and what follows from it.

    With several data sets, tables begin with a column ``data``, and :meth:`on` gives the results on one data set.
    Intervals are of 95%, by a bootstrap over clusters of examples. They are NaN where the examples aren't known. In a
    run with ``until`` they are confidence sequences, and q is NaN.

    Args:
        table: one row per condition; of each data set the baseline is the first row. README.md describes its columns.
            A numeric column that isn't listed there is a metric of the user's own.
        examples: one row per condition and example, with the same examples in the same order for every condition; or
            what is known of the examples of each data set. None where the data don't tell which example a position
            belongs to.
        facts: the contents of run.json.

    Raises:
        DataError: if a column is missing, the baseline isn't first, or conditions have different examples.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        examples: pd.DataFrame | Sequence[ByExample | None] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.table = frames.typed(table, frames.TABLE, "the table")
        self.facts = dict(facts or {})
        if not len(self.table) or self.baseline["method"] != BASELINE:
            raise DataError(f"the first row of the table must be the baseline, of the method {BASELINE!r}")
        self.data = self.table["data"].unique().tolist()
        self.own = [name for name in self.table.columns if name not in frames.TABLE]  # the user's own metrics
        self.metrics = [*METRICS, *self.own]
        conditions = self.table.groupby("data", sort=False).size().tolist()
        given = byexample.of_frame(examples, conditions) if isinstance(examples, pd.DataFrame) else examples
        self.known: list[ByExample | None] = [None] * len(self.data) if given is None else list(given)
        if len(self.data) == 1:
            self._cells = frames.cells(self.table)

    @cached_property
    def each(self) -> list[Self]:
        """The results on each data set."""
        return [self._of(data) for data in self.data] if len(self.data) > 1 else [self]

    def _of(self, data: str) -> Self:
        """The results on one of several data sets."""
        return type(self)(self.table[self.table["data"] == data], [self.known[self.data.index(data)]], self.facts)

    @property
    def examples(self) -> pd.DataFrame | None:
        """One row per condition and example, with the sums of its scores; None where no examples are known."""
        return pd.concat(self.pieces(), ignore_index=True) if any(self.known) else None

    def pieces(self) -> Iterator[pd.DataFrame]:
        """The table of examples in pieces, which need less memory."""
        start = 0
        for known, count in zip(self.known, self.table.groupby("data", sort=False).size(), strict=True):
            yield from [] if known is None else known.pieces(start)
            start += count

    @property
    def baseline(self) -> pd.Series:
        """The row with nothing ablated."""
        return self.table.iloc[0]

    @property
    def labels(self) -> list[str]:
        """Short names of the data sets, all different."""
        names = list(map(base_name, self.data))
        return [f"{name} {index + 1}" if name in names[:index] else name for index, name in enumerate(names)]

    def on(self, data: str) -> Self:
        """The results on one data set, by its name or its label; ConfigError if there is no such data set."""
        for one, label in zip(self.each, self.labels, strict=True):
            if data in (one.data[0], label):
                return one
        raise ConfigError(f"there are no results on {data!r}, expected one of {', '.join(self.data)}")

    @property
    def methods(self) -> list[str]:
        """The methods, in the order of the sweep."""
        return [method for method in self.table["method"].unique() if method != BASELINE]

    @property
    def parts(self) -> list[str]:
        """The sites or layers that were ablated alone, in the order of the sweep; empty if all were ablated at once."""
        return [part for part in self.table["part"].unique() if part]

    @property
    def counts(self) -> tuple[int, int]:
        """The number of scored examples and of their clusters; 0 and 0 where examples aren't known."""
        known = [one.cluster[one.n > 0] for one in self.known if one is not None]
        return sum(map(len, known)), len(np.unique(np.concatenate(known))) if known else 0

    @property
    def sequential(self) -> bool:
        """Whether the run could end early, so that its intervals are confidence sequences."""
        return self.facts.get("until") is not None

    @property
    def interval(self) -> str:
        """What the intervals are called."""
        return "95% confidence sequence" if self.sequential else "95% interval"

    @property
    def partial(self) -> list[str]:
        """Why the run doesn't cover all its data; empty for a whole run."""
        return list(self.facts.get("partial") or [])

    @by_data
    def summary(self) -> pd.DataFrame:
        """One row per method and fraction, the baseline first: its scores.

        Columns: method, fraction, ablated, (part and head if there are parts,) seeds (how many), n, clusters (how many
        the intervals draw), and for each metric m: ``m``, the mean over the seeds; ``m_low`` and ``m_high``, the ends
        of its interval; ``m_sd``, the standard deviation over the seeds, NaN for a single seed.
        """
        keys, contrasts = [], []
        for method, own in self._cells.items():
            for cell, seeds in own.items():
                keys.append((method, *cell))
                contrasts.append((np.array(list(seeds.values()))[:, None], np.ones(1)))
        return self._frame(["method", *Cell._fields], keys, contrasts, self.metrics)

    @by_data
    def kept(self, metric: str, nothing: float) -> pd.DataFrame:
        """The summary, with ``kept``: a metric rescaled so that the baseline is 1 and the value ``nothing`` is 0.

        For activation patching, ``nothing`` is the score on corrupt inputs:
        ``results.on("... reversed").baseline[metric]``.
        """
        if metric not in self.metrics:
            raise ConfigError(f"there is no metric {metric!r} here; those there are: {', '.join(self.metrics)}")
        frame, whole = self.summary(), self.baseline[metric] - nothing
        kept = (frame[[metric, f"{metric}_low", f"{metric}_high"]].to_numpy() - nothing) / whole
        kept[:, 1:].sort(axis=1)
        return frame.assign(**dict(zip(("kept", "kept_low", "kept_high"), kept.T, strict=True)))

    @by_data
    def compare(self, method: str | None = None, other: str | None = None) -> pd.DataFrame:
        """The difference of two methods' scores, ``method`` minus ``other``, with the same units ablated.

        One row per pair and share that both methods ablated; columns as in :meth:`summary`. Conditions are paired by
        seed. A condition without a seed is paired with each of the other method's conditions. Also ``q`` of the
        cross-entropy, and ``m_q`` of other metrics m: among the rows whose q is as small (with parts, those of one
        method and kind), this share is expected to be chance (:func:`~lightning_ablate.attribution.q_values`, of
        :func:`~lightning_ablate.results.bootstrap.p_values`).

        Args:
            method: None for every method.
            other: ``none`` for the baseline, None for every method (if both are None, each pair once).

        Raises:
            ConfigError: if there is no such method.
        """
        for name, known in ((method, self.methods), (other, [*self.methods, BASELINE])):
            if name is not None:
                _check_method(name, known)
        firsts, seconds = ([name] if name else self.methods for name in (method, other))
        pairs = [(one, two) for one, two in product(firsts, seconds) if one != two or method == other]
        if method is None and other is None:
            pairs = list(combinations(self.methods, 2))
        keys, contrasts = [], []
        for one, two in pairs:
            others = {cell[1:]: seeds for cell, seeds in self._cells[two].items()}  # all but the fraction asked for
            for cell, seeds in self._cells[one].items():
                against = others.get((0.0, "", None) if two == BASELINE else cell[1:], {})
                rows = [(row, against[seed]) for seed, row in seeds.items() if seed in against]
                if None in seeds or None in against:
                    rows = rows or list(product(seeds.values(), against.values()))
                if rows:
                    keys.append((one, two, *cell))
                    contrasts.append((np.array(rows), np.array([1.0, -1.0])))
        return self._frame(["method", "other", *Cell._fields], keys, contrasts, [*_COMPARED, *self.own], tested=True)

    @by_data
    def ranking(self, other: str = BASELINE) -> pd.DataFrame:
        """One row per method, the least damage first: its scores minus the baseline's, averaged over ablated shares.

        The average is the area between both curves, by the trapezoid rule, from 0 to ``to``: the largest share that
        all methods reach. cross_entropy is what was added, top1 what was lost (below 0); columns are as in
        :meth:`summary`, with ``q`` as in :meth:`compare`. If there are parts: one row per method and part, the most
        damage first.

        Args:
            other: a method whose scores are subtracted, paired by seed, in place of the baseline's; ConfigError if
                there is none.
        """
        if self.parts:
            damage = self.compare(other=other)
            return damage.sort_values("cross_entropy", ascending=False, kind="stable", ignore_index=True)
        curves = {m: {cell.ablated: rows for cell, rows in self._cells[m].items()} for m in self.methods}
        curves = {method: curve for method, curve in curves.items() if max(curve) > 0}
        to = min(map(max, curves.values()), default=1.0)
        if other == BASELINE:
            areas = {method: frames.area(curve, to) for method, curve in curves.items()}
        else:
            _check_method(other, list(curves))
            minus = curves.pop(other)
            pairs = {method: frames.difference(curve, minus, to) for method, curve in curves.items()}
            areas = {method: area for method, area in pairs.items() if area is not None}
        keys = [(method, to) for method in areas]
        metrics = [*_COMPARED[::-1], *self.own]
        ranked = self._frame(["method", "to"], keys, list(areas.values()), metrics, tested=True)
        return ranked.sort_values("cross_entropy", kind="stable", ignore_index=True)

    def _frame(
        self,
        names: list[str],
        keys: list[tuple[Any, ...]],
        contrasts: list[Contrast],
        metrics: Sequence[str],
        tested: bool = False,
    ) -> pd.DataFrame:
        """One row per key and contrast: the key, and of each metric the mean over seeds, interval, deviation and q."""
        frame = pd.DataFrame(keys, columns=names)
        if "head" in names:
            frame = frame.astype({"head": "Int64"}) if self.parts else frame.drop(columns=["part", "head"])
            frame["seeds"] = [len(rows) for rows, _ in contrasts]
            frame["n"] = [self.table["n"].iloc[rows[0, 0]] for rows, _ in contrasts]
            frame["clusters"] = self.counts[1]
        known, between = self.known[0], sequences if self.sequential else intervals
        p = np.full((len(metrics), len(keys)), np.nan)
        for place, metric in enumerate(metrics):
            ends = np.full((2, len(keys)), np.nan)
            if known is not None and keys:
                own = known.of_metric(metric)
                sums = np.empty((len(contrasts), own.shape[1]))
                for at, (rows, weights) in enumerate(contrasts):
                    sums[at] = weights @ own[rows].mean(0)
                ends = between(sums, known.n, known.cluster)
                if tested and not self.sequential and self.counts[1] > 1:
                    p[place] = p_values(sums, known.n, known.cluster)
            scores = self.table[metric].to_numpy()
            by_seed = [scores[rows] @ weights for rows, weights in contrasts]
            frame[metric] = np.array([values.mean() for values in by_seed])
            frame[f"{metric}_low"], frame[f"{metric}_high"] = ends
            frame[f"{metric}_sd"] = np.array([v.std(ddof=1) if len(v) > 1 else np.nan for v in by_seed])
        if tested:
            groups = [pd.Series(0, frame.index)]  # all rows together
            if self.parts:
                kinds = {site["name"]: site["kind"] for site in self.facts.get("sites", ())}
                groups = [frame["method"], frame["part"].map(lambda part: kinds.get(part, ""))]
            for metric, values in zip(metrics, p, strict=True):
                frame[q_name(metric)] = q_values(pd.Series(values, frame.index), groups)
        return frame


def _check_method(name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise ConfigError(f"there is no method {name!r} here; those there are: {', '.join(known)}")
