"""Opens anything that `datasets` can read: a hub name, a local folder, or local files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_ablate.errors import DataError, loading

_BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text"}
_COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
_BUFFER = 10_000


def open_source(name: str, *, subset: str | None, split: str, streaming: bool, shuffle_seed: int | None) -> Any:
    """One split of a data set, or DataError; the options are those of :class:`~lightning_ablate.data.base.SourceData`.

    ``name`` is a hub name; a local folder (of data files, or written by ``save_to_disk``); or a file or glob of
    parquet, json, jsonl, csv or txt files, which are one split called ``train``. A txt file is one document.
    """
    import datasets

    with loading(name, DataError, "--data"):
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            opened = datasets.load_from_disk(name)
            source = opened[split] if isinstance(opened, datasets.DatasetDict) else opened
        elif (builder := _builder(name)) is not None:
            extra = {"sample_by": "document"} if builder == "text" else {}
            source = datasets.load_dataset(builder, data_files=name, split=split, streaming=streaming, **extra)
        else:
            source = datasets.load_dataset(name, subset, split=split, streaming=streaming)
    if shuffle_seed is None:
        return source
    buffer = {"buffer_size": _BUFFER} if streaming else {}
    return source.shuffle(seed=shuffle_seed, **buffer)


def rows(source: Any, name: str, *columns: str) -> Iterator[dict[str, Any]]:
    """The rows of a source; DataError if a column is missing, or a row can't be read."""
    with loading(name, DataError):
        for row in source:
            if missing := [column for column in columns if column not in row]:
                raise DataError(f"{name} has no column {missing[0]!r}, it has {', '.join(sorted(row))} (--data)")
            yield row


def _builder(name: str) -> str | None:
    suffixes = [suffix for suffix in Path(name).suffixes if suffix not in _COMPRESSED]
    builder = _BUILDERS.get(suffixes[-1]) if suffixes else None
    if builder is not None and "*" not in name and not Path(name).is_file():
        raise DataError(f"the file {name!r} does not exist (--data.name)")
    return builder
