"""What the calibration found out about each neuron: a table, and histograms of the least normal neurons."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_ablate.calibration import Calibration
from lightning_ablate.results import figures
from lightning_ablate.results.folder import base_name, write_whole
from lightning_ablate.results.text import short
from lightning_ablate.statistics import Histogram, Moments, SiteStatistics

_SHOWN = 8  # histograms in the figure
_BINS = 125  # of each
_LINES = {"mean": ("#0072B2", "--"), "peak": ("#009E73", "-."), "mode": ("#CC79A7", ":")}


class Neurons:
    """The neurons of all sites, in the order of the sites.

    Args:
        table: one row per neuron. Columns: site (name), neuron (index in the site), mean, sd, skewness,
            excess_kurtosis, minimum, maximum. After a second calibration epoch also zeros (share of exact zeros), peak
            (the paper's), mode, median, half_sample_mode, abs_mean_minus_peak and abs_peak.
        histograms: row of the table → counts ``(bins,)`` int64 of equal bins from minimum to maximum.
        title: names of the model and of the data.
    """

    def __init__(self, table: pd.DataFrame, histograms: dict[int, np.ndarray], title: str) -> None:
        self.table, self.histograms, self.title = table, histograms, title

    @classmethod
    def of(cls, calibration: Calibration, model: str, data: str) -> Self:
        """The neurons of a calibration that still holds its histograms."""
        sites = calibration.sites
        table = pd.concat([_described(site.name, calibration[site]) for site in sites], ignore_index=True)
        table["site"] = pd.Categorical(table["site"], [site.name for site in sites])
        made = cls(table, {}, f"{base_name(model)} on {base_name(data)}")
        for row in made.most_atypical(_SHOWN) if "peak" in table else ():
            site, neuron = sites[table["site"].cat.codes[row]], int(table["neuron"][row])
            made.histograms[row] = calibration[site][Histogram].counts[neuron].cpu().numpy()
        return made

    def most_atypical(self, number: int) -> list[int]:
        """The rows of the neurons that are the least normal, by the test statistic of Jarque & Bera (1980)."""
        weight = self.table["skewness"] ** 2 / 6 + self.table["excess_kurtosis"] ** 2 / 24
        return weight.sort_values(ascending=False, kind="stable").index[:number].tolist()

    def save(self, folder: Path, forms: Sequence[str] = ("png",)) -> None:
        """Writes neurons.parquet and, if there are histograms, the figure in each form (``png``, ``pdf``, ``svg``)."""
        write_whole(folder / "neurons.parquet", self.table.to_parquet(index=False))
        figures.write(folder, {"neurons": self.plot} if self.histograms else {}, forms)

    def to_tensorboard(self, writer: Any) -> None:
        """Writes histograms of the neurons' skewness and kurtosis; the step is the index of the site."""
        for name in ("skewness", "excess_kurtosis"):
            for index, (_, values) in enumerate(self.table.groupby("site", observed=True)[name]):
                writer.add_histogram(f"neurons/{name}", values.to_numpy(), index)

    def plot(self) -> Figure:
        """The histograms, with the values that replace a neuron: its mean, peak and mode."""
        figure, panels = figures.grid(len(self.histograms), 4, (2.25, 2.0), (0.0, 0.5))
        for axes, row in zip(panels, self.histograms, strict=True):
            self._histogram(axes, row)
        figure.suptitle(f"{self.title}: the least normal neurons (positions per bin, logarithmic)", fontsize=9)
        handles = panels[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
        return figure

    def _histogram(self, axes: Axes, row: int) -> None:
        neuron, sites = self.table.loc[row], list(self.table["site"].cat.categories)
        grouped = self.histograms[row].reshape(_BINS, -1).sum(1)
        axes.stairs(grouped, np.linspace(neuron["minimum"], neuron["maximum"], _BINS + 1), fill=True, color="0.7")
        for name, (color, line) in _LINES.items():
            axes.axvline(neuron[name], color=color, linestyle=line, linewidth=1.2, label=name)
        axes.set_yscale("log")
        axes.minorticks_off()  # they take long to draw
        shape = f"skewness {neuron['skewness']:.2f}, kurtosis {neuron['excess_kurtosis']:.1f}"
        axes.set_title(f"{short(sites)[sites.index(neuron['site'])]}, neuron {neuron['neuron']}\n{shape}", fontsize=8)
        figures.plain(axes, 7)


def _described(site: str, statistics: SiteStatistics) -> pd.DataFrame:
    """One row per neuron of a site."""
    moments = statistics[Moments]
    columns: dict[str, Any] = {"mean": moments.mean, "sd": moments.sd, "skewness": moments.skewness}
    columns |= {"excess_kurtosis": moments.kurtosis, "minimum": moments.low, "maximum": moments.high}
    if Histogram in statistics:
        places = statistics[Histogram].places
        columns["zeros"] = statistics[Histogram].zeros.double() / moments.count
        columns |= {name: getattr(places, name) for name in ("peak", "mode", "median", "half_sample_mode")}
        columns |= {"abs_mean_minus_peak": (moments.mean - places.peak).abs(), "abs_peak": places.peak.abs()}
    found = {name: column.cpu().numpy() for name, column in columns.items()}
    return pd.DataFrame({"site": site, "neuron": np.arange(moments.neurons), **found})
