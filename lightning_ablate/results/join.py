"""Results of several runs, read back and joined into one table and one figure."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lightning_ablate.errors import ConfigError, DataError, few
from lightning_ablate.results.byexample import ByExample
from lightning_ablate.results.frames import BASELINE
from lightning_ablate.results.results import Results

_SAME = 1e-4  # nats by which baselines of the same data may differ, on other machines


def load(folders: Sequence[Path | str] | Path | str, names: Sequence[str] | None = None) -> list[Results]:
    """The results of runs; those of the same target and data are joined into one, in the folders' order.

    Args:
        folders: one or more folders of runs.
        names: one per folder. Methods are then called ``METHOD (NAME)``. Without names, a joined method keeps its name.

    Raises:
        ConfigError: if there are more or fewer names than folders, or two runs have a method of the same name.
        DataError: if a folder holds no results, or runs can't be joined: of single parts, or of other data.
    """
    folders = [folders] if isinstance(folders, str | Path) else list(folders)
    if names is not None and len(names) != len(folders):
        raise ConfigError(f"there are {len(names)} names for {len(folders)} runs, expected one for each (--names)")
    found: dict[tuple[str, str], list[Results]] = {}
    for folder, name in zip(folders, names or [""] * len(folders), strict=True):
        for results in Results.load(folder).each:
            runs = found.setdefault((results.baseline["model"], results.baseline["data"]), [])
            _check(folder, results, runs[0] if runs else results)
            if name:
                known = results.table["method"]
                table = results.table.assign(method=known.where(known == BASELINE, known + f" ({name})"))
                results = Results(table, results.known, results.facts)
            runs.append(results)
    return [_joined(runs) if len(runs) > 1 else runs[0] for runs in found.values()]


def _check(folder: Path | str, results: Results, first: Results) -> None:
    """Raises DataError if the results of a folder can't be joined with the first ones of their target and data."""
    if results.parts:
        raise DataError(
            f"{folder} holds single sites, layers or heads, which can't be joined; draw it in Python: "
            f"Results.load('{folder}').plot()"
        )
    one, other = results.baseline, first.baseline
    if one["n"] != other["n"] or abs(one["cross_entropy"] - other["cross_entropy"]) > _SAME:
        raise DataError(
            f"{folder} has {one['n']:,} scored positions and a baseline cross-entropy of {one['cross_entropy']:.6f}, "
            f"another run of {one['model']} on {one['data']} {other['n']:,} and {other['cross_entropy']:.6f}: they "
            "were evaluated on other data, and can't be compared"
        )


def _joined(runs: Sequence[Results]) -> Results:
    methods = [method for run in runs for method in run.methods]
    if twice := sorted({method for method in methods if methods.count(method) > 1}):
        raise ConfigError(
            f"several runs of {runs[0].baseline['model']} have the methods {few(twice)}: name the runs to tell them "
            "apart, one name for each folder (--names A B; in Python load(folders, names=[...]))"
        )
    own = [run.table[run.table["method"] != BASELINE] for run in runs]
    partial = dict.fromkeys(reason for run in runs for reason in run.partial)
    facts = {"classes": runs[0].facts.get("classes"), "partial": list(partial)}
    facts["until"] = next((run.facts["until"] for run in runs if run.facts.get("until") is not None), None)
    return Results(pd.concat([runs[0].table.iloc[:1], *own]), _examples(runs), facts)


def _examples(runs: Sequence[Results]) -> list[ByExample] | None:
    """The examples of all conditions; None unless all runs have the same examples in the same order."""
    known = [run.known[0] for run in runs if run.known[0] is not None]
    if len(known) < len(runs) or any(not _alike(one, known[0]) for one in known):
        return None
    sums = [known[0].sums[:1], *(one.sums[1:] for one in known)]
    return [known[0]._replace(sums=np.concatenate(sums))]


def _alike(one: ByExample, other: ByExample) -> bool:
    same = zip(one[:3], other[:3], strict=True)
    return one.names == other.names and all(np.array_equal(*pair) for pair in same)
