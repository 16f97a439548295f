"""What the calibration found out about each neuron: a table, and histograms of the least normal neurons."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lightning_ablate.calibration import Calibration
from lightning_ablate.files import write_whole
from lightning_ablate.results import figures
from lightning_ablate.results.styles import styles
from lightning_ablate.results.text import short
from lightning_ablate.statistics import Histogram, Moments, SiteStatistics

_SHOWN = 8  # histograms in the figure
_BINS = 125  # of each
_LINES = ("mean", "peak", "mode")  # in the colours of these methods


def save(calibration: Calibration, title: str, folder: Path, forms: Sequence[str] = ("png",)) -> pd.DataFrame:
    """Writes neurons.parquet and, if there are histograms, neurons.png (``forms``); returns the table.

    It has one row per neuron, in the order of the sites; README.md describes its columns. The calibration must still
    hold its histograms.
    """
    sites = calibration.sites
    table = pd.concat([_described(site.name, calibration[site]) for site in sites], ignore_index=True)
    table["site"] = pd.Categorical(table["site"], [site.name for site in sites])
    write_whole(folder / "neurons.parquet", table.to_parquet(index=False))
    figures.write(folder, {"neurons": lambda: plot(table, calibration, title)} if "peak" in table else {}, forms)
    return table


def plot(table: pd.DataFrame, calibration: Calibration, title: str) -> Figure:
    """Histograms of the neurons farthest from a normal distribution, by the statistic of Jarque & Bera (1980)."""
    distance = table["skewness"] ** 2 / 6 + table["excess_kurtosis"] ** 2 / 24
    shown, names = table.loc[distance.nlargest(_SHOWN).index], short(table["site"].cat.categories)
    prefix = "layer " if figures.kind_of(names) == "layer" else ""
    figure, panels = figures.grid(len(shown), 4, (2.25, 2.0), (0.0, 0.5))
    for axes, (row, neuron) in zip(panels, shown.iterrows(), strict=True):
        site = table["site"].cat.codes[row]
        counts = calibration[calibration.sites[site]][Histogram].counts[neuron["neuron"]].cpu().numpy()
        edges = np.linspace(neuron["minimum"], neuron["maximum"], _BINS + 1)
        axes.stairs(counts.reshape(_BINS, -1).sum(1), edges, fill=True, color="0.7")
        for name, style in styles(_LINES).items():
            axes.axvline(neuron[name], **style | {"marker": ""}, label=name)
        axes.set_yscale("log")
        axes.minorticks_off()  # they take long to draw
        shape = f"skewness {neuron['skewness']:.2f}, kurtosis {neuron['excess_kurtosis']:.1f}"
        unit = calibration.sites[site].neuron(neuron["neuron"])
        axes.set_title(f"{prefix}{names[site]}, {unit}\n{shape}", fontsize=8)
        figures.plain(axes, 7)
    figure.suptitle(f"{title}: the least normal neurons (positions per bin, logarithmic)", fontsize=9)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _described(site: str, statistics: SiteStatistics) -> pd.DataFrame:
    """One row per neuron of a site."""
    moments = statistics[Moments]
    columns: dict[str, Any] = {
        "positions": moments.count.expand(moments.neurons),
        "mean": moments.mean,
        "sd": moments.sd,
        "skewness": moments.skewness,
    }
    columns |= {"excess_kurtosis": moments.kurtosis, "minimum": moments.low, "maximum": moments.high}
    if Histogram in statistics:
        centres = statistics[Histogram].centres
        columns["zeros"] = statistics[Histogram].zeros.double() / moments.count
        columns |= {name: getattr(centres, name) for name in ("peak", "mode", "median", "half_sample_mode")}
        columns |= {"abs_mean_minus_peak": (moments.mean - centres.peak).abs(), "abs_peak": centres.peak.abs()}
    found = {name: column.cpu().numpy() for name, column in columns.items()}
    return pd.DataFrame({"site": site, "neuron": np.arange(moments.neurons), **found})
