"""What the attribution found out: lines for the terminal, tables of neurons and heads, and a figure."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_ablate.attribution import GROUP, trust
from lightning_ablate.results.figures import blank, drawn, plain, short
from lightning_ablate.results.folder import write_whole

_SHOWN = 5  # units of a method
_COLUMNS = ("first", "second", "estimate", "se", "picked", "verified", "verified_se", "calibrated")
_COLOR = {"neuron": "#0072B2", "head": "#D55E00"}


def lines(table: pd.DataFrame) -> str:
    """The units that are worth most under each method, how many are below the noise, and how far it can be trusted."""
    found = [
        f"what units are worth alone, {table.attrs.get('of', 'nats')} per scored position: estimate ± standard error"
    ]
    for (method, level, kind), own in table[table["level"] != "site"].groupby(GROUP, sort=False):
        noise = int((own["estimate"].abs() < 2 * own["se"]).sum())
        found.append(f"{method}, {len(own):,} {level}s ({kind}), {noise:,} of them within 2 standard errors of 0")
        for _, row in own.nlargest(_SHOWN, "estimate").iterrows():
            digits = 4 if not 0 < row["se"] < 0.001 else 1 - math.floor(math.log10(row["se"]))  # two of the error's
            measured = "" if pd.isna(row.get("verified")) else f", verified {row['verified']:+.{digits}f}"
            place = f"{row['site']} {level} {row['unit']}"
            found.append(f"  {place}: {row['estimate']:+.{digits}f} ± {row['se']:.{digits}f}{measured}")
    trusted = trust(table) if "verified" in table else pd.DataFrame()
    if len(trusted):
        shown = trusted.set_index(GROUP)
        cells = {"units": shown["units"]}
        for name in ("pearson", "spearman", "slope", "scale"):
            ends = zip(shown[name], shown[f"{name}_low"], shown[f"{name}_high"], strict=True)
            cells[name] = ["-" if np.isnan(one) else f"{one:.2f} [{low:.2f}, {high:.2f}]" for one, low, high in ends]
        cells |= {"recall": shown["recall"].round(2), "missed": shown["missed"].round(4)}
        found += ["", "estimates against the truth", pd.DataFrame(cells).to_string()]
    return "\n".join(found)


def wide(table: pd.DataFrame, level: str) -> pd.DataFrame:
    """The units of a level, a row each, with columns like ``mean_estimate`` of every method."""
    own = table[table["level"] == level].rename(columns={"unit": level})
    names = [name for name in _COLUMNS if name in own]
    by_method = own.set_index(["site", level]).groupby("method", sort=False)[names]
    return pd.concat([of.add_prefix(f"{method}_") for method, of in by_method], axis=1).reset_index()


def save(table: pd.DataFrame, folder: Path, forms: Sequence[str]) -> None:
    """Adds columns to neurons.parquet, and writes heads.parquet and the figure."""
    neurons = folder / "neurons.parquet"
    known = pd.read_parquet(neurons)
    found = wide(table, "neuron").astype({"site": known["site"].dtype})
    known = known[[name for name in known if name not in found or name in ("site", "neuron")]]
    write_whole(neurons, known.merge(found, how="left", on=["site", "neuron"]).to_parquet(index=False))
    if (table["level"] == "head").any():
        write_whole(folder / "heads.parquet", wide(table, "head").to_parquet(index=False))
    for form in forms:
        write_whole(folder / f"attribution.{form}", drawn(lambda: plot(table), form))


def plot(table: pd.DataFrame) -> Figure:
    """A row a method: a map of the heads, the neurons by site, and estimates against what was measured."""
    methods, of = list(table["method"].unique()), table.attrs.get("of", "nats")
    sites = list(table["site"].unique())
    heads, verified = table[table["level"] == "head"], "verified" in table
    columns = [width for width, wanted in ((1.4, len(heads)), (1.6, True), (1.3, verified)) if wanted]
    tall = max(2.6, min(9.0, 0.8 + 0.16 * len(sites)))
    figure = blank(3.1 * sum(columns), 0.5 + tall * len(methods))
    grid = figure.subplots(len(methods), len(columns), squeeze=False, width_ratios=columns)
    for row, method in zip(grid, methods, strict=True):
        panels, own = iter(row), table[table["method"] == method]
        if len(heads):
            _map(next(panels), own[own["level"] == "head"], sites, figure, of)
        _neurons(next(panels), own[own["level"] == "neuron"], sites, of)
        if verified:
            _truth(next(panels), own.dropna(subset="verified"), of)
        row[0].set_ylabel(f"{method}\n\n{row[0].get_ylabel()}", fontsize=9)
    return figure


def _map(axes: Axes, heads: pd.DataFrame, sites: Sequence[str], figure: Figure, of: str) -> None:
    values = np.full((len(sites), 1 + heads["unit"].max()), np.nan)
    values[heads["site"].map(list(sites).index), heads["unit"]] = heads["estimate"]
    largest = np.nanmax(np.abs(values)) or 1.0
    image = axes.imshow(values, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto", interpolation="nearest")
    told = heads[heads["estimate"].abs() > 2 * heads["se"]]
    size = min(2.5, 40 / len(sites))
    axes.plot(told["unit"], told["site"].map(list(sites).index), "o", ms=size, color="white", mec="black", mew=0.4)
    _site_ticks(axes.yaxis, sites)
    axes.set_title("heads (dot: beyond 2 se)", fontsize=8)
    axes.set_xlabel("head", fontsize=8)
    axes.set_xticks(range(0, values.shape[1], 1 + (values.shape[1] - 1) // 16))
    scale = figure.colorbar(image, ax=axes)
    scale.ax.tick_params(labelsize=7)
    scale.set_label(of, fontsize=8)
    axes.tick_params(labelsize=7)


def _neurons(axes: Axes, neurons: pd.DataFrame, sites: Sequence[str], of: str) -> None:
    """Their distribution in each site: the median, the quartiles, 5% to 95%, and the largest as a dot."""
    by_site = neurons.groupby("site", sort=False)["estimate"]
    lowest, low, middle, high, highest = (by_site.quantile(q).to_numpy() for q in (0.05, 0.25, 0.5, 0.75, 0.95))
    places, thick = np.arange(len(middle)), min(7.0, 100 / len(middle))
    axes.hlines(places, lowest, highest, color="#0072B2", linewidth=min(1.0, thick / 3))
    axes.hlines(places, low, high, color="#56B4E9", linewidth=thick)
    axes.plot(middle, places, color="black", marker="|", markersize=thick, linestyle="none")
    axes.plot(by_site.max().to_numpy(), places, ".", color="#D55E00", markersize=min(4.0, 1 + 60 / len(places)))
    axes.set_xscale("symlog", linthresh=max(1e-9, float(np.median(np.abs(neurons["estimate"])))))
    axes.axvline(0, color="0.35", linewidth=0.8, linestyle=(0, (5, 2)))
    axes.set_ylim(len(places) - 0.5, -0.5)
    _site_ticks(axes.yaxis, sites)
    axes.set_title("neurons by site (quartiles, 5% to 95%, largest)", fontsize=8)
    axes.set_xlabel(f"estimate ({of})", fontsize=8)
    plain(axes, 7)
    axes.minorticks_off()
    ticks = [tick for tick in axes.get_xticks() if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
    axes.set_xticks(ticks[:: max(1, len(ticks) // 4)])


def _truth(axes: Axes, verified: pd.DataFrame, of: str) -> None:
    for (level, how), own in verified.groupby(["level", "picked"], sort=False):
        face = _COLOR[level] if how == "largest" else "none"
        style: dict[str, Any] = {"color": _COLOR[level], "mfc": face, "ms": 3.5, "mew": 0.8}
        errors: dict[str, Any] = {"xerr": 2 * own["se"], "yerr": 2 * own["verified_se"], "elinewidth": 0.5}
        axes.errorbar(own["estimate"], own["verified"], fmt="o", label=f"{level}s, {how}", **errors, **style)
    scale = float(np.median(verified["verified"].abs())) or 1e-9
    for set_scale in (axes.set_xscale, axes.set_yscale):
        set_scale("symlog", linthresh=scale)
    both = verified[["estimate", "verified"]]
    ends = [both.min().min(), both.max().max()]
    axes.plot(ends, ends, color="0.35", linewidth=0.9, linestyle=(0, (5, 2)))
    room = 0.3 * max(map(abs, ends))
    axes.set_title("estimate against truth (2 se)", fontsize=8)
    axes.set_xlabel(f"estimate ({of})", fontsize=8)
    axes.set_ylabel(f"verified ({of})", fontsize=8)
    plain(axes, 7)
    axes.minorticks_off()
    for axis in (axes.xaxis, axes.yaxis):
        ticks = axis.get_majorticklocs()
        axis.set_ticks(ticks[:: max(1, len(ticks) // 4)])
    axes.set_xlim(ends[0] - scale, ends[1] + room)
    axes.set_ylim(ends[0] - scale, ends[1] + room)
    axes.legend(fontsize=6, frameon=False)


def _site_ticks(axis: Any, sites: Sequence[str]) -> None:
    step = 1 + (len(sites) - 1) // 32
    axis.set_ticks(range(0, len(sites), step), short(sites)[::step])
