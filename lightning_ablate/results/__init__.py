"""The results of a sweep: a tidy table, and how it is written and read."""

import csv
import hashlib
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from lightning_ablate.comparisons import Interval
from lightning_ablate.errors import DataError, loading
from lightning_ablate.sweep import BASELINE, Condition

MetricName = Literal["top1", "top5", "cross_entropy", "kl"]
_MOST = 5  # parts that the table shows for each method
METRICS: tuple[MetricName, ...] = ("top1", "top5", "cross_entropy", "kl")


@dataclass(frozen=True)
class Row:
    """One condition's figures.

    Attributes:
        model: name of the target.
        data: name of the data.
        method: what replaced the neurons; ``none`` for the baseline.
        fraction: share of the neurons that was ablated, in each site or in the part the condition is confined to.
        seed: None where it doesn't matter.
        part: name of the one site or layer that was ablated; empty where all of them were.
        head: the one head that was ablated; None where all of them were.
        n: scored positions.
        top1: share of them whose target has the largest logit.
        top5: share of them whose target is among the five largest.
        cross_entropy: nats per scored position.
        kl: divergence of the ablated from the clean prediction, KL(clean || ablated), nats per scored position.
    """

    model: str
    data: str
    method: str
    fraction: float
    seed: int | None
    part: str
    head: int | None
    n: int
    top1: float
    top5: float
    cross_entropy: float
    kl: float


@dataclass(frozen=True)
class Point:
    """A method's figure at one fraction.

    Attributes:
        fraction: share of the units that was ablated.
        mean: over the seeds.
        sd: standard deviation over the seeds; None for a single one.
        interval: the ends of the 95% interval over examples; None where it isn't known.
    """

    fraction: float
    mean: float
    sd: float | None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Results:
    """All figures of a run.

    Attributes:
        rows: one for each distinct condition, the baseline first.
        classes: number of classes, or size of the vocabulary.
        partial: why the run doesn't cover all its data; empty for a whole run.
        intervals: of the curves and areas; empty where the data don't tell their examples apart.
    """

    rows: Sequence[Row]
    classes: int
    partial: Sequence[str] = ()
    intervals: Sequence[Interval] = ()

    @classmethod
    def of(
        cls,
        conditions: Sequence[Condition],
        figures: dict[str, Any],
        *,
        model: str,
        data: str,
        classes: int,
        partial: Sequence[str] = (),
        intervals: Sequence[Interval] = (),
    ) -> "Results":
        """The results of a sweep, from its conditions and what :class:`SweepMetrics` computed."""
        n = figures["n"].tolist()
        columns = [figures[name].tolist() for name in METRICS]
        rows = [
            Row(model, data, c.method, c.fraction, c.seed, c.part, c.head, n[i], *(column[i] for column in columns))
            for i, c in enumerate(conditions)
        ]
        return cls(rows, classes, tuple(partial), tuple(intervals))

    @classmethod
    def load(cls, folder: Path) -> "Results":
        """Those that a run left in its folder.

        Raises:
            DataError: if the folder holds none, or its files were changed.
        """
        rows = read_rows(folder / "results.csv")
        with loading(str(folder / "run.json"), DataError):
            facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            return cls(rows, facts["classes"], tuple(facts["partial"]), read_intervals(folder / "intervals.csv"))

    @property
    def baseline(self) -> Row:
        """The row with nothing ablated."""
        return next(row for row in self.rows if row.method == BASELINE.method)

    @property
    def methods(self) -> list[str]:
        """The methods, in the order of the sweep."""
        return list(dict.fromkeys(row.method for row in self.rows if row.method != BASELINE.method))

    @property
    def fractions(self) -> list[float]:
        """The fractions above 0, ascending."""
        return sorted({row.fraction for row in self.rows} - {0.0})

    @property
    def parts(self) -> list[str]:
        """The sites or layers that were ablated alone, in the order of the sweep; empty where all of them were."""
        return list(dict.fromkeys(row.part for row in self.rows if row.part))

    def damage(self, method: str, part: str, head: int | None = None) -> float:
        """What one site, layer or head costs: its cross-entropy above the baseline's, in nats, mean over the seeds."""
        found = [row for row in self.rows if (row.method, row.part, row.head) == (method, part, head)]
        return statistics.fmean(row.cross_entropy for row in found) - self.baseline.cross_entropy

    def curve(self, method: str, metric: MetricName) -> list[Point]:
        """A method's figures by fraction, ascending from the baseline at 0."""
        known = {i.fraction: (i.low, i.high) for i in self.intervals if (i.metric, i.method) == (metric, method)}
        first = [(i.low, i.high) for i in self.intervals if (i.metric, i.method) == (metric, BASELINE.method)]
        points = [Point(0.0, getattr(self.baseline, metric), None, first[0] if first else None)]
        for fraction in self.fractions:
            values = [getattr(r, metric) for r in self.rows if r.method == method and r.fraction == fraction]
            sd = statistics.stdev(values) if len(values) > 1 else None
            if values:
                points.append(Point(fraction, statistics.fmean(values), sd, known.get(fraction)))
        return points

    def area(self, method: str, metric: MetricName) -> Point:
        """What a method's scores differ from the baseline's, averaged over all fractions from 0 to its largest.

        That is the area between both, by trapezoids; it ranks methods by one number. The Point's fraction is the
        largest one.
        """
        reached = {0.0, *(row.fraction for row in self.rows if row.method == method)}
        points = [point for point in self.curve(method, metric) if point.fraction in reached]
        seeds = {row.seed for row in self.rows if row.method == method} - {None} or {None}
        values = []
        for seed in seeds:
            own = {r.fraction: getattr(r, metric) for r in self.rows if r.method == method and r.seed in (seed, None)}
            heights = [0.0, *(own[point.fraction] - points[0].mean for point in points[1:])]
            steps = pairwise(zip([point.fraction for point in points], heights, strict=True))
            values.append(sum((b - a) * (y + z) / 2 for (a, y), (b, z) in steps) / points[-1].fraction)
        sd = statistics.stdev(values) if len(values) > 1 else None
        known = [(i.low, i.high) for i in self.intervals if (i.metric, i.method, i.fraction) == (metric, method, None)]
        return Point(points[-1].fraction, statistics.fmean(values), sd, known[0] if known else None)

    def csv(self) -> str:
        """The rows, comma-separated, with a header; floats to ten digits, an empty seed where there is none."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(field.name for field in fields(Row))
        writer.writerows([f"{v:.10g}" if isinstance(v, float) else v for v in astuple(row)] for row in self.rows)
        return text.getvalue()

    def table(self) -> str:
        """Top-1 and cross-entropy at up to three fractions, mean ± sd over the seeds; or the most important parts."""
        base = self.baseline
        first = (
            f"{base.model} on {base.data}: {base.n:,} scored positions; nothing ablated: "
            f"top-1 {100 * base.top1:.2f}%, cross-entropy {base.cross_entropy:.4f} nats"
        )
        first = "\n".join([first, *(f"PARTIAL: {reason}" for reason in self.partial)])
        if not self.methods:
            return first
        return f"{first}\n\n{self._parts_table() if self.parts else self._curves_table()}"

    def _curves_table(self) -> str:
        seeds = len({row.seed for row in self.rows} - {None})
        shown = _shown(self.fractions)
        head = [f"{100 * fraction:g}%" for fraction in shown]
        lines = [["", "top-1 %", *[""] * (len(shown) - 1), "cross-entropy", *[""] * (len(shown) - 1)]]
        lines.append(["ablated", *head, *head])
        for method in self.methods:
            top1 = {p.fraction: _with_sd(p, 100, 2) for p in self.curve(method, "top1")}
            loss = {p.fraction: _with_sd(p, 1, 4) for p in self.curve(method, "cross_entropy")}
            lines.append([method, *(top1.get(f, "") for f in shown), *(loss.get(f, "") for f in shown)])
        spread = f"mean ± standard deviation over {seeds} seed{'s' * (seeds != 1)}"
        return "\n".join([*_aligned(lines), "", spread, "", *_aligned(self._areas_table())])

    def _areas_table(self) -> list[list[str]]:
        """The methods, the one that costs the least first."""
        loss = {method: self.area(method, "cross_entropy") for method in self.methods}
        last = max((area.fraction for area in loss.values()), default=1.0)
        lines = [[f"mean over 0 to {100 * last:g}%", "added cross-entropy", "lost top-1, points"]]
        for method in sorted(loss, key=lambda method: (-loss[method].fraction, loss[method].mean)):
            top1, end = _with_interval(self.area(method, "top1"), -100, 2), loss[method].fraction
            name = method if end == last else f"{method}, 0 to {100 * end:g}%"
            lines.append([name, _with_interval(loss[method], 1, 4), top1])
        return lines

    def _parts_table(self) -> str:
        """The most important sites, layers or heads of each method."""
        lines = [["ablated", "most important first: added cross-entropy, nats"]]
        for method in self.methods:
            parts = dict.fromkeys((row.part, row.head) for row in self.rows if row.method == method)
            damage = {part: self.damage(method, *part) for part in parts}
            for part, head in sorted(damage, key=lambda key: -damage[key])[:_MOST]:
                name = part if head is None else f"{part} head {head}"
                lines.append([method, name, f"{damage[part, head]:+.4f}"])
        lines[0].append("")
        return "\n".join(_aligned(lines))


def read_rows(path: Path) -> list[Row]:
    """The rows of a results.csv; run.json beside it tells whether it still is what the run wrote.

    Raises:
        DataError: if the file isn't one, or was changed.
    """
    with loading(str(path), DataError):
        content, run = path.read_bytes(), path.with_name("run.json")
        told = json.loads(run.read_text(encoding="utf-8")).get("results_sha256") if run.is_file() else None
        if told not in (None, hashlib.sha256(content).hexdigest()):
            raise DataError(f"{path} is not what its run wrote: its checksum isn't the one in {run.name}")
        reader = csv.DictReader(io.StringIO(content.decode(), newline=""))
        names = [field.name for field in fields(Row)]
        if reader.fieldnames is None or not set(names) <= set(reader.fieldnames):
            raise DataError(f"{path} has the columns {reader.fieldnames}, expected {names}")
        return [_row(line) for line in reader]


def read_intervals(path: Path) -> list[Interval]:
    """The rows of an intervals.csv; none if there is no such file.

    Raises:
        DataError: if the file isn't one.
    """
    if not path.is_file():
        return []
    with loading(str(path), DataError), path.open(encoding="utf-8", newline="") as file:
        return [
            Interval(
                line["metric"],
                line["method"],
                float(line["fraction"]) if line["fraction"] else None,
                float(line["mean"]),
                float(line["low"]),
                float(line["high"]),
                float(line["seed_sd"]) if line["seed_sd"] else None,
            )
            for line in csv.DictReader(file)
        ]


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]


def _shown(fractions: Sequence[float]) -> list[float]:
    if len(fractions) <= 3:
        return list(fractions)
    usual = [fraction for fraction in (0.1, 0.5, 0.9) if fraction in fractions]
    return usual or [fractions[0], fractions[len(fractions) // 2], fractions[-1]]


def _with_sd(point: Point, scale: float, digits: int) -> str:
    spread = "" if point.sd is None else f" ± {scale * point.sd:.{digits}f}"
    return f"{scale * point.mean:.{digits}f}{spread}"


def _with_interval(point: Point, scale: float, digits: int) -> str:
    if point.interval is None:
        return f"{scale * point.mean + 0.0:+.{digits}f}"
    low, high = sorted(scale * end for end in point.interval)
    return f"{scale * point.mean + 0.0:+.{digits}f} [{low + 0.0:+.{digits}f}, {high + 0.0:+.{digits}f}]"


def _row(line: dict[str, str]) -> Row:
    seed = int(line["seed"]) if line["seed"] else None
    head = int(line["head"]) if line["head"] else None
    what = line["model"], line["data"], line["method"], float(line["fraction"]), seed, line["part"], head
    return Row(*what, int(line["n"]), *(float(line[name]) for name in METRICS))
