"""The results of a sweep as DataFrames, and the files they are kept in."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lightning_ablate.errors import ConfigError, DataError, loading
from lightning_ablate.metrics import METRICS
from lightning_ablate.results import figures, frames, text
from lightning_ablate.results.bootstrap import intervals
from lightning_ablate.results.folder import write_whole
from lightning_ablate.results.frames import BASELINE, Cell, Contrast, by_data
from lightning_ablate.results.text import base_name

COMPARED = ("top1", "cross_entropy")


class Results:
    """What every condition of a sweep scored, and what follows from it.

    Of several data sets the tables begin with a column ``data``, and :meth:`on` gives the results on one of them. Every
    interval is of 95%, over clusters of examples, the choices of neurons being those of the run; NaN where the data
    don't tell examples apart. Curves and areas go by the share that was ablated.

    Args:
        table: a row a condition, the baseline (method ``none``) first, one data set behind the other: model, data,
            method, fraction (share of the units that was asked for, in each site or in the part the condition is
            confined to), ablated (share of the neurons of all sites that went), seed (missing where it can't matter),
            part (the one site or layer that was ablated; empty for all), head (missing for all), n (scored positions),
            top1 and top5 (share of them whose target has the largest logit, or one of the five largest),
            cross_entropy, and kl, that of the ablated from the clean prediction (nats per scored position). Any other
            column is a metric of one's own.
        examples: a row a condition and example, the same examples in the same order for every condition: condition (row
            of the table), example, cluster (equal for examples that share a document), n (its scored positions), and
            the sums of the scores over these. None where the data don't tell examples apart; a data set may be left
            out.
        facts: what run.json says; ``classes``, their number or the size of the vocabulary, and ``partial``, why the run
            doesn't cover all its data, are used here.

    Raises:
        DataError: if a column is missing, the baseline isn't first, or the conditions' examples are not the same.
    """

    def __init__(
        self, table: pd.DataFrame, examples: pd.DataFrame | None = None, facts: Mapping[str, Any] | None = None
    ) -> None:
        self.table = frames.typed(table, frames.TABLE, "the table")
        self.examples = None if examples is None else frames.typed(examples, frames.EXAMPLES, "the table of examples")
        self.facts = dict(facts or {})
        if not len(self.table) or self.baseline["method"] != BASELINE:
            raise DataError(f"the first row of the table must be the baseline, of the method {BASELINE!r}")
        self.data = self.table["data"].unique().tolist()
        self.own = [name for name in self.table.columns if name not in frames.TABLE]  # metrics of one's own
        self.metrics = [*METRICS, *self.own]
        self._parts = [self._part(data) for data in self.data] if len(self.data) > 1 else []
        if self._parts:
            return
        if self.examples is not None and not frames.rectangular(self.examples, len(self.table)):
            raise DataError("every condition needs a row for each example, the same ones in the same order")
        self._cells = frames.cells(self.table)

    @property
    def baseline(self) -> pd.Series:
        """The row with nothing ablated."""
        return self.table.iloc[0]

    @property
    def each(self) -> list["Results"]:
        """The results on each data set."""
        return self._parts or [self]

    @property
    def labels(self) -> list[str]:
        """Short names of the data sets, all different."""
        names = list(map(base_name, self.data))
        return [f"{name} {place + 1}" if name in names[:place] else name for place, name in enumerate(names)]

    def on(self, data: str) -> "Results":
        """The results on one data set, by its name or its label; ConfigError if there is none such."""
        found = [one for one, label in zip(self.each, self.labels, strict=True) if data in (one.data[0], label)]
        if not found:
            raise ConfigError(f"there are no results on {data!r}, expected one of {', '.join(self.data)}")
        return found[0]

    @property
    def methods(self) -> list[str]:
        """The methods, in the order of the sweep."""
        return [method for method in self.table["method"].unique() if method != BASELINE]

    @property
    def parts(self) -> list[str]:
        """The sites or layers that were ablated alone, in the order of the sweep; empty where all of them were."""
        return [part for part in self.table["part"].unique() if part]

    @property
    def figure_name(self) -> str:
        """``importance`` of conditions confined to parts, or else ``degradation``."""
        return "importance" if self.parts else "degradation"

    @property
    def counts(self) -> tuple[int, int]:
        """How many examples were scored, and how many clusters of them; 0 where the data don't tell."""
        if self.examples is None:
            return 0, 0
        base = self.examples[(self.examples["condition"] == 0) & (self.examples["n"] > 0)]
        return len(base), base["cluster"].nunique()

    @property
    def partial(self) -> list[str]:
        """Why the run doesn't cover all its data; empty for a whole run."""
        return list(self.facts.get("partial") or [])

    @by_data
    def summary(self) -> pd.DataFrame:
        """A row a method and fraction, the baseline first: what it scored.

        Its columns are method, fraction, ablated, (part and head where conditions are confined to them,) seeds (their
        number), n, clusters (over which intervals are), and of each metric m: ``m``, the mean over the seeds; ``m_low``
        and ``m_high``, the ends of its interval; ``m_sd``, the standard deviation over the seeds, NaN for a single one.
        """
        keys, contrasts = [], []
        for method, own in self._cells.items():
            for cell, seeds in own.items():
                rows = np.array(list(seeds.values()))[:, None]
                keys.append((method, *cell))
                contrasts.append((rows, np.ones(1)))
        return self._frame(["method", *Cell._fields], keys, contrasts, self.metrics)

    @by_data
    def kept(self, metric: str, nothing: float) -> pd.DataFrame:
        """The summary, and ``kept`` of a metric: 1 with nothing ablated, 0 where it is ``nothing``, both as known.

        With what it is on corrupt inputs, ``results.on("... reversed").baseline[metric]``, as in activation patching.
        """
        if metric not in self.metrics:
            raise ConfigError(f"there is no metric {metric!r} here; those there are: {', '.join(self.metrics)}")
        frame, whole = self.summary(), self.baseline[metric] - nothing
        kept = (frame[[metric, f"{metric}_low", f"{metric}_high"]].to_numpy() - nothing) / whole
        kept[:, 1:].sort(axis=1)
        return frame.assign(**dict(zip(("kept", "kept_low", "kept_high"), kept.T, strict=True)))

    @by_data
    def compare(self, method: str | None = None, other: str | None = None) -> pd.DataFrame:
        """How much more one method scores than another, on the same examples and as many neurons.

        A row a pair and share that both ablated, like :meth:`summary` with the differences. In one run the neurons are
        the same. Conditions are paired by seed; where a seed can't matter to one method, its only condition is paired
        with all of the other's. None stands for each method (as the other: each behind the first), ``none`` for the
        baseline; any other name is a ConfigError.
        """
        for name, known in ((method, self.methods), (other, [*self.methods, BASELINE])):
            if name is not None and name not in known:
                raise ConfigError(f"there is no method {name!r} here; those there are: {', '.join(known)}")
        firsts, seconds = ([name] if name else self.methods for name in (method, other))
        pairs = [(one, two) for one, two in product(firsts, seconds) if one != two or method == other]
        if method is None and other is None:
            pairs = list(combinations(self.methods, 2))
        keys, contrasts = [], []
        for one, two in pairs:
            others = {cell.went: seeds for cell, seeds in self._cells[two].items()}
            for cell, seeds in self._cells[one].items():
                against = others.get((0.0, "", None) if two == BASELINE else cell.went)
                if against:
                    same = [(row, against[seed]) for seed, row in seeds.items() if seed in against]
                    rows = np.array(same or list(product(seeds.values(), against.values())))
                    if not (same or None in seeds or None in against):
                        continue  # no seed of one is a seed of the other
                    keys.append((one, two, *cell))
                    contrasts.append((rows, np.array([1.0, -1.0])))
        return self._frame(["method", "other", *Cell._fields], keys, contrasts, [*COMPARED, *self.own])

    @by_data
    def ranking(self) -> pd.DataFrame:
        """A row a method, the least damage first: its scores above the baseline's, averaged over the shares ablated.

        That is the area between both curves, by trapezoids, from 0 to ``to``, the largest share that all methods
        reach. The columns of cross_entropy (added) and top1 (below 0: lost) are like those of :meth:`summary`. Of
        conditions confined to parts, which make no curve, a row a method and part, the most damage first.
        """
        if self.parts:
            damage = self.compare(other=BASELINE)
            return damage.sort_values("cross_entropy", ascending=False, kind="stable", ignore_index=True)
        curves = {m: {cell.ablated: rows for cell, rows in self._cells[m].items()} for m in self.methods}
        curves = {method: curve for method, curve in curves.items() if max(curve) > 0}
        to = min(map(max, curves.values()), default=1.0)
        keys = [(method, to) for method in curves]
        contrasts = [frames.area(curve, to) for curve in curves.values()]
        ranked = self._frame(["method", "to"], keys, contrasts, [*COMPARED[::-1], *self.own])
        return ranked.sort_values("cross_entropy", kind="stable", ignore_index=True)

    def plot(self, metric: str = "cross_entropy") -> Figure:
        """The curves of the methods by the share ablated; or, of conditions confined to parts, what each part costs.

        Data sets have their columns of curves; of parts the ``metric`` on the first is shown.
        """
        return figures.importance(self.each[0], metric) if self.parts else figures.degradation(*self.each)

    def pictures(self) -> dict[str, Callable[[], Figure]]:
        """What draws each figure that is saved, by its name without the suffix."""
        made: dict[str, Callable[[], Figure]] = {self.figure_name: self.plot}
        for place, one in enumerate(self.each):
            if self.parts:
                made[self.suffixed(self.figure_name, place)] = one.plot
                for metric in self.own:
                    made[f"{self.suffixed(self.figure_name, place)}_{metric}"] = partial(one.plot, metric)
            elif one.examples is not None and len(one.methods) > 1:
                made[self.suffixed("comparisons", place)] = partial(figures.differences, one)
        return made

    def suffixed(self, name: str, place: int) -> str:
        """A name for what there is of each data set, here of the one at that place."""
        return f"{name}_{re.sub(r'[^A-Za-z0-9.-]+', '_', self.labels[place])}" if place else name

    def save(self, folder: Path | str, forms: Sequence[str] = ("png",)) -> list[Path]:
        """Writes results.csv, run.json, examples.parquet and figures into a folder, each whole or not at all.

        The ``forms`` of the figures are ``png``, ``pdf`` and ``svg``.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        makers: dict[str, Callable[[], str | bytes]] = {
            "results.csv": lambda: self.table.to_csv(index=False, lineterminator="\n"),
            "run.json": lambda: json.dumps(self.facts, indent=2, default=str) + "\n",
        }
        if self.examples is None:
            (folder / "examples.parquet").unlink(missing_ok=True)  # another run's
        else:
            makers["examples.parquet"] = partial(self.examples.to_parquet, index=False, compression="zstd")
        for (name, picture), form in product(self.pictures().items(), forms):
            makers[f"{name}.{form}"] = partial(figures.drawn, picture, form)
        for name, make in makers.items():  # one by one: what is measured is safe before it is drawn
            write_whole(folder / name, make())
        return [folder / name for name in makers]

    @classmethod
    def load(cls, folder: Path | str) -> "Results":
        """Those that :meth:`save` wrote, bit for bit; DataError if the folder holds none, or other files."""
        paths = [Path(folder) / name for name in ("results.csv", "run.json", "examples.parquet")]
        table = frames.read(paths[0], frames.TABLE)
        with loading(str(paths[1]), DataError):
            facts = dict(json.loads(paths[1].read_text(encoding="utf-8")))
        examples = frames.read(paths[2], frames.EXAMPLES) if paths[2].is_file() else None
        try:
            return cls(table, examples, facts)
        except DataError as error:
            raise DataError(f"could not load {str(folder)!r}: {error}") from error

    def __str__(self) -> str:
        """The tables that the terminal shows."""
        return text.tables(self)

    def __repr__(self) -> str:
        """One line."""
        return f"Results({text.title(self)}: {', '.join(self.methods)}; {len(self.table)} conditions)"

    def _repr_html_(self) -> str:
        return text.html(self)

    def _part(self, data: str) -> "Results":
        """The results on one of several data sets."""
        rows = self.table.index[self.table["data"] == data]
        examples = self.examples
        if examples is not None:
            examples = examples[examples["condition"].between(rows[0], rows[-1])]
            examples = examples.assign(condition=examples["condition"] - rows[0]) if len(examples) else None
        return Results(self.table.loc[rows], examples, self.facts)

    def _frame(
        self, names: list[str], keys: list[tuple[Any, ...]], contrasts: list[Contrast], metrics: Sequence[str]
    ) -> pd.DataFrame:
        """The keys, and of each metric the contrasts' mean over the seeds, its interval and standard deviation."""
        frame = pd.DataFrame(keys, columns=names)
        if "head" in names:
            frame = frame.astype({"head": "Int64"}) if self.parts else frame.drop(columns=["part", "head"])
            frame["seeds"] = [len(rows) for rows, _ in contrasts]
            frame["n"] = [self.table["n"].iloc[rows[0, 0]] for rows, _ in contrasts]
            frame["clusters"] = self.counts[1]
        ends = np.full((2, len(metrics), len(keys)), np.nan)
        if self.examples is not None and keys:
            own = {metric: self.examples[metric].to_numpy().reshape(len(self.table), -1) for metric in metrics}
            sums = [weights @ own[metric][rows].mean(0) for metric in metrics for rows, weights in contrasts]
            positions, clusters = (self.examples[name].to_numpy()[: len(sums[0])] for name in ("n", "cluster"))
            ends = intervals(np.stack(sums), positions, clusters).reshape(ends.shape)
        for metric, (low, high) in zip(metrics, ends.swapaxes(0, 1), strict=True):
            scores = self.table[metric].to_numpy()
            by_seed = [scores[rows] @ weights for rows, weights in contrasts]
            frame[metric] = np.array([values.mean() for values in by_seed])
            frame[f"{metric}_low"], frame[f"{metric}_high"] = low, high
            frame[f"{metric}_sd"] = np.array([v.std(ddof=1) if len(v) > 1 else np.nan for v in by_seed])
        return frame
