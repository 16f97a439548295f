"""The columns of the tables of results, how these are read, and what is computed from their rows."""

from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lightning_ablate.errors import DataError, loading
from lightning_ablate.metrics import METRICS

BASELINE = "none"
_SCORES = dict.fromkeys(METRICS, "float64")
TABLE = {"model": "str", "data": "str", "method": "str", "fraction": "float64", "ablated": "float64", "seed": "Int64"}
TABLE |= {"part": "str", "head": "Int64", "n": "int64"} | _SCORES
EXAMPLES = dict.fromkeys(("condition", "example", "cluster", "n"), "int64") | _SCORES
# rows of the table, (seeds, conditions) int64, and the weights of these conditions' scores
Contrast = tuple[np.ndarray, np.ndarray]
_Made = Callable[..., pd.DataFrame]


def typed(frame: pd.DataFrame, types: Mapping[str, str], name: str) -> pd.DataFrame:
    """A frame with these columns, of these types, and behind them one's own metrics; DataError if one is missing.

    The frame is called by its ``name`` then.
    """
    missing = [column for column in types if column not in frame.columns]
    if missing:
        raise DataError(f"{name} lacks the columns {', '.join(missing)}; it has {', '.join(map(str, frame.columns))}")
    own = {name: "float64" for name in frame.select_dtypes("number").columns if name not in types}
    return frame[[*types, *own]].astype({**types, **own}).reset_index(drop=True)


def read(path: Path, types: Mapping[str, str]) -> pd.DataFrame:
    """A table that was written to a csv or parquet file, bit for bit; DataError if it can't be read."""
    with loading(str(path), DataError):
        if path.suffix == ".parquet":
            return typed(pd.read_parquet(path), types, str(path))
        floats = [name for name in pd.read_csv(path, nrows=0).columns if types.get(name, "float64") == "float64"]
        kinds = {name: kind for name, kind in types.items() if name not in floats}
        empty = {name: [""] for name in ("seed", "head")}  # a method may be called "none", a model "NA"
        read: Any = {"converters": dict.fromkeys(floats, lambda cell: float(cell or "nan")), "na_values": empty}
        return typed(pd.read_csv(path, dtype=kinds, keep_default_na=False, **read), types, str(path))


def rectangular(examples: pd.DataFrame, conditions: int) -> bool:
    """Whether every condition has the same examples in the same order."""
    if len(examples) % conditions:
        return False
    names = ("condition", "example", "cluster", "n")
    condition, *same = (examples[name].to_numpy().reshape(conditions, -1) for name in names)
    return bool((condition.T == np.arange(conditions)).all() and all((one == one[0]).all() for one in same))


class Cell(NamedTuple):
    """Conditions of a method that differ by their seed alone."""

    fraction: float
    ablated: float  # mean over the seeds
    part: str
    head: int | None

    @property
    def went(self) -> tuple[float, str, int | None]:
        """What conditions of two methods must share to be compared."""
        return self.ablated, self.part, self.head


def cells(table: pd.DataFrame) -> dict[str, dict[Cell, dict[int | None, int]]]:
    """By method and cell, the latter in the order of what they ablate, which row of the table each seed has."""
    found: dict[str, dict[Cell, dict[int | None, int]]] = {method: {} for method in table["method"]}
    same = table.groupby(["method", "fraction", "part", "head"], dropna=False, sort=False)["ablated"]
    went = same.transform("mean").round(12)  # seeds that ablate as much have a mean of just that
    for one in table.assign(ablated=went).sort_values("ablated", kind="stable").itertuples():
        cell = Cell(one.fraction, one.ablated, one.part, None if pd.isna(one.head) else int(one.head))
        found[one.method].setdefault(cell, {})[None if pd.isna(one.seed) else int(one.seed)] = one.Index
    return found


def area(curve: Mapping[float, Mapping[int | None, int]], to: float) -> Contrast:
    """A curve's mean height above the baseline, the table's first row, over the shares ablated from 0 to ``to``."""
    seeds = max(curve.values(), key=len)
    points: dict[float, Mapping[int | None, int]] = {0.0: {None: 0}, **curve}
    grid = sorted({share for share in points if share < to} | {to})
    shares = [np.trapezoid(np.interp(grid, list(points), hat), grid) / to for hat in np.eye(len(points))]
    rows = [[0, *(at.get(seed, next(iter(at.values()))) for at in points.values())] for seed in seeds]
    used = np.array([True, *(share > 0 for share in shares)])
    return np.array(rows)[:, used], np.array([-1.0, *shares])[used]


def by_data(make: _Made) -> _Made:
    """Makes a table of every data set, and a column ``data`` where there are several."""

    @wraps(make)
    def made(self: Any, *args: Any, **options: Any) -> pd.DataFrame:
        if len(self.data) == 1:
            return make(self, *args, **options)
        tables = {one.data[0]: make(one, *args, **options) for one in self.each}
        return pd.concat(tables, names=["data"]).reset_index(level="data").reset_index(drop=True)

    return made
