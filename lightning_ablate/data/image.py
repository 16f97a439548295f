"""Images from any source that `datasets` can read, preprocessed as the target wants them."""

from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_ablate.data.base import Examples, Purpose, SourceData
from lightning_ablate.data.source import rows
from lightning_ablate.errors import ConfigError, DataError, loading


class ImageData(SourceData):
    """Labelled images: the calibration images first, then the evaluation images from what is left.

    Args:
        name: a hub name, a local folder, or files or a glob of parquet, json, jsonl, csv or txt.
        image_column: the column with the images.
        label_column: the column with the class indices.
        calibration_images: budget of images.
        evaluation_images: budget of images.
        batch_size: images per forward pass and process.
        options: see :class:`SourceData`.
    """

    def __init__(
        self,
        name: str,
        *,
        image_column: str = "image",
        label_column: str = "label",
        calibration_images: int = 512,
        evaluation_images: int = 1_000,
        batch_size: int = 64,
        **options: Any,
    ) -> None:
        super().__init__(name, "images", (calibration_images, evaluation_images), batch_size=batch_size, **options)
        self.image_column, self.label_column = image_column, label_column

    def load(self, purpose: Purpose) -> Examples:
        """Takes images until the budget is reached; DataError if they end before, or have no class index."""
        images = self.taken(purpose, ((row, 1) for row in self._fresh(purpose)))
        contents = [encoded(image) + f" {label}".encode() for image, label in images]
        return Examples(list(enumerate(images)), contents, self._decoded)

    def _fresh(self, purpose: Purpose) -> Iterator[tuple[dict[str, Any], int]]:
        """The undecoded images that are free for the purpose, and their classes."""
        import datasets

        next(rows(self.source(purpose).take(1), self.name, self.image_column, self.label_column), None)
        source = self.source(purpose).cast_column(self.image_column, datasets.Image(decode=False))
        for row in rows(source, self.name):
            image, label = row[self.image_column], row[self.label_column]
            if not isinstance(label, int):
                raise DataError(f"{self.name} holds {label!r} in {self.label_column!r}, expected a class index")
            if self.may_use(encoded(image), purpose):
                yield image, label

    def _decoded(self, row: tuple[int, tuple[dict[str, Any], int]]) -> dict[str, Tensor]:
        """``pixel_values`` ``(channels, height, width)`` float32 and ``label`` ``()`` int64."""
        from PIL import Image

        place, (image, label) = row
        with loading(f"image {place} of {self.name}", DataError):
            pixels = self._transform()(Image.open(BytesIO(encoded(image))))
            return {"pixel_values": pixels, "label": torch.tensor(label)}

    def _transform(self) -> Callable[[Any], Tensor]:
        transform = getattr(getattr(self.trainer, "lightning_module", None), "transform", None)
        if transform is None:
            raise ConfigError(
                "images need the target's preprocessing: give its module a `transform` of an image, or other --data"
            )
        return transform


def encoded(image: dict[str, Any]) -> bytes:
    """The bytes of a file, from an undecoded image."""
    return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
