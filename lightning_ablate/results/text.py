"""What results say in the terminal and in a notebook."""

from collections.abc import Sequence

import pandas as pd

from lightning_ablate.attribution import FOUND_AT
from lightning_ablate.files import base_name
from lightning_ablate.results.bootstrap import ENOUGH
from lightning_ablate.results.table import Scores, q_name

_METHODS = 4  # with more methods, only neighbours in rank are compared
_PARTS = 5  # of each method are shown
CHANCE = f"q ≤ {FOUND_AT}"


def title(scores: Scores) -> str:
    """``MODEL on DATA``, without the folders of either."""
    return f"{base_name(scores.baseline['model'])} on {', '.join(map(base_name, scores.data))}"


def short(parts: Sequence[str]) -> list[str]:
    """The dotted names without the first and last words that all of them share."""
    names = [part.split(".") for part in parts]
    for end in (0, -1):
        while all(len(name) > 1 for name in names) and len({name[end] for name in names}) == 1:
            names = [name[1:] if end == 0 else name[:-1] for name in names]
    return [".".join(name) for name in names]


def harm(metric: str) -> tuple[str, float, int]:
    """How tables and figures show differences of a metric, so that more is worse: label, factor and digits.

    Of a metric of the user's own, as of accuracy, more is taken to be better.
    """
    known = {"top1": ("lost top-1, points", -100.0, 2), "cross_entropy": ("added cross-entropy, nats", 1.0, 4)}
    return known.get(metric, (f"lost {metric}", -1.0, 4))


def neighbours(scores: Scores, compared: pd.DataFrame) -> pd.DataFrame:
    """The rows of :meth:`Scores.compare`; of many methods only those of neighbours in rank."""
    if len(scores.methods) <= _METHODS:
        return compared
    ranks = {method: rank for rank, method in enumerate(scores.ranking()["method"])}
    return compared[(compared["method"].map(ranks) - compared["other"].map(ranks)).abs() == 1]


def shares(summary: pd.DataFrame) -> list[float]:
    """Up to three shares that most methods ablated, near 10%, 50% and 90%; ``summary`` is without the baseline."""
    shared = summary.groupby("ablated")["method"].nunique()
    shown = shared.index[shared == shared.max()].tolist()
    if len(shown) <= 3:
        return shown
    return list(dict.fromkeys(min(shown, key=lambda share: abs(share - usual)) for usual in (0.1, 0.5, 0.9)))


def tables(scores: Scores) -> str:
    """For each data set: the baseline, and the methods' scores, ranks and differences, or the most important parts."""
    if len(scores.data) > 1:
        return "\n\n\n".join(map(tables, scores.each))
    found = [head(scores)]
    if scores.parts:
        found.append(_parts(scores))
    elif scores.methods:
        found += [_scores(scores), _ranks(scores), _differences(scores)]
    return "\n\n".join(filter(None, found))


def interval(scores: Scores) -> str:
    """What the intervals are, with a warning if there are few clusters."""
    few = scores.counts[1] < ENOUGH
    doubt = f"; fewer than {ENOUGH} clusters: its true coverage is below 95%" if few else ""
    return f"{scores.interval} over {_counted(scores)}{doubt}"


def head(scores: Scores) -> str:
    """What was evaluated and what the intact target scores, then what limits the run, a line each."""
    base, facts = scores.baseline, scores.facts
    where = f" of {_counted(scores)}" if scores.counts[0] else ""
    first = (
        f"{title(scores)}: {base['n']:,} scored positions{where}; nothing ablated: "
        f"top-1 {100 * base['top1']:.2f}%, cross-entropy {base['cross_entropy']:.4f} nats"
        + "".join(f", {metric} {base[metric]:.4f}" for metric in scores.own)
    )
    said = [f"PARTIAL: {reason}" for reason in scores.partial]
    said += [f"NOTE: {note}" for note in facts.get("notes") or ()]
    return "\n".join([first, *said, *(facts.get("methods_notes") or ())])


def _counted(scores: Scores) -> str:
    examples, clusters = scores.counts
    return f"{examples:,} examples in {clusters:,} clusters" if clusters < examples else f"{examples:,} examples"


def _scores(scores: Scores) -> str:
    """The scores at up to three shares, mean ± standard deviation over the seeds."""
    summary = scores.summary().iloc[1:]
    shown = shares(summary)
    heads = [("top-1 %", "top1", 100, 2), ("cross-entropy", "cross_entropy", 1, 4)]
    heads += [(metric, metric, 1, 4) for metric in scores.own]
    columns = [(head, f"{100 * share:.3g}%") for head, *_ in heads for share in shown]
    cells = pd.DataFrame("", index=scores.methods, columns=pd.MultiIndex.from_tuples(columns, names=["", "ablated"]))
    for _, row in summary[summary["ablated"].isin(shown)].iterrows():
        for head, metric, scale, digits in heads:
            spread = "" if pd.isna(row[f"{metric}_sd"]) else f" ± {scale * row[f'{metric}_sd']:.{digits}f}"
            value = f"{scale * row[metric]:.{digits}f}{spread}"
            cells.loc[row["method"], (head, f"{100 * row['ablated']:.3g}%")] = value
    seeds = int(summary["seeds"].max())
    spread = f"\n\nmean ± standard deviation over {seeds} seeds" if seeds > 1 else ""
    return f"{cells.to_string()}{spread}"


def _ranks(scores: Scores) -> str:
    """The methods, the least damage first; "" if a single share was ablated."""
    if scores.summary()["ablated"].nunique() <= 2:
        return ""
    ranking = scores.ranking()
    rows = [row for _, row in ranking.iterrows()]
    cells = {harm(m)[0]: [_with_interval(row, m) for row in rows] for m in ("cross_entropy", "top1", *scores.own)}
    frame = pd.DataFrame(cells, index=ranking["method"].tolist())
    frame.columns.name = f"mean over 0 to {100 * ranking['to'].iloc[0]:.3g}%"
    return str(frame.to_string())


def _differences(scores: Scores) -> str:
    """One line per pair of methods at the share closest to a half; with many pairs, only neighbours in rank."""
    compared = scores.compare() if scores.known[0] is not None else pd.DataFrame({"ablated": []})
    here = compared[compared["ablated"] == min(compared["ablated"], key=lambda one: abs(one - 0.5), default=None)]
    if here.empty or here["top1_low"].isna().all():
        return ""
    note = f"[{interval(scores)}; for these draws of neurons, other draws would add to it]"
    shown, lines = neighbours(scores, here), {}
    if len(shown) < len(here):
        note = f"{note}; all {len(here)} pairs: Results.compare()"
    for _, row in shown.iterrows():
        first = f"{row['method']} − {row['other']} at {100 * row['ablated']:.3g}%: "
        others = [_with_interval(row, metric, f" lost {metric}") for metric in scores.own]
        told = "   ".join([_with_interval(row, "cross_entropy", " nats added"), *others])
        lines[first + _with_interval(row, "top1", " points lost")] = told
    width = max(map(len, lines))
    return "\n".join([*(f"{first:{width}}   {second}" for first, second in lines.items()), "", note])


def _parts(scores: Scores) -> str:
    """The most important sites, layers or heads of each method."""
    damage, found = scores.compare(other="none"), list[str]()
    for metric in ("cross_entropy", *scores.own):
        size = abs if metric in scores.own else None
        cells = {}
        for method in scores.methods:
            own = damage[damage["method"] == method].sort_values(metric, key=size, ascending=False, kind="stable")
            for _, row in own.head(_PARTS).iterrows():
                name = row["part"] if pd.isna(row["head"]) else f"{row['part']} head {row['head']}"
                cells[method, name] = _with_interval(row, metric)
        found.append(f"largest first: {harm(metric)[0]}\n{pd.Series(cells).to_frame().to_string(header=False)}")
        tested = damage.dropna(subset=q_name(metric)).groupby("method", sort=False)[q_name(metric)]
        counts = [f"{(q <= FOUND_AT).sum()} of {len(q)} under {method}" for method, q in tested]
        found[-1] += f"\nfound to differ from 0 ({CHANCE}): {', '.join(counts)}" if counts else ""
    return "\n\n".join(found)


def _with_interval(row: pd.Series, metric: str, unit: str = "") -> str:
    _, scale, digits = harm(metric)
    mean, *ends = (round(scale * row[name], digits) + 0.0 for name in (metric, f"{metric}_low", f"{metric}_high"))
    known = "" if pd.isna(ends[0]) else f" [{', '.join(f'{end:+.{digits}f}' for end in sorted(ends))}]"
    return f"{mean:+.{digits}f}{unit}{known}"
