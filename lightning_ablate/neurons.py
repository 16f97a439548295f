"""What the calibration found out about each neuron: a table, a figure and TensorBoard histograms."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_ablate.calibration import Calibration
from lightning_ablate.files import write_whole
from lightning_ablate.report import png
from lightning_ablate.statistics import (
    Histogram,
    LatticeHistogram,
    Median,
    Moments,
    OnePassPeak,
    RangeHistogram,
    SiteStatistics,
    SmoothedMode,
    count_modes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILES = ("neurons.parquet", "neurons.png")
_PANELS = {
    "skewness": "skewness",
    "excess_kurtosis": "excess kurtosis",
    "gap": "|mean − peak| (sd)",
    "offset": "|mean| (sd)",
}
_SHOWN = 8  # of the most atypical neurons
_GROUPS = 128  # bins of their histograms


@dataclass(frozen=True)
class Neurons:
    """The neurons of all sites, in the order of the sites.

    Attributes:
        sites: names of the sites.
        columns: by name, ``(neurons,)``: ``neuron`` int64, its place in its site; float64 ``mean``, ``sd``,
            ``skewness``, ``excess_kurtosis``, ``minimum``, ``maximum``, ``zeros`` (share of exact zeros), ``peak`` (the
            paper's), ``peak_error`` (the most it can be off; 0 from a second calibration epoch), ``mode``, ``median``,
            ``abs_mean_minus_peak``, ``abs_peak``; and ``modes`` int64, the number of them.
        site: ``(neurons,)`` int64, the place of each one's site in ``sites``.
        calibration: what they were described from.
    """

    sites: Sequence[str]
    columns: Mapping[str, Tensor]
    site: Tensor
    calibration: Calibration

    @classmethod
    def of(cls, calibration: Calibration) -> "Neurons":
        """The neurons of a completed calibration."""
        described = [_described(calibration[site]) for site in calibration.sites]
        columns = {name: torch.cat([columns[name] for columns in described]) for name in described[0]}
        widths = torch.tensor([site.width for site in calibration.sites])
        site = torch.arange(len(widths)).repeat_interleave(widths)
        return cls([site.name for site in calibration.sites], columns, site, calibration)

    def shape(self, name: str) -> Tensor:
        """A column, or ``gap`` and ``offset``: the distance of mean and peak, or mean and 0, in standard deviations."""
        sources = {"gap": "abs_mean_minus_peak", "offset": "mean"}
        if name not in sources:
            return self.columns[name].double()
        sd = self.columns["sd"]
        return torch.where(sd > 0, self.columns[sources[name]].abs() / sd, 0.0)

    def most_atypical(self, number: int) -> list[int]:
        """The neurons farthest from a normal density by skewness and kurtosis, as Jarque & Bera (1980) weigh them."""
        skewness, kurtosis = self.columns["skewness"], self.columns["excess_kurtosis"]
        return (skewness.square() / 6 + kurtosis.square() / 24).argsort(descending=True)[:number].tolist()

    def histogram(self, row: int) -> Histogram:
        """The histogram of one neuron, with ``(1, bins)`` counts."""
        site = self.calibration.sites[int(self.site[row])]
        neuron = int(self.columns["neuron"][row])
        histogram = self.calibration[site][LatticeHistogram].histogram
        return Histogram(*(column[neuron : neuron + 1].cpu() for column in histogram))


def save(neurons: Neurons, folder: Path, about: Mapping[str, str]) -> list[Path]:
    """Writes ``neurons.parquet`` and ``neurons.png``.

    Args:
        neurons: what is written.
        folder: is made if it isn't there.
        about: kept as the table's metadata.

    Returns:
        The paths written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / FILES[0], parquet(neurons, about))
    write_whole(folder / FILES[1], png(figure(neurons)))
    return [folder / name for name in FILES]


def parquet(neurons: Neurons, about: Mapping[str, str]) -> bytes:
    """The table, one row a neuron, as the bytes of a parquet file."""
    import pyarrow
    from pyarrow import parquet

    names = pyarrow.DictionaryArray.from_arrays(pyarrow.array(neurons.site.int().numpy()), list(neurons.sites))
    columns = {"site": names, **{name: column.numpy() for name, column in neurons.columns.items()}}
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(columns).replace_schema_metadata(dict(about)), buffer)
    return buffer.getvalue()


def figure(neurons: Neurons) -> "Figure":
    """By site, how the neurons' shapes are distributed; and the histograms of the most atypical ones."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9, 7.5), layout="constrained")
    FigureCanvasAgg(drawn)
    above, below = drawn.subfigures(2, 1, squeeze=False, height_ratios=(1, 1.25))[:, 0]
    for axes, (name, label) in zip(above.subplots(1, len(_PANELS), squeeze=False)[0], _PANELS.items(), strict=True):
        _by_site(axes, neurons, name, label)
    above.suptitle("by site, in the order in which they run: median, quartiles, 5% to 95%", fontsize=9)
    rows = neurons.most_atypical(_SHOWN)
    panels = below.subplots(2, _SHOWN // 2, squeeze=False).flatten()
    for axes, row in zip(panels, rows, strict=False):
        _drawn(axes, neurons, row)
    for axes in panels[len(rows) :]:
        axes.remove()
    below.suptitle("the most atypical neurons (positions in a bin, on a logarithmic scale)", fontsize=9)
    below.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return drawn


def tensorboard(neurons: Neurons, writer: Any) -> None:
    """Writes a TensorBoard histogram of each shape for each site, whose place is the step."""
    for name in _PANELS:
        values = neurons.shape(name)
        for site in range(len(neurons.sites)):
            writer.add_histogram(f"neurons/{name}", values[neurons.site == site].numpy(), site)


def _described(statistics: SiteStatistics) -> dict[str, Tensor]:
    moments, histogram = statistics[Moments], statistics[LatticeHistogram].histogram
    peak, error = OnePassPeak()(histogram), OnePassPeak().error(histogram)
    if RangeHistogram in statistics:
        peak, error = statistics[RangeHistogram].peak(), torch.zeros_like(error)
    columns = {
        "neuron": torch.arange(moments.neurons),
        "mean": moments.mean,
        "sd": moments.sd,
        "skewness": moments.skewness,
        "excess_kurtosis": moments.kurtosis,
        "minimum": histogram.low,
        "maximum": histogram.high,
        "zeros": histogram.zeros.double() / moments.count,
        "peak": peak,
        "peak_error": error,
        "mode": SmoothedMode()(histogram),
        "median": Median()(histogram),
        "modes": count_modes(histogram),
        "abs_mean_minus_peak": (moments.mean - peak).abs(),
        "abs_peak": peak.abs(),
    }
    return {name: column.cpu() for name, column in columns.items()}


def _by_site(axes: "Axes", neurons: Neurons, name: str, label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    values = neurons.shape(name)
    shares = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=values.dtype)
    places = range(len(neurons.sites))
    parts = [values[neurons.site == site] for site in places]
    lowest, low, middle, high, highest = torch.stack([part.quantile(shares) for part in parts]).T.tolist()
    width = min(0.8, 8 / len(parts))
    axes.vlines(places, lowest, highest, color="#0072B2", linewidth=1)
    axes.bar(places, [b - a for a, b in zip(low, high, strict=True)], width, low, color="#56B4E9")
    axes.plot(places, middle, color="black", marker="_", markersize=max(3.0, 10 * width), linestyle="none")
    if name == "excess_kurtosis" and max(highest) > 10:
        axes.set_yscale("symlog", linthresh=1)
    if min(lowest) < 0:
        axes.axhline(0, color="0.35", linewidth=0.9, linestyle=(0, (5, 2)))
    axes.set_title(label, fontsize=9)
    axes.set_xlabel("site", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _plain(axes)


def _drawn(axes: "Axes", neurons: Neurons, row: int) -> None:
    histogram = neurons.histogram(row)
    counts = histogram.all_counts[0]
    low, high = int(counts.nonzero()[0]), int(counts.nonzero()[-1]) + 1
    each = max(1, -(-(high - low) // _GROUPS))
    number = torch.arange(low, high + each, each)
    below = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    heights = below[number.clamp_max(len(counts))].diff()
    edges = histogram.start + number * histogram.width
    axes.stairs(heights.numpy(), edges.numpy(), fill=True, color="0.7")
    for name, style in (("mean", ("#0072B2", "--")), ("peak", ("#009E73", "-.")), ("mode", ("#CC79A7", ":"))):
        axes.axvline(neurons.columns[name][row].item(), color=style[0], linestyle=style[1], linewidth=1.2, label=name)
    axes.set_yscale("log")
    axes.minorticks_off()  # each one costs drawing time
    site, neuron = int(neurons.site[row]), int(neurons.columns["neuron"][row])
    skewness, kurtosis = (neurons.columns[name][row].item() for name in ("skewness", "excess_kurtosis"))
    axes.set_title(f"site {site}, neuron {neuron}\nskewness {skewness:.2f}, kurtosis {kurtosis:.1f}", fontsize=8)
    _plain(axes)


def _plain(axes: "Axes") -> None:
    axes.tick_params(labelsize=7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
