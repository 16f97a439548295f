"""Examples from the rows of anything that `datasets` reads: a hub name, a local folder, local files, rows in Python."""

import glob
import re
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, get_args

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_ablate.data.base import AblationDataModule, Purpose
from lightning_ablate.data.labels import class_index, names_of
from lightning_ablate.errors import ConfigError, DataError, loading

_BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text"}
_COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
_OPTIONS: dict[str, dict[str, Any]] = {
    "text": {"sample_by": "document"},
    "csv": {"keep_default_na": False, "na_values": [""]},  # `NA` and `null` are texts
}
_SHUFFLED_AT_ONCE = 10_000  # rows of a stream
T = TypeVar("T")


@dataclass(kw_only=True, eq=False, repr=False)
class RowData(AblationDataModule):
    """Examples from the rows of a data set: the calibration examples first, then evaluation examples from other rows.

    A subclass has the options ``calibration_`` and ``evaluation_`` with its ``unit``: how much is used for each. Its
    options that end in ``_column`` name the columns that an example is made from.

    Args:
        name: a hub name, a local folder, or files or a glob of parquet, json, jsonl, csv or txt.
        subset: which configuration of a hub data set.
        calibration_split: the split that calibrates.
        evaluation_split: the split that is evaluated; it may be the same one, as no row is used for both. None takes
            ``validation`` where there is one.
        streaming: reads only as far as needed, without downloading the rest.
        shuffle_seed: shuffles with this seed, as many data sets are sorted by class; None keeps the order.
        cluster_column: the column that names what rows belong together (an author, a subject, a video); examples that
            share it are drawn together for intervals. None takes each row for itself.
    """

    subset: str | None = None
    calibration_split: str = "train"
    evaluation_split: str | None = None
    streaming: bool = False
    shuffle_seed: int | None = 0
    cluster_column: str | None = None

    unit: ClassVar[str] = "examples"
    passes_blanks: ClassVar[bool] = True  # leaves out rows that lack a value
    facts: ClassVar[tuple[str, ...]] = ("cluster_column",)

    def __post_init__(self) -> None:
        """Refuses budgets below 1."""
        super().__post_init__()
        self.path, self.given = self.name, None
        self.reached: dict[Purpose, int] = {}
        for purpose in get_args(Purpose):
            if self.budget(purpose) < 1:
                option = f"{purpose}_{self.unit}"
                raise ConfigError(f"{option} is {self.budget(purpose)}, expected at least 1 (--data.{option})")

    def prepare_data(self) -> None:
        """Downloads the data on one process of each machine, before all open them."""
        for one in (self, *self.evaluation):
            if isinstance(one, RowData) and one.given is None and not one.streaming:
                if one is self:  # other data are only evaluated
                    one.rows("calibration")
                one.rows("evaluation")

    @property
    def columns(self) -> Sequence[str]:
        """The columns that an example is made from: those that options name which end in ``_column``."""
        options = [one.name for one in fields(self) if one.name.endswith("_column") and one.name != "cluster_column"]
        return [column for name in options if (column := getattr(self, name))]

    def budget(self, purpose: Purpose) -> int:
        """How much of the data a purpose asks for, in units."""
        return getattr(self, f"{purpose}_{self.unit}")

    @classmethod
    def of(cls, rows: Any, *, name: str = "given", **options: Any) -> Self:
        """The data module of rows that are there already.

        ``rows`` are a data set of `datasets` or a dict of its splits, a DataFrame, or texts or mappings in a list, an
        array, a Series or a generator. ``name`` is what results call the data; ``options`` are those of the class.
        """
        made = cls(name, **options)
        made.given = given_rows(rows, name)
        return made

    def rows(self, purpose: Purpose) -> Any:
        """The rows for a purpose, in order. Override it to read from elsewhere."""
        split = self.calibration_split if purpose == "calibration" else self.evaluation_split
        if split is None:
            try:
                return self._opened("validation")
            except DataError as error:
                if not re.search("Unknown split|Bad split", str(error)):
                    raise
            rank_zero_info(f"{self.name} has no split 'validation': what calibration leaves is evaluated")
            split = self.evaluation_split = self.calibration_split
        return self._opened(split)

    def content(self, row: Mapping[str, Any]) -> bytes:
        """The bytes by which a row is known: equal ones never serve both purposes."""
        return "\0".join(str(row[column]) for column in self.columns).encode(errors="surrogatepass")

    def filled(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], Hashable]]:
        """The rows that lack nothing, each with its cluster: the value of the cluster column, or else its number.

        Raises:
            DataError: if a column is missing, or a row can't be read.
        """
        columns, own = self.columns, self.cluster_column
        needed = columns if own is None else [*columns, own]
        with loading(self.name, DataError):
            for number, row in enumerate(rows):
                if missing := [column for column in needed if column not in row]:
                    raise DataError(
                        f"{self.name} has no column {missing[0]!r}, it has {', '.join(sorted(row))} (--data)"
                    )
                if self.passes_blanks and any(_is_blank(row[column]) for column in columns):
                    continue
                yield row, number if own is None or row[own] is None else repr(row[own])

    def fresh(self, purpose: Purpose, rows: Any) -> Iterator[tuple[Mapping[str, Any], bytes, Hashable]]:
        """The rows that may serve a purpose, each with its content and cluster. Labels become the target's classes."""
        labels: Any = getattr(self, "label_column", None)
        index = None if labels is None else self._class_index(rows, labels)
        for row, cluster in self.filled(rows):
            content = self.content(row)
            if self.may_use(content, purpose):
                yield row if index is None else {**row, labels: index(row[labels])}, content, cluster

    def taken(self, purpose: Purpose, found: Iterable[T], size: Callable[[T], int] = lambda one: 1) -> list[T]:
        """As many of the found as reach the budget by their sizes; DataError if they end before."""
        kept, self.reached[purpose] = [], 0
        for one in found:
            kept.append(one)
            self.reached[purpose] += size(one)
            if self.reached[purpose] >= self.budget(purpose):
                return kept
        raise DataError(
            f"{self.name} gives {self.reached[purpose]:,} {purpose} {self.unit}, expected {self.budget(purpose):,}; "
            f"bring more or lower --data.{purpose}_{self.unit}"
        )

    def describe(self) -> dict[str, Any]:
        """Adds how much was asked and reached."""
        reached = {p: {"asked": self.budget(p), "reached": self.reached.get(p)} for p in self.examples}
        return super().describe() | {f"{purpose}_{self.unit}": amounts for purpose, amounts in reached.items()}

    def _opened(self, split: str) -> Any:
        import datasets

        if self.given is None:
            opened = open_rows(self.path, subset=self.subset, split=split, streaming=self.streaming)
        else:
            opened = split_of(self.given, split, self.name)
        if self.shuffle_seed is None:
            return opened
        buffer = {"buffer_size": _SHUFFLED_AT_ONCE} if isinstance(opened, datasets.IterableDataset) else {}
        return opened.shuffle(seed=self.shuffle_seed, **buffer)

    def _class_index(self, rows: Any, column: str) -> Callable[[Any], int]:
        feature = (getattr(rows, "features", None) or {}).get(column)
        own, known = names_of(getattr(feature, "names", None)), getattr(self.module, "class_names", None)
        return class_index(self.name, column, own, known)


@dataclass(kw_only=True, eq=False, repr=False)
class MadeRows(RowData):
    """Rows that ``rows`` makes, without the options that say where to read them."""

    name: str = field(init=False)
    subset: str | None = field(default=None, init=False)
    calibration_split: str = field(default="train", init=False)
    evaluation_split: str | None = field(default=None, init=False)
    streaming: bool = field(default=False, init=False)
    shuffle_seed: int | None = field(default=None, init=False)

    def prepare_data(self) -> None:
        """Nothing, as the rows are made."""

    @abstractmethod
    def rows(self, purpose: Purpose) -> Any:
        """The rows for a purpose, in order."""


def open_rows(name: str, *, subset: str | None, split: str, streaming: bool) -> Any:
    """One split of a data set, or DataError; the options are those of :class:`RowData`.

    A local folder holds data files, or was written by ``save_to_disk``. Files are one split called ``train``. A txt
    file is one document.
    """
    import datasets

    path = Path(name)
    with loading(name, DataError, "--data"):
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return split_of(datasets.load_from_disk(name), split, name)
        builder, options = _builder(path), {"split": split, "streaming": streaming}
        if builder is None or (path.is_dir() and subset is not None):
            return datasets.load_dataset(name, subset, **options)
        if path.is_dir():  # its name may hold characters that would be a pattern
            options["data_dir"] = glob.escape(name)
        elif path.is_file() or glob.has_magic(name):
            options["data_files"] = glob.escape(name) if path.is_file() else name
        else:
            raise DataError(f"the file {name!r} does not exist (--data.name)")
        return datasets.load_dataset(builder, **options, **_OPTIONS.get(builder, {}))


def given_rows(rows: Any, name: str) -> Any:
    """Rows in any of the forms that :meth:`RowData.of` takes as a data set of `datasets`, or DataError."""
    import datasets
    import pandas as pd

    with loading(name, DataError):
        if hasattr(rows, "cast_column"):  # a data set of `datasets`, or a dict of its splits
            return rows
        if isinstance(rows, pd.DataFrame):
            return datasets.Dataset.from_pandas(rows, preserve_index=False)
        if isinstance(rows, Mapping):
            return datasets.Dataset.from_dict(dict(rows))
        found = [rows] if isinstance(rows, str) else list(rows)
        return datasets.Dataset.from_list([row if isinstance(row, Mapping) else {"text": row} for row in found])


def split_of(rows: Any, split: str, name: str) -> Any:
    """The split of a dict of splits, or DataError; rows without splits as they are."""
    if isinstance(rows, Mapping) and split not in rows:
        raise DataError(f"Unknown split {split!r} of {name}, expected one of {', '.join(rows)} (--data)")
    return rows[split] if isinstance(rows, Mapping) else rows


def _is_blank(value: Any) -> bool:
    if isinstance(value, Mapping):  # an undecoded image
        return all(part is None for part in value.values())
    return value is None or (isinstance(value, str) and not value.strip())


def _builder(path: Path) -> str | None:
    """The builder of `datasets` for a file, a glob, or a folder of files of one kind; None for any other name."""
    files = [path]
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file() and not file.name.startswith(".")]
    kinds = set()
    for file in files:
        suffixes = [suffix.lower() for suffix in file.suffixes if suffix.lower() not in _COMPRESSED]
        kinds.add(_BUILDERS.get(suffixes[-1]) if suffixes else None)
    builder = kinds.pop() if len(kinds) == 1 else None
    return "imagefolder" if builder is None and path.is_dir() and glob.has_magic(str(path)) else builder
