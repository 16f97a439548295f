"""Images from any source that `datasets` can read, preprocessed as the target wants them."""

from collections.abc import Callable, Hashable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_ablate.data.base import Purpose, SourceData
from lightning_ablate.data.examples import Examples, joined
from lightning_ablate.data.source import rows
from lightning_ablate.errors import ConfigError, DataError, loading


class ImageData(SourceData):
    """Labelled images: the calibration images first, then the evaluation images from what is left.

    `datasets` decodes them, so an EXIF orientation counts. Rows without an image or a class are passed over.

    Args:
        name: a hub name, a local folder, or files or a glob of parquet, json, jsonl, csv or txt.
        image_column: the column with the images.
        label_column: the column with the class indices or names.
        mode: of Pillow, to which images are converted (``RGB``, ``L``); None keeps their own. Images that don't fit the
            target's channels without loss are refused.
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
        mode: str | None = None,
        calibration_images: int = 512,
        evaluation_images: int = 1_000,
        batch_size: int = 64,
        **options: Any,
    ) -> None:
        super().__init__(name, "images", (calibration_images, evaluation_images), batch_size=batch_size, **options)
        self.image_column, self.label_column, self.mode = image_column, label_column, mode

    def load(self, purpose: Purpose) -> Examples:
        """Takes images until the budget is reached; DataError if they end before, or have no class."""
        import datasets

        source = self.source(purpose)
        if source.features is None:
            raise DataError(f"{self.name} is a stream that doesn't tell its columns; give it features by .cast(...)")
        features = source.features
        mode = self.mode or getattr(features.get(self.image_column), "mode", None)
        index = self.class_index(source, self.label_column)
        if self.image_column in features:
            source = source.cast_column(self.image_column, datasets.Image(decode=False))
        found = self.taken(purpose, ((one, 1) for one in self._fresh(purpose, source)))
        images = [(image, index(label)) for image, label, _ in found]
        contents = [encoded(image) + f" {label}".encode() for image, label in images]
        make = Decoded(self, datasets.Image(mode=mode))
        return Examples(list(enumerate(images)), contents, make, joined([key] for *_, key in found))

    def describe(self) -> dict[str, Any]:
        """Adds the mode."""
        return super().describe() | {"mode": self.mode}

    def _fresh(self, purpose: Purpose, source: Any) -> Iterator[tuple[dict[str, Any], Any, Hashable]]:
        """The undecoded images that are free for the purpose, their labels, and what they belong to."""
        columns = self.image_column, self.label_column, *self.cluster_columns
        for number, row in enumerate(rows(source, self.name, *columns)):
            image, label = row[self.image_column], row[self.label_column]
            if label is None or image is None or image["bytes"] is image["path"] is None:
                continue
            with loading(f"{image['path'] or f'row {number}'} of {self.name}", DataError):
                content = encoded(image)
            if self.may_use(content, purpose):
                yield image, label, self.cluster(row, number)


class Decoded:
    """Makes tensors of undecoded images, as a target's module wants them.

    The module's ``transform`` is asked for at the first image, as targets are built after their data are loaded. What a
    DataLoader's worker gets is that transform alone, without module, data and trainer.
    """

    def __init__(self, data: ImageData, feature: Any) -> None:
        self.data: ImageData | None = data
        self.name, self.feature = data.name, feature

    def __call__(self, row: tuple[int, tuple[dict[str, Any], int]]) -> dict[str, Tensor]:
        """``pixel_values`` ``(channels, height, width)`` float32 and ``label`` ``()`` int64."""
        place, (image, label) = row
        named = f"{image['path'] or f'image {place}'} of {self.name}"
        with loading(named, DataError):
            decoded = self.feature.decode_example(image)
            try:
                return {"pixel_values": self.transform(decoded), "label": torch.tensor(label)}
            except DataError as error:
                raise DataError(f"{named}: {error}") from error

    @cached_property
    def transform(self) -> Callable[[Any], Tensor]:
        """The target's preprocessing."""
        trainer = None if self.data is None else self.data.trainer
        transform = getattr(getattr(trainer, "lightning_module", None), "transform", None)
        if transform is None:
            raise ConfigError(
                "images need the target's preprocessing: give its module a `transform` of an image, or other --data"
            )
        return transform

    def __getstate__(self) -> dict[str, Any]:
        """What a worker needs."""
        return {"data": None, "name": self.name, "feature": self.feature, "transform": self.transform}


def encoded(image: dict[str, Any]) -> bytes:
    """The bytes of a file, from an undecoded image, wherever `datasets` finds it."""
    from datasets.utils.file_utils import xopen

    if image["bytes"] is not None:
        return image["bytes"]
    with xopen(image["path"], "rb") as file:
        return file.read()
