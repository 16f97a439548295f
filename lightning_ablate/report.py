"""What a run leaves in its folder: results.csv, run.json, degradation.png and TensorBoard curves."""

import hashlib
import io
import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_ablate.comparisons import Comparison, Interval, as_csv, middle_of, ranked
from lightning_ablate.files import write_whole
from lightning_ablate.results import METRICS, MetricName, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's palette and, behind it, Tol's muted one, told apart by colour-blind readers; markers and dashes tell
# them apart in grey
_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#D55E00", "marker": "o", "linestyle": "-"},
    {"color": "#0072B2", "marker": "s", "linestyle": "--"},
    {"color": "#009E73", "marker": "^", "linestyle": "-."},
    {"color": "#CC79A7", "marker": "D", "linestyle": ":"},
    {"color": "#E69F00", "marker": "v", "linestyle": "-"},
    {"color": "#56B4E9", "marker": "P", "linestyle": "--"},
    {"color": "#000000", "marker": "X", "linestyle": "-."},
    {"color": "#999999", "marker": "<", "linestyle": ":"},
    {"color": "#882255", "marker": ">", "linestyle": "-"},
    {"color": "#332288", "marker": "*", "linestyle": "--"},
    {"color": "#117733", "marker": "p", "linestyle": "-."},
    {"color": "#AA4499", "marker": "h", "linestyle": ":"},
    {"color": "#DDCC77", "marker": "d", "linestyle": "-"},
    {"color": "#661100", "marker": "1", "linestyle": "--"},
)
_PANELS = 9  # pairs of methods that have one each
_PACKAGES = ("lightning-ablate", "lightning", "torch", "torchmetrics", "transformers", "timm", "datasets", "numpy")


def save(results: Results, folder: Path, run: dict[str, Any], comparisons: Sequence[Comparison] = ()) -> list[Path]:
    """Writes the files of a run.

    Args:
        results: the figures.
        folder: is made if it isn't there.
        run: what run.json says beside versions and time.
        comparisons: of the methods; none where there are none.

    Returns:
        The paths written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"finished": datetime.now(UTC).isoformat(timespec="seconds"), "partial": list(results.partial), **run}
    facts |= {"classes": results.classes}
    seal = {"results_sha256": hashlib.sha256(results.csv().encode()).hexdigest(), "versions": _versions()}
    makers: dict[str, Callable[[], str | bytes]] = {
        "results.csv": results.csv,
        "run.json": lambda: json.dumps({**facts, **seal}, indent=2, default=str) + "\n",
        f"{figure_name(results)}.png": lambda: png(figure(results)),
    }
    if results.intervals:
        makers["intervals.csv"] = lambda: as_csv(results.intervals, Interval)
    if comparisons:
        makers["comparisons.csv"] = lambda: as_csv(comparisons, Comparison)
    if comparisons and not results.parts:
        makers["comparisons.png"] = lambda: png(differences(comparisons))
    for name, make in makers.items():  # one by one: what is measured is safe before it is drawn
        write_whole(folder / name, make())
    return [folder / name for name in makers]


def figure_name(results: Results) -> str:
    """``importance`` of single sites, layers or heads, or else ``degradation``."""
    return "importance" if results.parts else "degradation"


def figure(results: Results) -> "Figure":
    """The figure of that name."""
    return importance(results) if results.parts else degradation(results)


def degradation(*targets: Results) -> "Figure":
    """Top-1 accuracy and cross-entropy by the ablated fraction: a column a target, a curve a method.

    Bands are the 95% intervals over examples, where these are known; bars are ± 1 standard deviation over the seeds.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    methods = list(dict.fromkeys(method for results in targets for method in results.methods))
    styles = {method: _STYLES[number % len(_STYLES)] for number, method in enumerate(methods)}
    legend = -(-(len(methods) + 2) // (2 * len(targets)))
    figure = Figure(figsize=(0.4 + 3.1 * len(targets), 4.4 + 0.2 * legend), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(targets), sharex="col", squeeze=False)
    labels: dict[str, Any] = {}
    for (top, bottom), results in zip(axes.T, targets, strict=True):
        _panel(top, results, styles, "top1", 100, chance=1 / results.classes)
        _panel(bottom, results, styles, "cross_entropy", 1, chance=math.log(results.classes))
        bottom.set_xlabel("neurons ablated (%)", fontsize=9)
        part = " (partial run)" if results.partial else ""
        top.set_title(f"{results.baseline.model} on {results.baseline.data}{part}", fontsize=9)
        handles, names = top.get_legend_handles_labels()
        labels |= dict(zip(names, handles, strict=True))
    for row, label in zip(axes[:, 0], ("top-1 accuracy (%)", "cross-entropy (nats)"), strict=True):
        row.set_ylabel(label, fontsize=9)
    names = sorted(labels, key=lambda name: methods.index(name) if name in methods else len(methods))
    handles = [labels[name] for name in names]
    columns = 2 * len(targets)
    figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    return figure


def differences(comparisons: Sequence[Comparison]) -> "Figure":
    """How much more top-1 accuracy one method leaves than another, by the ablated fraction, with 95% intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [one for one in comparisons if one.metric == "top1"]
    pairs = list(dict.fromkeys((one.method, one.other) for one in shown))
    if len(pairs) > _PANELS:
        return _matrix(comparisons)
    columns = min(3, len(pairs))
    lines = -(-len(pairs) // columns)
    figure = Figure(figsize=(1.2 + 2.2 * columns, 0.8 + 1.7 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for panel, pair in zip(panels, pairs, strict=False):
        own = sorted((one for one in shown if (one.method, one.other) == pair), key=lambda one: one.fraction)
        x, y = [100 * one.fraction for one in own], [100 * one.difference for one in own]
        ends = [[100 * (one.difference - one.low) for one in own], [100 * (one.high - one.difference) for one in own]]
        panel.errorbar(x, y, yerr=np.clip(ends, 0, None), fmt="o-", color="#0072B2", markersize=3, linewidth=1)
        panel.axhline(0, color="0.35", linewidth=0.9, linestyle=(0, (5, 2)))
        panel.set_title(f"{pair[0]} − {pair[1]}", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.25, linewidth=0.5)
    for panel in panels[len(pairs) :]:
        panel.set_visible(False)
    figure.supxlabel("neurons ablated (%)", fontsize=8)
    figure.supylabel("top-1 difference (points)", fontsize=8)
    return figure


def _matrix(comparisons: Sequence[Comparison]) -> "Figure":
    """Every method against every other at one fraction, where there are too many for a panel each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    middle = middle_of(comparisons)
    here = [one for one in comparisons if one.fraction == middle]
    methods, values, known = ranked(here), {}, {}
    for one in here:
        if one.metric == "top1":
            pair = methods.index(one.method), methods.index(one.other)
            values[pair], values[pair[::-1]] = 100 * one.difference, -100 * one.difference
            known[pair] = known[pair[::-1]] = one.low > 0 or one.high < 0
    count = len(methods)
    figure = Figure(figsize=(2.2 + 0.52 * count, 1.6 + 0.44 * count), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    grid = [[values.get((row, column), math.nan) for column in range(count)] for row in range(count)]
    largest = max(map(abs, values.values())) or 1.0
    axes.imshow(grid, cmap="RdBu", vmin=-1.3 * largest, vmax=1.3 * largest, aspect="auto")
    for (row, column), value in values.items():
        bold = "bold" if known[row, column] else "normal"
        axes.text(column, row, f"{value:+.1f}", ha="center", va="center", fontsize=7, fontweight=bold)
    axes.set_xticks(range(count), methods, fontsize=7, rotation=45, ha="right")
    axes.set_yticks(range(count), methods, fontsize=7)
    axes.set_title(
        f"top-1 of the row's method above the column's, points, {100 * middle:g}% ablated\n"
        "(bold: the 95% interval over examples leaves out 0)",
        fontsize=8,
    )
    return figure


def importance(results: Results) -> "Figure":
    """What each head costs when it alone is ablated, as a map a method; or each site or layer, as a line a method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heads = 1 + max((row.head for row in results.rows if row.head is not None), default=-1)
    methods, parts = results.methods, results.parts
    panels = len(methods) if heads else 1
    size = (1.4 + panels * max(1.6, 0.28 * heads), 1.5 + 0.26 * len(parts)) if heads else (5.0, 3.2)
    drawn = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(drawn)
    axes = list(drawn.subplots(1, panels, sharey=True, squeeze=False)[0])
    if heads:
        _maps(drawn, axes, results, heads)
    else:
        for number, method in enumerate(methods):
            damage = [results.damage(method, part) for part in parts]
            style = _STYLES[number % len(_STYLES)]
            axes[0].plot(range(len(parts)), damage, label=method, markersize=3.5, linewidth=1.2, **style)
        axes[0].axhline(0, color="0.35", linewidth=0.9, linestyle=(0, (5, 2)))
        axes[0].set_xticks(range(len(parts)), _short(parts), fontsize=7, rotation=90 if len(parts) > 8 else 0)
        axes[0].set_xlabel("layer", fontsize=9)
        axes[0].set_ylabel("added cross-entropy (nats)", fontsize=9)
        axes[0].tick_params(axis="y", labelsize=8)
        axes[0].legend(fontsize=8, frameon=False)
    part = " (partial run)" if results.partial else ""
    drawn.suptitle(f"{results.baseline.model} on {results.baseline.data}{part}", fontsize=9)
    return drawn


def png(figure: "Figure") -> bytes:
    """A figure as a PNG of 300 dots per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=300, metadata={"Software": None})
    return buffer.getvalue()


def tensorboard(results: Results, folder: Path) -> list[Path]:
    """Writes a TensorBoard run for each method, so that their curves overlay; the step is the percentage ablated.

    Returns:
        The folder of these runs; none where single parts were ablated, which make no curve.
    """
    from torch.utils.tensorboard import SummaryWriter

    curves = folder / "curves"
    if results.parts:
        return []
    for method in results.methods:
        with SummaryWriter(str(curves / method)) as writer:
            for metric in METRICS:
                for point in results.curve(method, metric):
                    writer.add_scalar(f"ablation/{metric}", point.mean, round(100 * point.fraction))
    return [curves]


def _panel(
    axes: "Axes",
    results: Results,
    styles: Mapping[str, Mapping[str, Any]],
    metric: MetricName,
    scale: float,
    chance: float,
) -> None:
    for method in results.methods:
        style, points = styles[method], results.curve(method, metric)
        x = [100 * point.fraction for point in points]
        y = [scale * point.mean for point in points]
        axes.plot(x, y, label=method, markersize=3.5, linewidth=1.2, **style)
        sd = [scale * (point.sd or 0.0) for point in points]
        axes.errorbar(x, y, yerr=sd, fmt="none", ecolor=style["color"], elinewidth=0.8, capsize=1.5, alpha=0.7)
        low, high = zip(*(point.interval or (point.mean, point.mean) for point in points), strict=True)
        axes.fill_between(
            x, scale * np.array(low), scale * np.array(high), color=style["color"], alpha=0.15, linewidth=0
        )
    baseline = scale * getattr(results.baseline, metric)
    axes.axhline(baseline, color="0.35", linewidth=0.9, linestyle=(0, (5, 2)), label="nothing ablated")
    axes.axhline(scale * chance, color="0.35", linewidth=0.9, linestyle=(0, (1, 1.5)), label="chance")
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _maps(drawn: "Figure", axes: Sequence["Axes"], results: Results, heads: int) -> None:
    rows = {(row.method, row.part, row.head) for row in results.rows}
    values = {
        method: [
            [results.damage(method, part, h) if (method, part, h) in rows else math.nan for h in range(heads)]
            for part in results.parts
        ]
        for method in results.methods
    }
    largest = max(abs(v) for lines in values.values() for line in lines for v in line if not math.isnan(v)) or 1.0
    for panel, method in zip(axes, results.methods, strict=True):
        image = panel.imshow(values[method], cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
        panel.set_title(method, fontsize=9)
        panel.set_xlabel("head", fontsize=9)
        step = 1 + (heads - 1) // 16
        panel.set_xticks(range(0, heads, step), [str(head) for head in range(0, heads, step)], fontsize=8)
        panel.set_yticks(range(len(results.parts)), _short(results.parts), fontsize=8)
    axes[0].set_ylabel("layer" if all(name.isdigit() for name in _short(results.parts)) else "site", fontsize=9)
    scale = drawn.colorbar(image, ax=list(axes))
    scale.set_label("added cross-entropy (nats)", fontsize=9)
    scale.ax.tick_params(labelsize=8)


def _short(parts: Sequence[str]) -> list[str]:
    """The names without what all of them begin or end with, cut at the dots."""
    names = [part.split(".") for part in parts]
    while all(len(name) > 1 for name in names) and len({name[0] for name in names}) == 1:
        names = [name[1:] for name in names]
    while all(len(name) > 1 for name in names) and len({name[-1] for name in names}) == 1:
        names = [name[:-1] for name in names]
    return [".".join(name) for name in names]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a checkout that isn't installed
            found[package] = "not installed"
    return found


def fresh_folder(folder: Path, names: Sequence[str] = ("results.csv", "ablation.ckpt", "config.yaml")) -> Path:
    """The folder itself, or its first ``run-2``, ``run-3`` ... that holds no earlier run's files."""
    candidate, number = folder, 1
    while any((candidate / name).exists() for name in names):
        number += 1
        candidate = folder / f"run-{number}"
    return candidate
