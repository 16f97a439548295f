"""What results say in the terminal and in a notebook."""

import os
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from lightning_ablate.results.bootstrap import ENOUGH

if TYPE_CHECKING:
    from lightning_ablate.results.table import Results

_PAIRS, _PARTS = 6, 5  # that the tables show


def title(results: "Results") -> str:
    """``MODEL on DATA``, without the folders they came from."""
    return f"{base_name(results.baseline['model'])} on {', '.join(map(base_name, results.data))}"


def base_name(name: str) -> str:
    """A path's last name; hub names stay whole."""
    return (Path(name).name or name) if name.startswith(("/", ".", "~")) or os.path.exists(name) else name


def neighbours(results: "Results", compared: pd.DataFrame) -> pd.DataFrame:
    """Of comparisons those of methods that are neighbours in rank."""
    ranks = {method: rank for rank, method in enumerate(results.ranking()["method"])}
    return compared[(compared["method"].map(ranks) - compared["other"].map(ranks)).abs() == 1]


def tables(results: "Results") -> str:
    """Of each data set the baseline; the methods' scores, ranks and differences, or the most important parts."""
    if len(results.data) > 1:
        return "\n\n\n".join(map(tables, results.each))
    found = [_head(results)]
    if results.parts:
        found.append(_parts(results))
    elif results.methods:
        found += [_scores(results), _ranks(results), _differences(results)]
    return "\n\n".join(filter(None, found))


def html(results: "Results") -> str:
    """The baselines, and the summary as a table."""
    lines = "<br>".join(escape(line) for one in results.each for line in _head(one).splitlines())
    notes = "<br>".join(map(interval, results.each))
    return f"<p>{lines}</p>\n{results.summary().to_html(index=False)}\n<p>{notes}</p>"


def _head(results: "Results") -> str:
    base = results.baseline
    where = f" of {_counted(results)}" if results.counts[0] else ""
    first = (
        f"{title(results)}: {base['n']:,} scored positions{where}; nothing ablated: "
        f"top-1 {100 * base['top1']:.2f}%, cross-entropy {base['cross_entropy']:.4f} nats"
        + "".join(f", {metric} {base[metric]:.4f}" for metric in results.own)
    )
    said = [f"PARTIAL: {reason}" for reason in results.partial]
    said += [f"NOTE: {note}" for note in results.facts.get("notes") or ()]
    return "\n".join([first, *said, *_ridges(results)])


def _counted(results: "Results") -> str:
    examples, clusters = results.counts
    return f"{examples:,} examples in {clusters:,} clusters" if clusters < examples else f"{examples:,} examples"


def interval(results: "Results") -> str:
    """What the intervals are, and whether they can be relied on."""
    few = results.counts[1] < ENOUGH
    doubt = f"; fewer than {ENOUGH} clusters: its true coverage is below 95%" if few else ""
    return f"95% interval over {_counted(results)}{doubt}"


def _ridges(results: "Results") -> list[str]:
    """What methods say of how they were made."""
    return list(results.facts.get("methods_notes") or ())


def _scores(results: "Results") -> str:
    """Top-1 and cross-entropy at up to three shares, mean ± sd over the seeds."""
    summary = results.summary().iloc[1:]
    shared = summary.groupby("ablated")["method"].nunique()
    shown = shared.index[shared == shared.max()].tolist()
    if len(shown) > 3:
        nearest = (min(shown, key=lambda share: abs(share - usual)) for usual in (0.1, 0.5, 0.9))
        shown = list(dict.fromkeys(nearest))
    heads = [("top-1 %", "top1", 100, 2), ("cross-entropy", "cross_entropy", 1, 4)]
    heads += [(metric, metric, 1, 4) for metric in results.own]
    columns = [(head, f"{100 * share:.3g}%") for head, *_ in heads for share in shown]
    cells = pd.DataFrame("", index=results.methods, columns=pd.MultiIndex.from_tuples(columns, names=["", "ablated"]))
    for _, row in summary[summary["ablated"].isin(shown)].iterrows():
        for head, metric, scale, digits in heads:
            spread = "" if pd.isna(row[f"{metric}_sd"]) else f" ± {scale * row[f'{metric}_sd']:.{digits}f}"
            value = f"{scale * row[metric]:.{digits}f}{spread}"
            cells.loc[row["method"], (head, f"{100 * row['ablated']:.3g}%")] = value
    seeds = int(summary["seeds"].max())
    spread = f"\n\nmean ± standard deviation over {seeds} seeds" if seeds > 1 else ""
    return f"{cells.to_string()}{spread}"


def _ranks(results: "Results") -> str:
    """The methods, the one that costs the least first; nothing where a single share makes no curve."""
    if results.summary()["ablated"].nunique() <= 2:
        return ""
    ranking = results.ranking()
    cells = {
        "added cross-entropy": [_with_interval(row, "cross_entropy", 1, 4) for _, row in ranking.iterrows()],
        "lost top-1, points": [_with_interval(row, "top1", -100, 2) for _, row in ranking.iterrows()],
        **{f"change of {m}": [_with_interval(row, m, 1, 4) for _, row in ranking.iterrows()] for m in results.own},
    }
    frame = pd.DataFrame(cells, index=ranking["method"].tolist())
    frame.columns.name = f"mean over 0 to {100 * ranking['to'].iloc[0]:.3g}%"
    return str(frame.to_string())


def _differences(results: "Results") -> str:
    """A line a pair at the share closest to a half; of many pairs, those of neighbours in rank."""
    compared = results.compare() if results.examples is not None else pd.DataFrame({"ablated": []})
    here = compared[compared["ablated"] == min(compared["ablated"], key=lambda one: abs(one - 0.5), default=None)]
    if here.empty or here["top1_low"].isna().all():
        return ""
    note = f"[{interval(results)}; the choices of neurons are those of the run]"
    if len(here) > _PAIRS:
        note = f"{note}; all {len(here)} pairs: Results.compare()"
        here = neighbours(results, here)
    lines = {}
    for _, row in here.iterrows():
        first = f"{row['method']} − {row['other']} at {100 * row['ablated']:.3g}%: "
        others = [_with_interval(row, metric, 1, 4, f" {metric}") for metric in results.own]
        told = "   ".join([_with_interval(row, "cross_entropy", 1, 4, " nats"), *others])
        lines[first + _with_interval(row, "top1", 100, 2, " points")] = told
    width = max(map(len, lines))
    return "\n".join([*(f"{first:{width}}   {second}" for first, second in lines.items()), "", note])


def _parts(results: "Results") -> str:
    """The most important sites, layers or heads of each method."""
    damage, found = results.compare(other="none"), list[str]()
    for metric in ("cross_entropy", *results.own):
        size = abs if metric in results.own else None
        cells = {}
        for method in results.methods:
            own = damage[damage["method"] == method].sort_values(metric, key=size, ascending=False, kind="stable")
            for _, row in own.head(_PARTS).iterrows():
                name = row["part"] if pd.isna(row["head"]) else f"{row['part']} head {row['head']}"
                cells[method, name] = _with_interval(row, metric, 1, 4)
        label = "added cross-entropy, nats" if metric == "cross_entropy" else f"change of {metric}"
        found.append(f"largest first: {label}\n{pd.Series(cells).to_frame().to_string(header=False)}")
    return "\n\n".join(found)


def _with_interval(row: pd.Series, metric: str, scale: float, digits: int, unit: str = "") -> str:
    mean, *ends = (round(scale * row[name], digits) + 0.0 for name in (metric, f"{metric}_low", f"{metric}_high"))
    known = "" if pd.isna(ends[0]) else f" [{', '.join(f'{end:+.{digits}f}' for end in sorted(ends))}]"
    return f"{mean:+.{digits}f}{unit}{known}"
