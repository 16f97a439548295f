"""What the calibration found out about each neuron: a table, a figure and TensorBoard histograms."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_ablate.results.figures import blank, drawn, plain, short
from lightning_ablate.results.folder import write_whole
from lightning_ablate.results.text import base_name
from lightning_ablate.statistics import Histogram, Moments, SiteStatistics

if TYPE_CHECKING:
    from lightning_ablate.calibration import Calibration

_PANELS = {
    "skewness": "skewness",
    "excess_kurtosis": "excess kurtosis",
    "gap": "|mean − peak| (sd)",
    "offset": "|mean| (sd)",
}
_SHOWN = 8  # of the most atypical neurons
_GROUPS = 125  # bins of their histograms


class Neurons:
    """The neurons of all sites, in the order of the sites.

    Args:
        table: one row a neuron: its ``site`` (the name) and ``neuron`` (its place there); ``mean``, ``sd``,
            ``skewness``, ``excess_kurtosis``, ``minimum``, ``maximum``; and, where a histogram was gathered, ``zeros``
            (share of exact zeros), ``peak`` (the paper's), ``mode``, ``median``, ``half_sample_mode``,
            ``abs_mean_minus_peak`` and ``abs_peak``.
        histograms: by row of the table, counts ``(bins,)`` between minimum and maximum of the most atypical neurons.
        about: names of the model and of the data.
    """

    def __init__(self, table: pd.DataFrame, histograms: dict[int, np.ndarray], about: tuple[str, str]) -> None:
        self.table, self.histograms, self.about = table, histograms, about

    @classmethod
    def of(cls, calibration: "Calibration", model: str, data: str) -> Self:
        """The neurons of a calibration that holds what it gathered in full."""
        described = [_described(site.name, calibration[site]) for site in calibration.sites]
        table = pd.concat(described, ignore_index=True)
        table["site"] = pd.Categorical(table["site"], [site.name for site in calibration.sites])
        made = cls(table, {}, (model, data))
        for row in made.most_atypical(_SHOWN) if "peak" in table else ():
            site, neuron = calibration.sites[table["site"].cat.codes[row]], int(table["neuron"][row])
            made.histograms[row] = calibration[site][Histogram].counts[neuron].cpu().numpy()
        return made

    def shape(self, name: str) -> pd.Series:
        """A column, or ``gap`` and ``offset``: the distance of mean and peak, or mean and 0, in standard deviations."""
        sources = {"gap": "abs_mean_minus_peak", "offset": "mean"}
        if name not in sources:
            return self.table[name]
        return (self.table[sources[name]].abs() / self.table["sd"].where(self.table["sd"] > 0)).fillna(0.0)

    def most_atypical(self, number: int) -> list[int]:
        """The neurons farthest from a normal density by skewness and kurtosis, as Jarque & Bera (1980) weigh them."""
        weight = self.table["skewness"] ** 2 / 6 + self.table["excess_kurtosis"] ** 2 / 24
        return weight.sort_values(ascending=False, kind="stable").index[:number].tolist()

    def save(self, folder: Path, forms: Sequence[str] = ("png",)) -> None:
        """Writes the table and its figure into a folder, see :meth:`Results.save`."""
        write_whole(folder / "neurons.parquet", self.table.to_parquet(index=False))
        for form in forms:
            write_whole(folder / f"neurons.{form}", drawn(self.plot, form))

    def to_tensorboard(self, writer: Any) -> None:
        """Writes a histogram of each shape for each site, whose place is the step."""
        for name in self._panels:
            for place, (_, values) in enumerate(self.shape(name).groupby(self.table["site"], observed=True)):
                writer.add_histogram(f"neurons/{name}", values.to_numpy(), place)

    def plot(self) -> Figure:
        """By site, how the neurons' shapes are distributed; and the histograms of the most atypical ones."""
        panels, rows = self._panels, list(self.histograms)
        figure = blank(9, 7.5 if rows else 3.4)
        figure.suptitle(" on ".join(map(base_name, self.about)), fontsize=9)
        parts = figure.subfigures(2 if rows else 1, 1, squeeze=False, height_ratios=(1, 1.25) if rows else None)[:, 0]
        for axes, name in zip(parts[0].subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            self._by_site(axes, name, _PANELS[name])
        parts[0].suptitle("by site, in the order in which they run: median, quartiles, 5% to 95%", fontsize=9)
        if rows:
            below = parts[1]
            axes = below.subplots(2, _SHOWN // 2, squeeze=False).flatten()
            for panel, row in zip(axes, rows, strict=False):
                self._histogram(panel, row)
            for panel in axes[len(rows) :]:
                panel.remove()
            below.suptitle("the most atypical neurons (positions in a bin, on a logarithmic scale)", fontsize=9)
            handles = axes[0].get_legend_handles_labels()
            below.legend(*handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
        return figure

    @property
    def _panels(self) -> list[str]:
        return [name for name in _PANELS if name != "gap" or "peak" in self.table]

    def _by_site(self, axes: Axes, name: str, label: str) -> None:
        by_site = self.shape(name).groupby(self.table["site"], observed=True)
        lowest, low, middle, high, highest = (by_site.quantile(q).to_numpy() for q in (0.05, 0.25, 0.5, 0.75, 0.95))
        places = np.arange(len(middle))
        thick = min(9.0, 110 / len(places))  # points, so that boxes stay visible however many there are
        axes.vlines(places, lowest, highest, color="#0072B2", linewidth=min(1.0, thick / 3))
        axes.vlines(places, low, high, color="#56B4E9", linewidth=thick)
        axes.plot(places, middle, color="black", marker="_", markersize=thick, linestyle="none")
        if name == "excess_kurtosis" and max(highest) > 10:
            axes.set_yscale("symlog", linthresh=1)
        if min(lowest) < 0:
            axes.axhline(0, color="0.35", linewidth=0.9, linestyle=(0, (5, 2)))
        axes.set_title(label, fontsize=9)
        axes.set_xlabel("site", fontsize=9)
        axes.set_xlim(-0.7, len(places) - 0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        plain(axes, 7, grid=False)

    def _histogram(self, axes: Axes, row: int) -> None:
        neuron, counts = self.table.loc[row], self.histograms[row]
        grouped = counts.reshape(_GROUPS, -1).sum(1)
        axes.stairs(grouped, np.linspace(neuron["minimum"], neuron["maximum"], _GROUPS + 1), fill=True, color="0.7")
        for name, style in (("mean", ("#0072B2", "--")), ("peak", ("#009E73", "-.")), ("mode", ("#CC79A7", ":"))):
            axes.axvline(neuron[name], color=style[0], linestyle=style[1], linewidth=1.2, label=name)
        axes.set_yscale("log")
        axes.minorticks_off()  # each one costs drawing time
        shape = f"skewness {neuron['skewness']:.2f}, kurtosis {neuron['excess_kurtosis']:.1f}"
        sites = list(self.table["site"].cat.categories)
        axes.set_title(f"{short(sites)[sites.index(neuron['site'])]}, neuron {neuron['neuron']}\n{shape}", fontsize=8)
        plain(axes, 7, grid=False)


def _described(site: str, statistics: SiteStatistics) -> pd.DataFrame:
    moments = statistics[Moments]
    columns: dict[str, Any] = {"mean": moments.mean, "sd": moments.sd, "skewness": moments.skewness}
    columns |= {"excess_kurtosis": moments.kurtosis, "minimum": moments.low, "maximum": moments.high}
    if Histogram in statistics:
        columns["zeros"] = statistics[Histogram].zeros.double() / moments.count
        columns |= statistics[Histogram].places._asdict()
        columns["abs_mean_minus_peak"] = (moments.mean - columns["peak"]).abs()
        columns["abs_peak"] = columns["peak"].abs()
    found = {name: column.cpu().numpy() for name, column in columns.items()}
    return pd.DataFrame({"site": site, "neuron": np.arange(moments.neurons), **found})
