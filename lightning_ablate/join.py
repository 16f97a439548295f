"""Results of several runs, read back and joined into one table and one figure."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lightning_ablate import report
from lightning_ablate.errors import AblationError, DataError
from lightning_ablate.files import write_whole
from lightning_ablate.results import Results

_SAME = 1e-4  # nats that baselines of the same data may differ by, on other machines


def load(folders: Sequence[Path | str]) -> list[Results]:
    """The results of runs, joined where they are of the same target and data.

    A method that several of them hold is called ``method (folder)`` behind the first.

    Args:
        folders: of the runs.

    Returns:
        One for each target and data, in the order of the folders.

    Raises:
        DataError: if a folder holds no results, they were changed, or the runs' evaluation data differ.
    """
    joined: dict[tuple[str, str], Results] = {}
    for folder in map(Path, folders):
        results = Results.load(folder)
        if results.parts:
            raise DataError(f"{folder} holds single sites, layers or heads, which make no curve; draw it by itself")
        key = results.baseline.model, results.baseline.data
        joined[key] = _joined(joined[key], results, folder) if key in joined else results
    return list(joined.values())


def _joined(one: Results, other: Results, folder: Path) -> Results:
    base, again = one.baseline, other.baseline
    if base.n != again.n or abs(base.cross_entropy - again.cross_entropy) > _SAME:
        raise DataError(
            f"{folder} has {again.n:,} scored positions and a baseline cross-entropy of {again.cross_entropy:.6f}, the "
            f"runs of {base.model} on {base.data} before it {base.n:,} and {base.cross_entropy:.6f}: they were "
            "evaluated on other data, and can't be compared"
        )
    names = {method: _free(method, one.methods, folder) for method in other.methods}
    rows = [replace(row, method=names[row.method]) for row in other.rows if row.method in names]
    intervals = [replace(known, method=names[known.method]) for known in other.intervals if known.method in names]
    partial = dict.fromkeys([*one.partial, *other.partial])
    return Results([*one.rows, *rows], one.classes, tuple(partial), [*one.intervals, *intervals])


def _free(method: str, taken: Sequence[str], folder: Path) -> str:
    """A name that no other method has."""
    names = [method, f"{method} ({folder.name})", f"{method} ({folder})"]
    names += [f"{names[1]} {number}" for number in range(2, len(taken) + 3)]
    return next(name for name in names if name not in taken)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table for each target, and writes one table and one figure of all."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_ablate.results", description="Joins the results of several runs."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, which holds results.csv and run.json")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for joined.csv and joined.png")
    given = parser.parse_args(arguments)
    try:
        targets = load(given.runs)
        tables = [results.csv() for results in targets]
        content = "".join([tables[0], *(table.partition("\n")[2] for table in tables[1:])])
        given.out.mkdir(parents=True, exist_ok=True)
        paths = [given.out / name for name in ("joined.csv", "joined.png")]
        write_whole(paths[0], content)
        write_whole(paths[1], report.png(report.degradation(*targets)))
    except (AblationError, OSError) as error:
        sys.exit(f"error: {error}")
    print("\n\n\n".join(results.table() for results in targets), *paths, sep="\n\n")
