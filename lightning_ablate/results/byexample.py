"""What every example scores under every condition, held once and not as the rows of a table."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lightning_ablate.errors import DataError, loading
from lightning_ablate.metrics import METRICS

_KEYS = ("condition", "example", "cluster", "n")
_ROWS = 2**20  # of a piece of a file
Column = Callable[[str], np.ndarray]


class ByExample(NamedTuple):
    """The examples of one data set, and the sums over their scored positions under each condition."""

    example: np.ndarray  # (examples,) int64, their places in the data
    cluster: np.ndarray  # (examples,) int64, equal for those of one document
    n: np.ndarray  # (examples,) int64, scored positions
    names: tuple[str, ...]  # of the metrics
    sums: np.ndarray  # (conditions, metrics, examples) float64

    def of_metric(self, name: str) -> np.ndarray:
        """The sums of one metric, ``(conditions, examples)``."""
        return self.sums[:, self.names.index(name)]

    def pieces(self, start: int = 0, rows: int = _ROWS) -> Iterator[pd.DataFrame]:
        """One row per condition and example, in tables of about so many rows; conditions count from ``start``."""
        step = max(1, rows // max(1, len(self.n)))
        for first in range(0, len(self.sums), step):
            part = self.sums[first : first + step]
            condition = np.repeat(np.arange(len(part)) + first + start, len(self.n))
            same = [np.tile(one, len(part)) for one in (self.example, self.cluster, self.n)]
            scores = {name: part[:, place].ravel() for place, name in enumerate(self.names)}
            yield pd.DataFrame(dict(zip(_KEYS, [condition, *same], strict=True)) | scores)

    @classmethod
    def _of(cls, column: Column, names: Sequence[str], rows: slice, first: int, conditions: int, of: str) -> Self:
        first_rows, numbers = [], first + np.arange(conditions)
        for name in _KEYS:
            values = column(name)[rows]
            whole = values[: len(values) - len(values) % conditions].reshape(conditions, -1)
            alike = (whole.T == numbers).all() if name == "condition" else (whole == whole[0]).all()
            if whole.size < len(values) or not alike:
                raise DataError(f"{of}: every condition needs a row for each example, the same ones in the same order")
            first_rows.append(whole[0].astype(np.int64))
        _, example, cluster, n = first_rows
        sums = np.empty((conditions, len(names), len(n)))
        for place, name in enumerate(names):
            sums[:, place] = column(name)[rows].reshape(conditions, -1)
        return cls(example, cluster, n, tuple(names), sums)


def split(
    column: Column, numeric: Sequence[str], conditions: Sequence[int], of: str = "the table of examples"
) -> list[ByExample | None]:
    """The examples of each data set, which have so many ``conditions``, from a table's numeric columns.

    None for a data set without examples. DataError if a column is missing, or conditions have different examples.
    """
    if missing := [name for name in (*_KEYS, *METRICS) if name not in numeric]:
        raise DataError(f"{of} lacks the columns {', '.join(missing)}; it has {', '.join(numeric)}")
    names = [*METRICS, *(name for name in numeric if name not in (*_KEYS, *METRICS))]
    rows, first, found = len(condition := column("condition")), 0, list[ByExample | None]()
    ends = np.searchsorted(condition, np.cumsum(conditions))
    del condition
    for start, end, count in zip([0, *ends], ends, conditions, strict=False):
        own = slice(int(start), int(end))
        found.append(ByExample._of(column, names, own, first, count, of) if end > start else None)
        first += count
    if rows != ends[-1]:
        raise DataError(f"{of} has conditions that the table lacks")
    return found


def of_frame(frame: pd.DataFrame, conditions: Sequence[int]) -> list[ByExample | None]:
    """See :func:`split`."""
    numeric = [str(name) for name in frame.select_dtypes("number").columns]
    return split(lambda name: frame[name].to_numpy(), numeric, conditions)


def read(path: Path, conditions: Sequence[int]) -> list[ByExample | None]:
    """From a parquet file, a column at a time, see :func:`split`; DataError if it can't be read."""
    with loading(str(path), DataError):
        file = pq.ParquetFile(path, pre_buffer=False)  # which would hold a whole column twice
        numeric = [
            one.name for one in file.schema_arrow if pa.types.is_integer(one.type) or pa.types.is_floating(one.type)
        ]

        def column(name: str) -> np.ndarray:  # in batches, as one read of all keeps three times their size
            values, end = np.empty(file.metadata.num_rows, file.schema_arrow.field(name).type.to_pandas_dtype()), 0
            for batch in file.iter_batches(columns=[name]):
                if values.dtype.kind != "f" and batch.column(0).null_count:
                    raise DataError(f"{path} has empty cells in the column {name}, expected whole numbers")
                values[end : end + len(batch)] = batch.column(0).to_numpy(zero_copy_only=False)
                end += len(batch)
            return values

        return split(column, numeric, conditions, str(path))


def write(pieces: Iterable[pd.DataFrame], file: BinaryIO) -> None:
    """Writes these tables, one below the other, as one parquet file."""
    tables = (pa.Table.from_pandas(piece, preserve_index=False) for piece in pieces)
    first = next(tables)
    with pq.ParquetWriter(file, first.schema, compression="zstd") as writer:
        for table in chain([first], tables):
            writer.write_table(table)
