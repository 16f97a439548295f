"""What the attribution found out: lines for the terminal, tables of neurons and heads, and a figure."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_ablate.agreement import GROUP, trust
from lightning_ablate.attribution import FOUND_AT, worth
from lightning_ablate.files import write_whole
from lightning_ablate.results import figures
from lightning_ablate.results.text import CHANCE, short
from lightning_ablate.sites import Site

_SHOWN = 5  # units of each method, in the terminal
_COLUMNS = ("first", "second", "estimate", "se", "q", "picked", "verified", "verified_se", "calibrated")
_COLOR = {"neuron": "0.6", "head": "black"}  # other colours are of methods


def lines(table: pd.DataFrame) -> str:
    """Each method's largest units, how many differ from 0, and how well estimates agree with what was measured."""
    sites, agreement = _sites(table), trust(table) if "verified" in table else pd.DataFrame(columns=GROUP)
    agreement, of = agreement.set_index(GROUP), table.attrs.get("of", "nats")
    found = [
        f"what units are worth alone, {of} per scored position: the effect where it was measured, or else an estimate, "
        "± its standard error over examples"
    ]
    for group, own in table[table["level"] != "site"].groupby(GROUP, sort=False):
        method, level, kind = group
        count = int((own["q"] <= FOUND_AT).sum())
        found.append(f"{method}, {len(own):,} {level}s ({kind}), {count:,} of them found to differ from 0 ({CHANCE})")
        for _, row in own.loc[worth(own).nlargest(_SHOWN).index].iterrows():
            unit = sites[row["site"]].neuron(row["unit"]) if level == "neuron" else f"{level} {row['unit']}"
            estimate, measured = _shown(row["estimate"], row["se"]), pd.notna(row.get("verified"))
            known = f"{_shown(row['verified'], row['verified_se'])}, estimated {estimate}" if measured else estimate
            found.append(f"  {row['site']} {unit}: {known}")
        if group in agreement.index and not np.isnan(agreement.loc[group, "beyond"]):
            least, share = agreement.loc[group, ["largest_random", "beyond"]]
            found.append(
                f"  the largest of the random ones measured: {least:+.4f}; at most {share:.0%} of the unmeasured are "
                "worth more (95% confidence)"
            )
    if len(agreement):
        cells = {"units": agreement["units"]}
        for name in ("pearson", "spearman", "slope", "scale"):
            ends = zip(*(agreement[f"{name}{end}"] for end in ("", "_low", "_high")), strict=True)
            cells[name] = ["-" if np.isnan(one) else f"{one:.2f} [{low:.2f}, {high:.2f}]" for one, low, high in ends]
        found += ["", "estimates against measured effects", pd.DataFrame(cells).to_string()]
    return "\n".join(found)


def _shown(value: float, error: float) -> str:
    """A value ± its standard error, with two digits of the error, which is left out where it isn't known."""
    digits = 4 if not 0 < error < 0.001 else 1 - math.floor(math.log10(error))
    return f"{value:+.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def _sites(table: pd.DataFrame) -> dict[str, Site]:
    """The sites of a table, by their names."""
    units = table.groupby(["site", "level"], sort=False)["unit"].nunique()
    return {name: Site(name, units[name, "neuron"], units.get((name, "head"))) for name in table["site"].unique()}


def wide(table: pd.DataFrame, level: str) -> pd.DataFrame:
    """One row per unit of a level (``neuron`` or ``head``), with columns like ``mean_estimate`` for every method."""
    own = table[table["level"] == level].rename(columns={"unit": level})
    names = [name for name in _COLUMNS if name in own]
    by_method = own.set_index(["site", level]).groupby("method", sort=False)[names]
    return pd.concat([of.add_prefix(f"{method}_") for method, of in by_method], axis=1).reset_index()


def save(table: pd.DataFrame, title: str, folder: Path, forms: Sequence[str]) -> None:
    """Adds columns to neurons.parquet, and writes heads.parquet and the figure, if there is something in them."""
    neurons = folder / "neurons.parquet"
    known = pd.read_parquet(neurons)
    found = wide(table, "neuron").astype({"site": known["site"].dtype})
    known = known[[name for name in known if name not in found or name in ("site", "neuron")]]
    write_whole(neurons, known.merge(found, how="left", on=["site", "neuron"]).to_parquet(index=False))
    if (table["level"] == "head").any():
        write_whole(folder / "heads.parquet", wide(table, "head").to_parquet(index=False))
    figures.write(folder, {"attribution": lambda: plot(table, title)} if is_drawn(table) else {}, forms)


def is_drawn(table: pd.DataFrame) -> bool:
    """Whether there are heads or verified units, which :func:`plot` shows."""
    return bool((table["level"] == "head").any()) or "verified" in table


def plot(table: pd.DataFrame, title: str = "") -> Figure:
    """A row of panels per method: a map of the heads, and estimates against what was verified."""
    sites = table.loc[table["level"] == "head", "site"].unique().tolist()
    heads, verified, names = bool(sites), "verified" in table, short(sites)
    methods, tall = table["method"].unique().tolist(), max(2.6, min(9.0, 0.8 + 0.16 * len(sites)))
    figure, panels = figures.grid((heads + verified) * len(methods), 2, (3.5, tall), (0, 0.6))
    own = table[table["level"] == "head"].rename(columns={"unit": "head"})
    measured = "verified" in own and bool(own["verified"].notna().all())
    own, how = own.assign(value=own["verified" if measured else "estimate"]), "measured" if measured else "estimate"
    (largest, beyond), of = figures.color_range(own["value"].astype(float)), table.attrs.get("of", "nats")
    for axes, method in zip(panels[:: heads + verified], methods if heads else (), strict=heads):
        found = own[own["method"] == method]
        found = found.assign(row=found["site"].map(sites.index), known=found["q"] <= FOUND_AT)
        image = figures.head_map(axes, found, names, largest, 8)
        axes.set_xlabel(f"head (dot: {CHANCE})", fontsize=9)
        axes.set_ylabel(figures.kind_of(names), fontsize=9)
        scale = figure.colorbar(image, ax=axes, extend="both" if beyond else "neither")
        scale.ax.tick_params(labelsize=8)
        scale.set_label(f"{how} ({of})", fontsize=9)
        axes.set_title(f"{method}: heads", fontsize=9)
    for axes, method in zip(panels[heads :: heads + verified], methods if verified else (), strict=verified):
        _agreement(axes, table[table["method"] == method].dropna(subset="verified"))
        axes.set_title(f"{method}: estimate and measurement", fontsize=9)
    said = [f"{title}: what units are worth alone"] * bool(title) + [beyond] * bool(beyond)
    figure.suptitle("\n".join(said), fontsize=9)
    return figure


def _agreement(axes: Axes, verified: pd.DataFrame) -> None:
    """Draws estimates against what was verified, ± 2 standard errors, and the line where both are equal."""
    for (level, picked), own in verified.groupby(["level", "picked"], sort=False):
        face = _COLOR[level] if picked != "random" else "none"
        style: dict[str, Any] = {"color": _COLOR[level], "mfc": face, "ms": 3.5, "mew": 0.8, "elinewidth": 0.5}
        errors = {"xerr": 2 * own["se"], "yerr": 2 * own["verified_se"]}
        axes.errorbar(own["estimate"], own["verified"], fmt="o", label=f"{level}s, {picked}", **errors, **style)
    both = verified[["estimate", "verified"]].to_numpy()
    linear = 10 ** np.floor(np.log10(np.median(np.abs(both[:, 1])) or 1e-9))  # the scale is logarithmic beyond
    ends = both.min() - linear, both.max() + 0.3 * np.abs(both).max()
    axes.plot(ends, ends, **figures.ZERO)
    for axis, label in (("x", "estimate (± 2 se)"), ("y", "verified (± 2 se)")):
        getattr(axes, f"set_{axis}scale")("symlog", linthresh=linear)
        getattr(axes, f"set_{axis}lim")(ends)
        getattr(axes, f"{axis}axis").get_major_locator().set_params(numticks=5)
        getattr(axes, f"set_{axis}label")(label, fontsize=9)
    axes.minorticks_off()
    axes.legend(fontsize=7, frameon=False)
    figures.plain(axes, 8)
