"""Images from any data set that `datasets` reads, preprocessed as the target wants them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_ablate.data.base import Purpose
from lightning_ablate.data.examples import Examples, joined
from lightning_ablate.data.rows import RowData
from lightning_ablate.errors import ConfigError, DataError, loading


@dataclass(kw_only=True, eq=False, repr=False)
class ImageData(RowData):
    """Images with a class. Rows that lack an image or a class are passed over.

    Args:
        image_column: the column with the images.
        label_column: the column with the class indices or names.
        mode: of Pillow, to which images are converted (``RGB``, ``L``); None keeps their own. Images that don't fit the
            target's channels without loss are refused.
        calibration_images: images that calibrate.
        evaluation_images: images that are evaluated.
    """

    image_column: str = "image"
    label_column: str = "label"
    mode: str | None = None
    calibration_images: int = 512
    evaluation_images: int = 1_000
    batch_size: int = 64

    unit = "images"
    facts = (*RowData.facts, "mode")

    def load(self, purpose: Purpose) -> Examples:
        """Takes images until the budget is reached; DataError if they end before, or have no class."""
        import datasets

        rows = self.rows(purpose)
        if rows.features is None:
            raise DataError(f"{self.name} is a stream that doesn't tell its columns; give it features by .cast(...)")
        mode = self.mode or getattr(rows.features.get(self.image_column), "mode", None)
        if self.image_column in rows.features:
            rows = rows.cast_column(self.image_column, datasets.Image(decode=False))
        found = self.taken(purpose, self.fresh(purpose, rows))
        images = [(row[self.image_column], row[self.label_column]) for row, *_ in found]
        contents = [content + f" {label}".encode() for (_, content, _), (_, label) in zip(found, images, strict=True)]
        make = Decoded(self, datasets.Image(mode=mode))
        return Examples(list(enumerate(images)), contents, make, joined([cluster] for *_, cluster in found))

    def content(self, row: Mapping[str, Any]) -> bytes:
        """The bytes of the image's file, wherever `datasets` finds it."""
        from datasets.utils.file_utils import xopen

        image = row[self.image_column]
        if image["bytes"] is not None:
            return image["bytes"]
        with loading(f"{image['path']} of {self.name}", DataError), xopen(image["path"], "rb") as file:
            return file.read()


class Decoded:
    """Makes tensors of undecoded images.

    The module's ``transform`` is looked up at the first image, as the data are loaded before the target is built. A
    DataLoader's worker gets the transform alone, without module, data and trainer.
    """

    def __init__(self, data: ImageData, feature: Any) -> None:
        self.data, self.name, self.feature = data, data.name, feature

    def __call__(self, row: tuple[int, tuple[dict[str, Any], int]]) -> dict[str, Tensor]:
        """``pixel_values`` ``(channels, height, width)`` float32 and ``label`` ``()`` int64."""
        number, (image, label) = row
        with loading(f"{image['path'] or f'image {number}'} of {self.name}", DataError):
            pixels = self.transform(self.feature.decode_example(image))
        return {"pixel_values": pixels, "label": torch.tensor(label)}

    @cached_property
    def transform(self) -> Callable[[Any], Tensor]:
        """The target's preprocessing."""
        transform = getattr(self.data.module, "transform", None)
        if transform is None:
            raise ConfigError(
                "images need the target's preprocessing: give its module a `transform` of an image, or other --data"
            )
        return transform

    def __getstate__(self) -> dict[str, Any]:
        """The state that a worker needs."""
        return {"name": self.name, "feature": self.feature, "transform": self.transform}
