"""Examples from the rows of anything that `datasets` reads: a hub name, a local folder, local files, rows in Python."""

import glob
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

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


class RowData(AblationDataModule):
    """Examples from the rows of a data set: the calibration examples first, then evaluation examples from other rows.

    Args:
        name: a hub name, a local folder, or files or a glob of parquet, json, jsonl, csv or txt.
        columns: those that an example is made from.
        budgets: how much calibrates, and how much is evaluated.
        subset: which configuration of a hub data set.
        calibration_split: the split that calibrates.
        evaluation_split: the split that is evaluated; it may be the same one, as nothing is used for both. None takes
            ``validation`` where there is one.
        streaming: reads only as far as the budgets need, without downloading the rest.
        shuffle_seed: shuffles with this seed, as many data sets are sorted by class; None keeps the order.
        cluster_column: the column that names what rows belong together (an author, a subject, a video); examples that
            share it are drawn together for intervals. None takes each row for itself.
    """

    unit: ClassVar[str] = "examples"  # that the budgets count, as their options call it
    facts = ("cluster_column",)
    label_column: str = ""  # the column, if any, whose classes become those of the target
    passes_blanks: ClassVar[bool] = True  # leaves out rows that lack a value

    def __init__(
        self,
        name: str,
        columns: Sequence[str],
        budgets: tuple[int, int],
        *,
        subset: str | None = None,
        calibration_split: str = "train",
        evaluation_split: str | None = None,
        streaming: bool = False,
        shuffle_seed: int | None = 0,
        cluster_column: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(name, **options)
        self.splits: dict[Purpose, str | None] = {"calibration": calibration_split, "evaluation": evaluation_split}
        self.path, self.subset, self.streaming, self.shuffle_seed = name, subset, streaming, shuffle_seed
        self.columns, self.cluster_column = tuple(columns), cluster_column
        self.budgets: dict[Purpose, int] = {"calibration": budgets[0], "evaluation": budgets[1]}
        self.reached: dict[Purpose, int] = {}
        self.given: Any = None
        for purpose, budget in self.budgets.items():
            if budget < 1:
                raise ConfigError(
                    f"{purpose}_{self.unit} is {budget}, expected at least 1 (--data.{purpose}_{self.unit})"
                )

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
        split = self.splits[purpose]
        if split is None:
            try:
                return self._opened("validation")
            except DataError as error:
                if not re.search("Unknown split|Bad split", str(error)):
                    raise
            rank_zero_info(f"{self.name} has no split 'validation': what calibration leaves is evaluated")
            split = self.splits[purpose] = self.splits["calibration"]
        return self._opened(split)

    def content(self, row: Mapping[str, Any]) -> bytes:
        """The bytes by which a row is known: equal ones never serve both purposes."""
        return "\0".join(str(row[column]) for column in self.columns).encode(errors="surrogatepass")

    def filled(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], Hashable]]:
        """The rows that lack nothing, each with its cluster: the value of the cluster column, or else its number.

        Raises:
            DataError: if a column is missing, or a row can't be read.
        """
        own = () if self.cluster_column is None else (self.cluster_column,)
        with loading(self.name, DataError):
            for number, row in enumerate(rows):
                if missing := [column for column in (*self.columns, *own) if column not in row]:
                    raise DataError(
                        f"{self.name} has no column {missing[0]!r}, it has {', '.join(sorted(row))} (--data)"
                    )
                if self.passes_blanks and any(_is_blank(row[column]) for column in self.columns):
                    continue
                cluster = None if self.cluster_column is None else row[self.cluster_column]
                yield row, number if cluster is None else repr(cluster)

    def fresh(self, purpose: Purpose, rows: Any) -> Iterator[tuple[Mapping[str, Any], bytes, Hashable]]:
        """The rows that may serve a purpose, each with its content and cluster. Labels become the target's classes."""
        index = self._class_index(rows, self.label_column) if self.label_column else None
        for row, cluster in self.filled(rows):
            content = self.content(row)
            if self.may_use(content, purpose):
                label = {self.label_column: index(row[self.label_column])} if index else {}
                yield {**row, **label}, content, cluster

    def taken(self, purpose: Purpose, found: Iterable[T], size: Callable[[T], int] = lambda one: 1) -> list[T]:
        """As many of the found as reach the budget by their sizes; DataError if they end before."""
        kept, self.reached[purpose] = [], 0
        for one in found:
            kept.append(one)
            self.reached[purpose] += size(one)
            if self.reached[purpose] >= self.budgets[purpose]:
                return kept
        raise DataError(
            f"{self.name} gives {self.reached[purpose]:,} {purpose} {self.unit}, expected {self.budgets[purpose]:,}; "
            f"bring more or lower --data.{purpose}_{self.unit}"
        )

    def describe(self) -> dict[str, Any]:
        """Adds the budgets that were asked and reached."""
        both = {
            purpose: {"asked": self.budgets[purpose], "reached": self.reached.get(purpose)} for purpose in self.examples
        }
        return super().describe() | {f"{purpose}_{self.unit}": one for purpose, one in both.items()}

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
