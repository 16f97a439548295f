"""Results of several runs, read back and joined into one table and one figure."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lightning_ablate.errors import DataError
from lightning_ablate.results import figures
from lightning_ablate.results.frames import BASELINE
from lightning_ablate.results.table import Results

_SAME = 1e-4  # nats that baselines of the same data may differ by, on other machines
_SAME_EXAMPLES = ["example", "cluster", "n"]


def load(folders: Sequence[Path | str] | Path | str) -> list[Results]:
    """The results of runs, joined where they are of the same target and data: one for each, in the folders' order.

    Methods of runs with other neurons or sites are named by what differs, like ``mean (unit=head)``; a method that
    several runs hold alike by the end of the folder that tells them apart, like ``mean (a/version_0)``. A folder that
    is given twice counts once.

    Raises:
        DataError: if a folder holds no results, or what can't be joined: single parts, or runs of other data.
    """
    found: dict[tuple[str, str], dict[Path, Results]] = {}
    given = [folders] if isinstance(folders, str | Path) else folders
    for folder in dict.fromkeys(Path(os.path.abspath(folder)) for folder in given):
        for results in Results.load(folder).each:
            if results.parts:
                raise DataError(f"{folder} holds single sites, layers or heads, which make no curve; draw it by itself")
            runs = found.setdefault((results.baseline["model"], results.baseline["data"]), {})
            again, base = results.baseline, next(iter(runs.values()), results).baseline
            if base["n"] != again["n"] or abs(base["cross_entropy"] - again["cross_entropy"]) > _SAME:
                raise DataError(
                    f"{folder} has {again['n']:,} scored positions and a baseline cross-entropy of "
                    f"{again['cross_entropy']:.6f}, the runs of {base['model']} on {base['data']} before it "
                    f"{base['n']:,} and {base['cross_entropy']:.6f}: they were evaluated on other data, and can't be "
                    "compared"
                )
            runs[folder] = results
    return [_joined(runs) if len(runs) > 1 else next(iter(runs.values())) for runs in found.values()]


def _joined(runs: dict[Path, Results]) -> Results:
    (first, *_), names = runs.values(), _names(runs)
    tables = [first.table.iloc[:1]]
    for run, named in zip(runs.values(), names, strict=True):
        own = run.table[run.table["method"] != BASELINE]
        tables.append(own.assign(method=own["method"].map(named)))
    partial = dict.fromkeys(reason for run in runs.values() for reason in run.partial)
    facts = {"classes": first.facts.get("classes"), "partial": list(partial), "runs": list(map(str, runs))}
    return Results(pd.concat(tables), _examples(list(runs.values())), facts)


def _examples(runs: Sequence[Results]) -> pd.DataFrame | None:
    """Those of the joined conditions; None unless all runs have the same ones in the same order."""
    known = [run.examples for run in runs if run.examples is not None]
    bases = [examples[examples["condition"] == 0] for examples in known]
    if len(known) < len(runs) or any(not base[_SAME_EXAMPLES].equals(bases[0][_SAME_EXAMPLES]) for base in bases):
        return None
    pieces, start = [bases[0]], 0
    for run, examples in zip(runs, known, strict=True):
        own = examples[examples["condition"] > 0]
        pieces.append(own.assign(condition=own["condition"] + start))
        start += len(run.table) - 1
    return pd.concat(pieces)


def _names(runs: dict[Path, Results]) -> list[dict[str, str]]:
    """Of each run its methods' names, which no other run's have."""
    differs = zip(_options(list(runs.values())), _sites(list(runs.values())), strict=True)
    told = [list(filter(None, labels)) for labels in differs]
    held = Counter((method, *labels) for run, labels in zip(runs.values(), told, strict=True) for method in run.methods)
    depth = next(depth for depth in range(1, 999) if len({folder.parts[-depth:] for folder in runs}) == len(runs))
    names = []
    for (folder, run), labels in zip(runs.items(), told, strict=True):
        tail = "/".join(folder.parts[-depth:])
        ends = {m: [*labels, *([tail] if held[(m, *labels)] > 1 else [])] for m in run.methods}
        names.append({method: f"{method} ({', '.join(end)})" if end else method for method, end in ends.items()})
    return names


def _options(runs: Sequence[Results]) -> list[str]:
    """Of each run what its choice of neurons has that not all have."""
    choices: list[dict[str, Any]] = [run.facts.get("neurons") or {} for run in runs]
    options = dict.fromkeys(name for choice in choices for name in choice)
    differ = [name for name in options if any(choice.get(name) != choices[0].get(name) for choice in choices)]
    said = [[f"{name}={choice[name]}" for name in differ if name in choice] for choice in choices]
    return [", ".join(each).replace("class=", "") for each in said]


def _sites(runs: Sequence[Results]) -> list[str]:
    """Of each run the kinds of its sites, if not all have the same; where they don't tell, the folder does."""
    sites = [[re.sub(r"\d+", "*", str(site["name"])) for site in run.facts.get("sites") or ()] for run in runs]
    known = sorted({kind for own in sites for kind in own})
    brief = dict(zip(known, figures.short(known), strict=True))
    kinds = ["+".join(brief[kind] for kind in dict.fromkeys(own)) for own in sites]
    return kinds if len(set(kinds)) > 1 else [""] * len(runs)
