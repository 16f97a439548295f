"""Opens anything that `datasets` can read: a hub name, a local folder, or local files."""

import glob
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_ablate.errors import DataError, loading

_BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text"}
_COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
_OPTIONS: dict[str, dict[str, Any]] = {
    "text": {"sample_by": "document"},
    "csv": {"keep_default_na": False, "na_values": [""]},  # `NA` and `null` are texts
}
_BUFFER = 10_000


def open_source(name: str, *, subset: str | None, split: str, streaming: bool) -> Any:
    """One split of a data set, or DataError; the options are those of :class:`~lightning_ablate.data.base.SourceData`.

    ``name`` is a hub name; a local folder (of data files, or written by ``save_to_disk``); or a file or glob of
    parquet, json, jsonl, csv or txt files, which are one split called ``train``. A txt file is one document.
    """
    import datasets

    path = Path(name)
    with loading(name, DataError, "--data"):
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return split_of(datasets.load_from_disk(name), split, name)
        builder, options = _builder(path), {"split": split, "streaming": streaming}
        if builder is None or (path.is_dir() and subset is not None):
            return datasets.load_dataset(name, subset, **options)
        if path.is_dir():  # which may hold characters that would be a pattern
            options["data_dir"] = glob.escape(name)
        elif path.is_file() or glob.has_magic(name):
            options["data_files"] = glob.escape(name) if path.is_file() else name
        else:
            raise DataError(f"the file {name!r} does not exist (--data.name)")
        return datasets.load_dataset(builder, **options, **_OPTIONS.get(builder, {}))


def given_rows(rows: Any, name: str) -> Any:
    """Rows in any of the usual forms as a data set of `datasets`, or DataError."""
    import datasets
    import pandas as pd

    with loading(name, DataError):
        if isinstance(
            rows, datasets.Dataset | datasets.IterableDataset | datasets.DatasetDict | datasets.IterableDatasetDict
        ):
            return rows
        if isinstance(rows, pd.DataFrame):
            return datasets.Dataset.from_pandas(rows, preserve_index=False)
        if isinstance(rows, Mapping):
            return datasets.Dataset.from_dict(dict(rows))
        found = [rows] if isinstance(rows, str) else list(rows)
        return datasets.Dataset.from_list([row if isinstance(row, Mapping) else {"text": row} for row in found])


def split_of(source: Any, split: str, name: str) -> Any:
    """The split of a dict of splits, or DataError; a source without splits as it is."""
    if isinstance(source, Mapping) and split not in source:
        raise DataError(f"Unknown split {split!r} of {name}, expected one of {', '.join(source)} (--data)")
    return source[split] if isinstance(source, Mapping) else source


def shuffled(source: Any, seed: int | None) -> Any:
    """A source in the order of a seed; a stream is shuffled within a buffer."""
    import datasets

    if seed is None:
        return source
    buffer = {"buffer_size": _BUFFER} if isinstance(source, datasets.IterableDataset) else {}
    return source.shuffle(seed=seed, **buffer)


def rows(source: Any, name: str, *columns: str) -> Iterator[dict[str, Any]]:
    """The rows of a source; DataError if a column is missing, or a row can't be read."""
    with loading(name, DataError):
        for row in source:
            if missing := [column for column in columns if column not in row]:
                raise DataError(f"{name} has no column {missing[0]!r}, it has {', '.join(sorted(row))} (--data)")
            yield row


def _builder(path: Path) -> str | None:
    """What reads a file, a glob, or a folder whose files are all of one kind; None for any other name."""
    files = [path]
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file() and not file.name.startswith(".")]
    kinds = set()
    for file in files:
        suffixes = [suffix.lower() for suffix in file.suffixes if suffix.lower() not in _COMPRESSED]
        kinds.add(_BUILDERS.get(suffixes[-1]) if suffixes else None)
    builder = kinds.pop() if len(kinds) == 1 else None
    return "imagefolder" if builder is None and path.is_dir() and glob.has_magic(str(path)) else builder
