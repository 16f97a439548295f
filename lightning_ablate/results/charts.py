"""The charts of the page, as plotly's JSON: curves, maps of units, and what a unit does."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import pandas as pd

from lightning_ablate.results.evidence import HARM, HELP
from lightning_ablate.results.figures import kind_of
from lightning_ablate.results.frames import BASELINE
from lightning_ablate.results.table import Scores
from lightning_ablate.results.text import short

Chart = dict[str, Any]
_DASHES = ("solid", "dash", "dashdot", "dot")
_INTERVAL = " [%{customdata[0]:.4g}, %{customdata[1]:.4g}]"  # on hover
_GREY, _NOTHING = "#888888", "rgba(128, 128, 128, 0.08)"
_BINS = 40  # of a distribution


def metrics(scores: Scores) -> dict[str, tuple[str, int]]:
    """The metrics that are shown: their labels, and what they are multiplied with."""
    shown = {"cross_entropy": ("cross-entropy, nats", 1), "top1": ("top-1 accuracy, %", 100)}
    return shown | {metric: (metric, 1) for metric in scores.own}


def curves(scores: Scores, colours: Mapping[str, str]) -> dict[str, Chart]:
    """A chart of each metric by the share ablated; none where parts were ablated alone."""
    if scores.parts or not scores.methods:
        return {}
    summary, classes, found = scores.summary(), scores.facts.get("classes"), dict[str, Chart]()
    chances = {"top1": 100 / classes, "cross_entropy": math.log(classes)} if classes else {}
    for metric, (label, scale) in metrics(scores).items():
        ends = [f"{metric}_low", f"{metric}_high"]
        traces = [_flat("nothing ablated", scale * scores.baseline[metric], summary, "dash")]
        if chances.get(metric, math.inf) < 1.3 * scale * summary[metric].max():  # beyond, it would flatten the curves
            traces.append(_flat("chance", chances[metric], summary, "dot"))
        for number, method in enumerate(scores.methods):
            own = summary[summary["method"].isin([BASELINE, method])]
            trace = {"x": 100 * own["ablated"], "y": scale * own[metric], "customdata": scale * own[ends].to_numpy()}
            hover = "%{y:.4g}" + ("" if own[ends].isna().all(axis=None) else _INTERVAL)
            style = {"line": {"color": colours[method], "dash": _DASHES[number % 4]}, "marker": {"symbol": number}}
            about = {"name": _text(method), "method": method, "showlegend": False, "hovertemplate": hover}
            traces.append({**trace, **style, **about})
        found[label] = _chart(traces, _axis("neurons ablated, %"), _axis(label), hovermode="x unified")
    return found


def unit_map(worths: pd.DataFrame, explained: Sequence[str], higher_is_better: bool) -> Chart:
    """A square for each head, with a dot where it is explained; a bar for each layer or site where there are no heads.

    ``worths`` are of one method, and known in one way, see :func:`~lightning_ablate.results.panels.worth`.
    """
    harm, help_ = (f"rgb{colour}" for colour in ((HELP, HARM) if higher_is_better else (HARM, HELP)))
    heads = worths[worths["level"] == "head"]
    own = heads if len(heads) else worths
    sites, ends = own["site"].unique().tolist(), ["low", "high"]
    names, interval = list(map(_text, short(sites))), "" if own[ends].isna().all(axis=None) else _INTERVAL
    hover = {"sites": sites, "hovertemplate": "%{y} head %{x}: %{z:.4g}" + interval + "<extra></extra>"}
    if heads.empty:
        value, hover["hovertemplate"] = own["value"], "%{x}: %{y:.4g}" + interval + "<extra></extra>"
        bars = {"type": "bar", "x": names, "y": value, "customdata": own[ends].to_numpy()} | hover
        bars["marker"] = {"color": np.where(value > 0, harm, help_).tolist()}
        bars["error_y"] = {"array": own["high"] - value, "arrayminus": value - own["low"], "thickness": 1}
        return _chart(
            [bars], _axis(kind_of(names), type="category"), _axis("change" if higher_is_better else "added nats")
        )
    rows, columns = own["site"].map(sites.index), own["index"].astype(int)
    grid = np.full((len(sites), columns.max() + 1, 3), np.nan)
    grid[rows, columns] = own[["value", *ends]]
    largest = np.nanquantile(np.abs(grid[..., 0]), 0.99) or 1.0
    squares = {"type": "heatmap", "z": grid[..., 0], "customdata": grid[..., 1:], "y": names, "xgap": 1, "ygap": 1}
    squares |= {"zmin": -largest, "zmax": largest, "colorscale": [[0, help_], [0.5, _NOTHING], [1, harm]]} | hover
    known = own["unit"].isin(explained)
    dots = {"mode": "markers", "x": columns[known], "y": [names[row] for row in rows[known]], "hoverinfo": "skip"}
    dots["marker"] = {"color": "#ffffff", "size": 6, "line": {"color": "#111111", "width": 1}}
    across = _axis("head", dtick=1 + columns.max() // 16, zeroline=False, showgrid=False)
    down = _axis(kind_of(names), type="category", autorange="reversed", showgrid=False)
    return _chart([squares, dots], across, down, height=130 + max(120, 22 * len(sites)))


def disagreement(changes: pd.DataFrame, texts: Sequence[str], colours: Mapping[str, str]) -> Chart:
    """What each method, a column of ``changes``, adds at some positions, which ``texts`` name."""
    places = [f"{number}. {_text(text[:16])}" for number, text in enumerate(texts, 1)]
    dots = [
        {"name": _text(method), "x": added, "y": places, "mode": "markers", "marker": {"color": colours[method]}}
        for method, added in changes.items()
    ]
    down = _axis("", type="category", autorange="reversed")
    return _chart(dots, _axis("added nats"), down, height=120 + 24 * len(places))


def distribution(values: pd.Series, marks: Mapping[str, float]) -> Chart:
    """A histogram of activations, with lines at the ``marks``."""
    counts, edges = np.histogram(values, _BINS)
    bars = {"type": "bar", "x": (edges[1:] + edges[:-1]) / 2, "y": counts, "name": "positions"}
    lines = [
        {"mode": "lines", "name": f"{mark} {at:.3g}", "x": [at, at], "y": [0.7, counts.max()], "line": {"dash": dash}}
        for (mark, at), dash in zip(marks.items(), _DASHES, strict=False)
    ]
    traces = [bars | {"marker": {"color": _GREY}}, *lines]
    return _chart(traces, _axis("activation"), _axis("positions", type="log"), bargap=0, showlegend=bool(marks))


def _chart(traces: Sequence[Chart], xaxis: Chart, yaxis: Chart, **layout: Any) -> Chart:
    return {"data": traces, "layout": {"xaxis": xaxis, "yaxis": yaxis, **layout}}


def _axis(title: str, **options: Any) -> Chart:
    return {"title": {"text": _text(title)}, **options}


def _flat(name: str, height: float, summary: pd.DataFrame, dash: str) -> Chart:
    line = {"color": _GREY, "width": 1, "dash": dash}
    return {"name": name, "x": [0, 100 * summary["ablated"].max()], "y": [height] * 2, "mode": "lines", "line": line}


def _text(text: str) -> str:
    """The text as plotly, which takes some HTML, shows it unchanged."""
    return escape(text, quote=False)
