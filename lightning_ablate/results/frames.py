"""The columns of the tables of results, how a table is read, and which of its rows are compared."""

from collections.abc import Callable, Mapping
from functools import wraps
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lightning_ablate.errors import DataError, loading
from lightning_ablate.metrics import METRICS

BASELINE = "none"  # the method of the row with nothing ablated
_SCORES = dict.fromkeys(METRICS, "float64")
TABLE = {"model": "str", "data": "str", "method": "str", "fraction": "float64", "ablated": "float64", "seed": "Int64"}
TABLE |= {"part": "str", "head": "Int64", "n": "int64"} | _SCORES
# Rows of the table, (seeds, conditions) int64, and weights (conditions,) float64: a weighted sum of scores per seed.
Contrast = tuple[np.ndarray, np.ndarray]
Curve = Mapping[float, Mapping[int | None, int]]  # ablated share → seed → row
_Made = Callable[..., pd.DataFrame]


def typed(frame: pd.DataFrame, types: Mapping[str, str], name: str) -> pd.DataFrame:
    """The frame with these columns in this order, each of its type, then the user's own metrics as float64.

    Raises:
        DataError: if a column is missing; the message calls the frame by its ``name``.
    """
    missing = [column for column in types if column not in frame.columns]
    if missing:
        raise DataError(f"{name} lacks the columns {', '.join(missing)}; it has {', '.join(map(str, frame.columns))}")
    own = {name: "float64" for name in frame.select_dtypes("number").columns if name not in types}
    return frame[[*types, *own]].astype({**types, **own}).reset_index(drop=True)


def read(path: Path, types: Mapping[str, str]) -> pd.DataFrame:
    """The table in a csv file, bit for bit as it was written; DataError if the file can't be read."""
    with loading(str(path), DataError):
        floats = [name for name in pd.read_csv(path, nrows=0).columns if types.get(name, "float64") == "float64"]
        kinds = {name: kind for name, kind in types.items() if name not in floats}
        empty = {name: [""] for name in ("seed", "head")}  # elsewhere "NA" is text: a model may be called so
        read: Any = {"converters": dict.fromkeys(floats, lambda cell: float(cell or "nan")), "na_values": empty}
        return typed(pd.read_csv(path, dtype=kinds, keep_default_na=False, **read), types, str(path))


class Cell(NamedTuple):
    """What the conditions of one method have in common if they differ by their seed alone."""

    fraction: float
    ablated: float  # mean over the seeds
    part: str
    head: int | None


def cells(table: pd.DataFrame) -> dict[str, dict[Cell, dict[int | None, int]]]:
    """The rows of a table, as method → cell → seed → row; cells are sorted by the share they ablate."""
    found: dict[str, dict[Cell, dict[int | None, int]]] = {method: {} for method in table["method"]}
    by_cell = table.groupby(["method", "fraction", "part", "head"], dropna=False, sort=False)["ablated"]
    shares = by_cell.transform("mean").round(12)  # a mean of equal shares can differ from them in the last bit
    for one in table.assign(ablated=shares).sort_values("ablated", kind="stable").itertuples():
        cell = Cell(one.fraction, one.ablated, one.part, None if pd.isna(one.head) else int(one.head))
        found[one.method].setdefault(cell, {})[None if pd.isna(one.seed) else int(one.seed)] = one.Index
    return found


def area(curve: Curve, to: float) -> Contrast:
    """The mean height of a method's curve above the baseline, for ablated shares from 0 to ``to``.

    ``curve`` maps an ablated share to seed → row; the baseline is row 0. The mean is by the trapezoid rule.
    """
    points: dict[float, Mapping[int | None, int]] = {0.0: {None: 0}, **curve}
    grid = sorted({share for share in points if share < to} | {to})
    weights = [np.trapezoid(np.interp(grid, list(points), hat), grid) / to for hat in np.eye(len(points))]
    rows = [[0, *(at.get(seed, next(iter(at.values()))) for at in points.values())] for seed in _seeds(curve)]
    used = np.array([True, *(weight > 0 for weight in weights)])
    return np.array(rows)[:, used], np.array([-1.0, *weights])[used]


def _seeds(curve: Curve) -> list[int | None]:
    return max(map(list, curve.values()), key=len)


def difference(curve: Curve, other: Curve, to: float) -> Contrast | None:
    """The :func:`area` of one curve minus that of another, paired by seed; None if they have no seed in common.

    A curve without seeds is paired with each of the other's.
    """
    (rows, weights), (others, less) = area(curve, to), area(other, to)
    places, other_places = ({seed: n for n, seed in enumerate(_seeds(one))} for one in (curve, other))
    pairs = [(rows[place], others[other_places[seed]]) for seed, place in places.items() if seed in other_places]
    if None in places or None in other_places:
        pairs = pairs or list(product(rows, others))
    return (np.array([np.concatenate(pair) for pair in pairs]), np.concatenate([weights, -less])) if pairs else None


def by_data(make: _Made) -> _Made:
    """Decorates a method that makes a table: several data sets give one table with a column ``data``."""

    @wraps(make)
    def made(self: Any, *args: Any, **options: Any) -> pd.DataFrame:
        if len(self.data) == 1:
            return make(self, *args, **options)
        tables = {one.data[0]: make(one, *args, **options) for one in self.each}
        return pd.concat(tables, names=["data"]).reset_index(level="data").reset_index(drop=True)

    return made
