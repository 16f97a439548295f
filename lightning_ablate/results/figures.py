"""The figures of results: curves by ablated share, paired differences, and the effect of each site, layer or head."""

import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from lightning_ablate.attribution import FOUND_AT
from lightning_ablate.files import write_whole
from lightning_ablate.results.frames import BASELINE
from lightning_ablate.results.styles import styles
from lightning_ablate.results.table import Scores, q_name
from lightning_ablate.results.text import CHANCE, harm, neighbours, short, title

ZERO: dict[str, Any] = {"color": "0.35", "linewidth": 0.9, "linestyle": (0, (5, 2))}
_CHANCE: dict[str, Any] = ZERO | {"linestyle": (0, (1, 1.5))}


def degradation(*targets: Scores) -> Figure:
    """Top-1 accuracy, cross-entropy and the user's own metrics by ablated share: one column per target.

    Bands are 95% intervals over clusters. Bars are ± 1 standard deviation over the seeds. Chance is drawn where it is
    among the curves, and said elsewhere.
    """
    methods = list(dict.fromkeys(method for one in targets for method in one.methods))
    own = list(dict.fromkeys(metric for one in targets for metric in one.own))
    columns = len(targets) * (2 if max(map(len, methods), default=0) <= 20 else 1)
    figure = blank(0.4 + 3.1 * len(targets), 4.6 + 2 * len(own) + 0.17 * -(-(len(methods) + 2) // columns))
    axes = figure.subplots(2 + len(own), len(targets), sharex="col", squeeze=False)
    handles: dict[str, Any] = {}
    seeds = bands = 0
    for column, one in zip(axes.T, targets, strict=True):
        summary, classes = one.summary(), one.facts.get("classes")
        seeds, bands = max(seeds, summary["seeds"].max()), bands + summary["cross_entropy_low"].notna().sum()
        chance = {"top1": 1 / classes, "cross_entropy": math.log(classes)} if classes else {}
        for panel, metric in zip(column, ("top1", "cross_entropy", *own), strict=True):
            scale = 100 if metric == "top1" else 1
            if metric not in one.metrics:
                continue
            _curves(panel, summary, methods, metric, scale)
            panel.axhline(scale * one.baseline[metric], **ZERO, label="nothing ablated")
            if metric in chance:
                _chance(panel, scale * chance[metric], "%" if metric == "top1" else " nats")
            handles |= {name: handle for handle, name in zip(*panel.get_legend_handles_labels(), strict=True)}
        column[-1].set_xlabel("neurons ablated (%)", fontsize=9)
        column[0].set_title(_title(one, 40), fontsize=9)
    for panel, label in zip(axes[:, 0], ("top-1 accuracy (%)", "cross-entropy (nats)", *own), strict=True):
        panel.set_ylabel(label, fontsize=9)
    names = [name for name in (*methods, "nothing ablated", "chance") if name in handles]
    kinds = " or ".join(dict.fromkeys(one.interval for one in targets))
    said = [f"band: {kinds}"] * bool(bands) + [f"bar: ± sd over {seeds} seeds"] * bool(seeds > 1)
    shown = [handles[name] for name in names], names
    _legend(figure, columns, "; ".join(said), *shown)
    return figure


def differences(scores: Scores) -> Figure:
    """What one method loses more than another by ablated share, with 95% intervals: for each metric a panel per pair.

    ``scores`` are of two or more methods, which ablated some shares in common.
    """
    compared = neighbours(scores, scores.compare())
    pairs = list(dict.fromkeys(zip(compared["method"], compared["other"], strict=True)))
    titles = [textwrap.fill(f"{one} − {other}", 32) for one, other in pairs]
    height, across = 1.7 + 0.13 * max(name.count("\n") for name in titles), min(3, len(pairs))
    metrics, size = ("top1", "cross_entropy", *scores.own), across * -(-len(pairs) // across)
    figure, panels = grid(len(metrics) * size, across, (2.2, height), (1.2, 1.0), sharex=True)
    for start, metric in zip(range(0, len(panels), size), metrics, strict=True):
        label, scale, _ = harm(metric)
        for place, (panel, pair, name) in enumerate(zip(panels[start : start + size], pairs, titles, strict=False)):
            if place:
                panel.sharey(panels[start])
            own = compared[(compared["method"] == pair[0]) & (compared["other"] == pair[1])]
            x, y, *ends = own[["ablated", metric, f"{metric}_low", f"{metric}_high"]].to_numpy().T
            low, high = np.sort(scale * np.stack(ends), axis=0)
            bars, line = np.clip([scale * y - low, high - scale * y], 0, None), "o-" if len(own) > 1 else "o"
            panel.errorbar(100 * x, scale * y, yerr=bars, fmt=line, color="0.15", markersize=3, linewidth=1)
            panel.axhline(0, **ZERO)
            panel.set_title(name, fontsize=8)
            plain(panel, 7)
            panel.tick_params(labelbottom=place >= len(pairs) - across, labelleft=place % across == 0)
            if place % across == 0:
                panel.set_ylabel(label, fontsize=8)
        for unused in panels[start + len(pairs) : start + size]:
            unused.remove()
    _share_ticks(panels[0], compared["ablated"], most=6)
    figure.suptitle(_title(scores, int(13 * figure.get_figwidth())), fontsize=9)
    said = f"neurons ablated (%); bars: {scores.interval}s; above 0 the first method loses more"
    figure.supxlabel(said, fontsize=8)
    return figure


def importance(scores: Scores, metric: str = "cross_entropy") -> Figure:
    """What ablating one part alone does to the ``metric``: a map of heads per method, or a line of layers or sites.

    More is worse. A dot marks a head whose q is at most 0.05; a band around a line is the 95% interval.
    """
    renamed = {metric: "value", f"{metric}_low": "low", f"{metric}_high": "high", q_name(metric): "q"}
    damage = scores.compare(other=BASELINE)[["method", "part", "head", *renamed]].rename(columns=renamed)
    damage["row"] = damage["part"].map(scores.parts.index)
    label, scale, _ = harm(metric)
    damage["value"] *= scale
    damage[["low", "high"]] = np.sort(scale * damage[["low", "high"]].to_numpy(), axis=1)
    names = short(scores.parts)
    kind = kind_of(names)
    if damage["head"].notna().any():
        return _maps(scores, damage, names, kind, label)
    columns = max(1, min(3, 66 // (6 + max(map(len, scores.methods)))))
    below = 0.2 + 0.055 * max(map(len, names)) + 0.17 * -(-len(scores.methods) // columns)
    figure = blank(max(5.0, 1.0 + 0.2 * len(names)), 3.0 + below)
    axes = figure.subplots()
    for method, style in styles(scores.methods).items():
        x, y, low, high = damage.loc[damage["method"] == method, ["row", "value", "low", "high"]].to_numpy().T
        axes.plot(x, y, label=method, **style)
        axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axes.axhline(0, **ZERO)
    axes.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 3 else 0)
    axes.set_xlabel(kind, fontsize=9)
    axes.set_ylabel(label, fontsize=9)
    plain(axes, 8)
    _legend(figure, columns, f"band: {scores.interval}" if damage["low"].notna().any() else "")
    figure.suptitle(_title(scores, 70), fontsize=9)
    return figure


def kind_of(names: Sequence[str]) -> str:
    """What an axis of shortened names of sites holds: ``layer`` if all are numbers, ``site`` otherwise."""
    return "layer" if all(name.isdigit() for name in names) else "site"


def color_range(values: pd.Series) -> tuple[float, str]:
    """Where the colours of maps end, and what must be said of values beyond; ``values`` are of all maps of a model.

    The colours end before the 2% of largest values, and at least one, if the largest is more than twice as large.
    """
    sizes = np.sort(values.abs().dropna())[::-1]
    largest, inner = (sizes[min(place, len(sizes) - 1)] if len(sizes) else 0.0 for place in (0, 1 + len(sizes) // 50))
    if 0 < 2 * inner < largest:
        return inner, f"darkest: {(sizes > inner).sum()} beyond ±{inner:.2g}, up to {largest:.2g}"
    return largest or 1.0, ""


def head_map(axes: Axes, heads: pd.DataFrame, names: Sequence[str], largest: float, size: int) -> AxesImage:
    """Draws a square per head, red where ablating it does damage, with a dot where that is known from 0.

    ``heads`` has the columns row (index of the site in ``names``), head, value and known; ``size`` is in points.
    """
    values = np.full((len(names), 1 + int(heads["head"].max())), np.nan)
    values[heads["row"], heads["head"].astype(int)] = heads["value"]
    image = axes.imshow(values, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto", interpolation="nearest")
    known = heads[heads["known"]]
    axes.plot(known["head"], known["row"], "o", ms=min(2.5, 40 / len(names)), color="white", mec="black", mew=0.4)
    axes.set_xticks(range(0, values.shape[1], 1 + (values.shape[1] - 1) // 16))
    step = 1 + (len(names) - 1) // 32
    axes.set_yticks(range(0, len(names), step), names[::step])
    axes.tick_params(labelsize=size)
    return image


def drawn(picture: Callable[[], Figure], form: str = "png") -> bytes:
    """The content of a figure's file: ``png`` with 300 dots per inch, ``pdf`` or ``svg``; the same bytes each time."""
    buffer = io.BytesIO()
    dated = {"png": "Software", "pdf": "CreationDate", "svg": "Date"}[form]
    picture().savefig(buffer, format=form, dpi=300, metadata={dated: None})
    return buffer.getvalue()


def write(folder: Path, pictures: Mapping[str, Callable[[], Figure]], forms: Sequence[str]) -> list[Path]:
    """Draws each picture and writes it into the folder in each form (``png``, ``pdf``, ``svg``); returns the paths."""
    paths = []
    for (name, picture), form in product(pictures.items(), forms):
        paths.append(folder / f"{name}.{form}")
        write_whole(paths[-1], drawn(picture, form))
    return paths


def blank(width: float, height: float) -> Figure:
    """An empty figure, width and height in inches, which needs no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure._repr_png_ = partial(drawn, lambda: figure)  # type: ignore[attr-defined]  # notebooks show it so
    return figure


def grid(
    count: int, across: int, panel: tuple[float, float], margin: tuple[float, float], **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` panels, at most ``across`` in a row; panel and margin are width and height in inches."""
    across = min(across, count)
    lines = -(-count // across)
    figure = blank(margin[0] + across * panel[0], margin[1] + lines * panel[1])
    panels = figure.subplots(lines, across, squeeze=False, **options).ravel()
    for unused in panels[count:]:
        unused.remove()
    return figure, list(panels[:count])


def plain(axes: Axes, size: int) -> None:
    """Sets the size of ticks, draws a grid, and removes the frame above and at the right."""
    axes.tick_params(labelsize=size)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, columns: int, said: str, *shown: Any) -> None:
    """Puts the legend below the figure, under a line on what else is drawn."""
    options: Any = {"ncols": columns, "fontsize": 8, "title": said or None, "title_fontsize": 8, "frameon": False}
    figure.legend(*shown, loc="outside lower center", **options)


def _chance(axes: Axes, value: float, unit: str) -> None:
    """Draws a line where it doesn't squash the curves, or says where it would be."""
    low, high = axes.get_ylim()
    if low <= value <= high:
        axes.axhline(value, **_CHANCE, label="chance")
    else:
        end, arrow = ("bottom", "↓") if value < low else ("top", "↑")
        place: Any = {"va": end, "fontsize": 8, "color": _CHANCE["color"], "transform": axes.transAxes}
        axes.text(0.02, 0.02 if value < low else 0.98, f"{arrow} chance: {value:.3g}{unit}", **place)


def _title(scores: Scores, width: int) -> str:
    return textwrap.fill(title(scores) + (" (partial run)" if scores.partial else ""), width)


def _curves(axes: Axes, summary: pd.DataFrame, methods: Sequence[str], metric: str, scale: float) -> None:
    """Draws a curve per method, from the baseline on."""
    columns = ["ablated", metric, f"{metric}_low", f"{metric}_high", f"{metric}_sd"]
    for method, style in styles(methods).items():
        own = summary.loc[summary["method"].isin([BASELINE, method]), columns]
        if len(own) > 1:
            x, y, low, high, sd = own.to_numpy().T * np.array([[100], *[[scale]] * 4])
            axes.plot(x, y, label=method, **style)
            axes.errorbar(x, y, yerr=sd, fmt="none", ecolor=style["color"], elinewidth=0.8, capsize=1.5, alpha=0.7)
            axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    plain(axes, 8)
    _share_ticks(axes, summary["ablated"], most=11)


def _share_ticks(axes: Axes, ablated: pd.Series, most: int) -> None:
    """Puts ticks at the shares themselves, if they are few and far apart."""
    shares = np.array(sorted({0.0, *ablated}))
    if len(shares) <= most and (np.diff(shares) > 0.075 * shares[-1]).all():
        axes.set_xticks(100 * shares, [f"{round(100 * one, 0 if one > 0.095 else 1):g}" for one in shares])


def _maps(scores: Scores, damage: pd.DataFrame, names: Sequence[str], kind: str, label: str) -> Figure:
    """One map of heads per method, with one scale of colours."""
    methods, damage = scores.methods, damage[damage["head"].notna()]
    damage = damage.assign(known=damage["q"] <= FOUND_AT)
    width = max(1.5, 0.6 + 0.17 * (1 + int(damage["head"].max())))
    titles = [textwrap.fill(method, int(width / 0.08)) for method in methods]
    height = 0.5 + 0.15 * max(name.count("\n") for name in titles) + max(1.2, 0.17 * len(names))
    margin = 1.2 + 0.065 * max(map(len, names)), 1.2
    figure, panels = grid(len(methods), 4, (width, height), margin, sharex=True, sharey=True)
    largest, beyond = color_range(damage["value"])
    for panel, method, name in zip(panels, methods, titles, strict=True):
        image = head_map(panel, damage[damage["method"] == method], names, largest, 8)
        panel.set_title(name, fontsize=9)
    figure.supxlabel("head", fontsize=9)
    figure.supylabel(kind, fontsize=9)
    scale = figure.colorbar(image, ax=panels, extend="both" if beyond else "neither")
    scale.set_label(label, fontsize=9)
    scale.ax.tick_params(labelsize=8)
    said = [f"dot: differs from 0 ({CHANCE})"] * bool(damage["q"].notna().any()) + [beyond] * bool(beyond)
    figure.suptitle("\n".join([_title(scores, int(13 * figure.get_figwidth())), *said]), fontsize=9)
    return figure
