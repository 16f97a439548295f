"""``python -m lightning_ablate.results RUN RUN --names A B``."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from lightning_ablate.errors import AblationError, ConfigError
from lightning_ablate.files import write_whole
from lightning_ablate.results import figures, page
from lightning_ablate.results.join import load


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables of each target, and writes a page, a table and a figure of all."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_ablate.results", description="Joins the results of several runs."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, which holds results.csv and run.json")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="one per run; METHOD becomes METHOD (NAME)")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for report.html, joined.csv, joined.png")
    given = parser.parse_args(arguments)
    try:
        targets = load(given.runs, given.names)
        if (given.out / "results.csv").exists():
            raise ConfigError(
                f"{str(given.out)!r} is the folder of a run, whose page would be lost; name another (--out)"
            )
        given.out.mkdir(parents=True, exist_ok=True)
        table = given.out / "joined.csv"
        write_whole(table, pd.concat([one.table for one in targets]).to_csv(index=False, lineterminator="\n"))
        paths = [table, *figures.write(given.out, {"joined": lambda: figures.degradation(*targets)}, ["png"])]
        opened = f"open {shlex.quote(str(page.joined(targets, given.out)))}"
    except (AblationError, OSError) as error:
        sys.exit(f"error: {error}")
    print("\n\n\n".join(map(str, targets)), opened, *paths, sep="\n\n")


if __name__ == "__main__":
    main()
