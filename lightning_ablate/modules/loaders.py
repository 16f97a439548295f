"""The loaders of the evaluation data, and what their data tell of examples."""

from collections.abc import Sequence
from typing import Any

import lightning
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from lightning_ablate.errors import DataError


def evaluation_loaders(trainer: lightning.Trainer) -> list[Any]:
    """The validation loaders, in the order in which they are run."""
    loaders = trainer.val_dataloaders
    return [] if loaders is None else CombinedLoader(loaders, "sequential").flattened


def clusters_of(loader: Any, count: int) -> Sequence[int]:
    """The clusters of a loader's ``count`` examples: its data's ``clusters``, or each example by itself; DataError."""
    clusters = getattr(getattr(loader, "dataset", None), "clusters", None)
    clusters = range(count) if clusters is None else clusters
    if len(clusters) != count:
        raise DataError(f"the data's `clusters` are {len(clusters)}, expected one for each of {count} examples")
    return clusters
