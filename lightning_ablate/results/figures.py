"""The figures of results: curves by fraction, paired differences, and what each site, layer or head costs."""

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_ablate.errors import ConfigError
from lightning_ablate.results.text import neighbours, title

if TYPE_CHECKING:
    from lightning_ablate.results.table import Results

# Okabe & Ito's palette and, behind it, Tol's muted one, told apart by colour-blind readers; markers and dashes tell
# them apart in grey
_COLORS = (
    *("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"),
    *("#882255", "#332288", "#117733", "#AA4499", "#DDCC77", "#661100"),
)
_STYLES: list[dict[str, Any]] = [
    {"color": color, "marker": marker, "linestyle": line}
    for color, marker, line in zip(_COLORS, "os^DvPX<>*phd1", cycle(("-", "--", "-.", ":")))
]
_ZERO: dict[str, Any] = {"color": "0.35", "linewidth": 0.9, "linestyle": (0, (5, 2))}
_CHANCE: dict[str, Any] = _ZERO | {"linestyle": (0, (1, 1.5))}
_METHODS = 4  # of which every pair has a panel
_ACROSS = 4  # maps beside one another
_CHARACTER = 0.065  # inches that one takes at 8 points


def degradation(*results: "Results") -> Figure:
    """Top-1 accuracy, cross-entropy and one's own metrics by the share ablated: a column a target, a curve a method.

    Bands are the 95% intervals over clusters, where these are known; bars are ± 1 standard deviation over the seeds.
    """
    methods = list(dict.fromkeys(method for one in results for method in one.methods))
    labels = {method: textwrap.fill(method, 44) for method in methods}
    columns = len(results) * (2 if max(map(len, methods), default=0) <= 20 else 1)
    lines = sum(label.count("\n") for label in labels.values()) + -(-(len(methods) + 2) // columns)
    own = list(dict.fromkeys(metric for one in results for metric in one.own))
    figure = blank(0.4 + 3.1 * len(results), 4.4 + 2 * len(own) + 0.17 * lines)
    axes = figure.subplots(2 + len(own), len(results), sharex="col", squeeze=False)
    handles: dict[str, Any] = {}
    for (top, *others), one in zip(axes.T, results, strict=True):
        classes, bottom = one.facts.get("classes"), others[-1]
        for panel, metric in zip((top, *others), ("top1", "cross_entropy", *own), strict=True):
            scale = 100 if metric == "top1" else 1
            if metric not in one.metrics:
                continue
            _curves(panel, one.summary(), methods, metric, scale)
            panel.axhline(scale * one.baseline[metric], **_ZERO, label="nothing ablated")
            if classes and metric not in own:
                chance = 1 / classes if metric == "top1" else math.log(classes)
                panel.axhline(scale * chance, **_CHANCE, label="chance")
        bottom.set_xlabel("neurons ablated (%)", fontsize=9)
        top.set_title(_title(one, 40), fontsize=9)
        handles |= {name: handle for handle, name in zip(*top.get_legend_handles_labels(), strict=True)}
    for row, label in zip(axes[:, 0], ("top-1 accuracy (%)", "cross-entropy (nats)", *own), strict=True):
        row.set_ylabel(label, fontsize=9)
    names = [name for name in (*methods, "nothing ablated", "chance") if name in handles]
    shown = [handles[name] for name in names], [labels.get(name, name) for name in names]
    figure.legend(*shown, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    return figure


def differences(results: "Results") -> Figure:
    """How much more top-1 accuracy one method leaves than another, by the share ablated, with 95% intervals.

    Every pair has a panel; of more than four methods those of neighbours in rank.

    ConfigError if there are no two methods, or conditions are confined to parts.
    """
    compared = results.compare()
    if compared.empty or results.parts:
        raise ConfigError(f"differences by fraction need two methods or more and no single parts: {results!r}")
    if len(results.methods) > _METHODS:
        compared = neighbours(results, compared)
    pairs = list(dict.fromkeys(zip(compared["method"], compared["other"], strict=True)))
    columns = min(3, len(pairs))
    lines = -(-len(pairs) // columns)
    titles = [textwrap.fill(f"{one} − {other}", 32) for one, other in pairs]
    height = 1.7 + 0.13 * max(name.count("\n") for name in titles)
    figure = blank(1.2 + 2.2 * columns, 1.0 + height * lines)
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for panel, pair, name in zip(panels, pairs, titles, strict=False):
        own = compared[(compared["method"] == pair[0]) & (compared["other"] == pair[1])]
        x, y, low, high = 100 * own[["ablated", "top1", "top1_low", "top1_high"]].to_numpy().T
        ends, line = np.clip([y - low, high - y], 0, None), "o-" if len(own) > 1 else "o"
        panel.errorbar(x, y, yerr=ends, fmt=line, color="#0072B2", markersize=3, linewidth=1)
        panel.axhline(0, **_ZERO)
        panel.set_title(name, fontsize=8)
        plain(panel, 7)
    _share_ticks(panels[0], sorted({0.0, *compared["ablated"]}), 7, most=6)
    for panel in panels[len(pairs) :]:
        panel.set_visible(False)
    figure.suptitle(_title(results, 20 + 30 * columns), fontsize=9)
    figure.supxlabel("neurons ablated (%)", fontsize=8)
    figure.supylabel("top-1 difference (points)", fontsize=8)
    return figure


def importance(results: "Results", metric: str = "cross_entropy") -> Figure:
    """What each head costs when it alone is ablated, as a map a method; or each site or layer, as a line a method.

    It is the change of the ``metric``. Where what examples scored is known, a dot marks a head, and a band around a
    line shows, what they tell from 0.
    """
    renamed = {metric: "value", f"{metric}_low": "low", f"{metric}_high": "high"}
    damage = results.compare(other="none")[["method", "part", "head", *renamed]].rename(columns=renamed)
    label = "added cross-entropy (nats)" if metric == "cross_entropy" else f"change of {metric}"
    names = short(results.parts)
    if damage["head"].notna().any():
        return _maps(results, damage, names, label)
    methods, labels = results.methods, [textwrap.fill(method, 64) for method in results.methods]
    columns = max(1, min(3, 66 // (6 + max(map(len, labels)))))
    tilted = len(names) > 8 or max(map(len, names)) > 30 / len(names)
    below = 0.055 * max(map(len, names)) * tilted + 0.17 * -(-len(methods) // columns)
    figure = blank(max(5.0, 1.0 + 0.2 * len(names)), 3.0 + below)
    axes = figure.subplots()
    for method, name, style in zip(methods, labels, cycle(_STYLES)):
        own = damage[damage["method"] == method]
        x = own["part"].map(results.parts.index).to_numpy()
        axes.plot(x, own["value"].to_numpy(), label=name, markersize=3.5, linewidth=1.2, **style)
        axes.fill_between(
            x, own["low"].to_numpy(), own["high"].to_numpy(), color=style["color"], alpha=0.15, linewidth=0
        )
    axes.axhline(0, **_ZERO)
    axes.set_xticks(range(len(names)), names, rotation=90 if tilted else 0)
    axes.set_xlabel(_kind(names), fontsize=9)
    axes.set_ylabel(label, fontsize=9)
    plain(axes, 8)
    figure.legend(loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    figure.suptitle(_title(results, 70), fontsize=9)
    return figure


def drawn(picture: Callable[[], Figure], form: str = "png") -> bytes:
    """A figure as a file: a ``png`` of 300 dots per inch, a ``pdf`` or an ``svg``, the same bytes each time."""
    buffer = io.BytesIO()
    unsaid = {"png": "Software", "pdf": "CreationDate", "svg": "Date"}[form]
    picture().savefig(buffer, format=form, dpi=300, metadata={unsaid: None})
    return buffer.getvalue()


def blank(width: float, height: float) -> Figure:
    """An empty figure of so many inches, which needs no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure._repr_png_ = partial(drawn, lambda: figure)  # type: ignore[attr-defined]  # as notebooks show it
    return figure


def _title(results: "Results", width: int) -> str:
    return textwrap.fill(title(results) + (" (partial run)" if results.partial else ""), width)


def plain(axes: Axes, size: int, grid: bool = True) -> None:
    """Small ticks, a grid or none, and no frame above and at the right."""
    axes.tick_params(labelsize=size)
    if grid:
        axes.grid(alpha=0.25, linewidth=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _curves(axes: Axes, summary: pd.DataFrame, methods: Sequence[str], metric: str, scale: float) -> None:
    """A curve a method from the baseline on; or a point a method, side by side, where there is one share only."""
    shares = sorted(summary["ablated"].unique())
    alone = len(shares) == 2
    here = [method for method in methods if method in set(summary["method"])]
    for method, style in zip(methods, cycle(_STYLES)):
        own = summary[summary["method"] == method]
        if own.empty:
            continue
        if len(own) > 1:
            own = pd.concat([summary.iloc[:1], own])
        else:
            style = style | {"linestyle": "none"}
        x, y = 100 * own["ablated"].to_numpy(), scale * own[metric].to_numpy()
        if alone:
            x = x + min(4, 52 / len(here)) * (here.index(method) - (len(here) - 1) / 2)
        axes.plot(x, y, label=method, markersize=3.5, linewidth=1.2, **style)
        sd = scale * own[f"{metric}_sd"].fillna(0.0).to_numpy()
        axes.errorbar(x, y, yerr=sd, fmt="none", ecolor=style["color"], elinewidth=0.8, capsize=1.5, alpha=0.7)
        low, high = (scale * own[f"{metric}_{end}"].to_numpy() for end in ("low", "high"))
        if len(own) > 1:
            axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
        else:
            axes.vlines(x, low, high, color=style["color"], alpha=0.25, linewidth=5)
    if alone:
        axes.set_xlim(100 * shares[1] - 30, 100 * shares[1] + 30)
    plain(axes, 8)
    _share_ticks(axes, shares, 8, most=11)


def _share_ticks(axes: Axes, shares: Sequence[float], size: int, most: int) -> None:
    """Ticks at the shares themselves, where they are few and far enough apart; only above 0 if there is but one."""
    shown = shares[1:] if len(shares) == 2 else shares
    gaps = np.diff(shown) / max(shown[-1], 1e-9)
    if len(shown) <= most and (gaps > 0.075).all():
        axes.set_xticks([100 * share for share in shown], [f"{100 * share:.3g}" for share in shown], fontsize=size)


def _maps(results: "Results", damage: pd.DataFrame, names: Sequence[str], label: str) -> Figure:
    methods, heads = results.methods, 1 + int(damage["head"].max())
    across = min(_ACROSS, len(methods))
    lines = -(-len(methods) // across)
    panel_width = max(1.5, 0.6 + 0.17 * heads)
    titles = [textwrap.fill(method, int(panel_width / 0.08)) for method in methods]
    width = across * panel_width + 1.2 + _CHARACTER * max(map(len, names))
    above = 0.5 + 0.15 * max(name.count("\n") for name in titles)
    figure = blank(width, 1.2 + lines * (above + max(1.2, 0.17 * len(names))))
    panels = figure.subplots(lines, across, sharey=True, sharex=True, squeeze=False).ravel()
    largest = damage["value"].abs().max() or 1.0
    for panel, method, name in zip(panels, methods, titles, strict=False):
        own = damage[(damage["method"] == method) & damage["head"].notna()]
        rows, columns = own["part"].map(results.parts.index).to_numpy(), own["head"].astype(int).to_numpy()
        values = np.full((len(names), heads), np.nan)
        values[rows, columns] = own["value"].to_numpy()
        image = panel.imshow(values, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
        told = ((own["low"] > 0) | (own["high"] < 0)).to_numpy()
        panel.plot(columns[told], rows[told], "o", markersize=2.5, color="white", mec="black", mew=0.5)
        panel.set_title(name, fontsize=9)
        ticks = range(0, heads, 1 + (heads - 1) // 16)
        panel.set_xticks(ticks, list(map(str, ticks)), fontsize=8)
        panel.set_yticks(range(len(names)), names, fontsize=8)
    for panel in panels[len(methods) :]:
        panel.set_visible(False)
    figure.supxlabel("head", fontsize=9)
    figure.supylabel(_kind(names), fontsize=9)
    scale = figure.colorbar(image, ax=list(panels))
    scale.set_label(label, fontsize=9)
    scale.ax.tick_params(labelsize=8)
    said = [_title(results, 999)]
    if damage["low"].notna().any():
        said.append("dot: the 95% interval leaves out 0")
    figure.suptitle("\n".join(textwrap.fill(line, int(13 * width)) for line in said), fontsize=9)
    return figure


def _kind(names: Sequence[str]) -> str:
    return "layer" if all(name.isdigit() for name in names) else "site"


def short(parts: Sequence[str]) -> list[str]:
    """The names without what all of them begin or end with, cut at the dots."""
    names = [part.split(".") for part in parts]
    for end in (0, -1):
        while all(len(name) > 1 for name in names) and len({name[end] for name in names}) == 1:
            names = [name[1:] if end == 0 else name[:-1] for name in names]
    return [".".join(name) for name in names]
