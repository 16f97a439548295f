"""Images from any source that `datasets` can read, preprocessed as the target wants them."""

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_ablate.data.base import Examples, Purpose, SourceData, budgets_of
from lightning_ablate.data.source import rows
from lightning_ablate.errors import ConfigError, DataError, loading


class Images(Examples):
    """Encoded images and their labels, decoded and transformed when asked for.

    Args:
        images: rows of an undecoded image column: mappings with ``bytes`` or ``path``.
        labels: the right classes.
        transform: maps a PIL image to ``(channels, height, width)`` float32.
    """

    def __init__(
        self, images: Sequence[dict[str, Any]], labels: Sequence[int], transform: Callable[[], Callable[[Any], Tensor]]
    ) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        """The number of images."""
        return len(self.labels)

    def example(self, index: int) -> dict[str, Tensor]:
        """``pixel_values`` ``(channels, height, width)`` float32 and ``label`` ``()`` int64."""
        from PIL import Image

        with loading(f"image {index}", DataError):
            image = Image.open(BytesIO(encoded(self.images[index])))
            return {"pixel_values": self.transform()(image), "label": torch.tensor(self.labels[index])}

    def content(self, index: int) -> bytes:
        """The encoded image and its label."""
        return encoded(self.images[index]) + f" {self.labels[index]}".encode()


class ImageData(SourceData):
    """Labelled images: the calibration images first, then the evaluation images from what is left.

    Args:
        name: see :func:`~lightning_ablate.data.source.open_source`.
        subset: which configuration of a hub data set.
        calibration_split: the split that calibrates.
        evaluation_split: the split that is evaluated; it may be the same one, as no image is used for both.
        image_column: the column with the images.
        label_column: the column with the class indices.
        streaming: reads only as far as the budgets need, without downloading the rest.
        shuffle_seed: shuffles the images with this seed, as many sources are sorted by class; None keeps their order.
        calibration_images: budget of images.
        evaluation_images: likewise.
        batch_size: images per forward pass and process.
        num_workers: processes that load batches ahead; 0 loads them in the main one.
    """

    def __init__(
        self,
        name: str,
        *,
        subset: str | None = None,
        calibration_split: str = "train",
        evaluation_split: str = "validation",
        image_column: str = "image",
        label_column: str = "label",
        streaming: bool = False,
        shuffle_seed: int | None = 0,
        calibration_images: int = 512,
        evaluation_images: int = 1_000,
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            name,
            subset=subset,
            calibration_split=calibration_split,
            evaluation_split=evaluation_split,
            streaming=streaming,
            shuffle_seed=shuffle_seed,
            batch_size=batch_size,
            num_workers=num_workers,
        )
        self.budgets = budgets_of("images", calibration_images, evaluation_images)
        self.image_column, self.label_column = image_column, label_column

    def load(self, purpose: Purpose) -> Images:
        """Takes images until the budget is reached.

        Raises:
            DataError: if the images end before, or have no class index.
        """
        import datasets

        with_images = rows(self.source(purpose).take(1), self.name, self.image_column, self.label_column)
        next(with_images, None)
        source = self.source(purpose).cast_column(self.image_column, datasets.Image(decode=False))
        images: list[dict[str, Any]] = []
        labels: list[int] = []
        for row in rows(source, self.name):
            if len(images) == self.budgets[purpose]:
                break
            image, label = row[self.image_column], row[self.label_column]
            if not isinstance(label, int):
                raise DataError(f"{self.name} holds {label!r} in {self.label_column!r}, expected a class index")
            if self.may_use(encoded(image), purpose):
                images.append(image)
                labels.append(label)
        if len(images) < self.budgets[purpose]:
            raise DataError(
                f"{self.name} gives {len(images):,} {purpose} images, expected {self.budgets[purpose]:,}; "
                f"bring more or lower --data.{purpose}_images"
            )
        return Images(images, labels, self._transform)

    def describe(self) -> dict[str, Any]:
        """Adds the budgets, which are always reached."""
        return super().describe() | {f"{purpose}_images": self.budgets[purpose] for purpose in self.examples}

    def _transform(self) -> Callable[[Any], Tensor]:
        module = self.trainer.lightning_module if self.trainer is not None else None
        transform = getattr(module, "transform", None)
        if transform is None:
            raise ConfigError("images need the target's preprocessing: give its module a `transform` (image to tensor)")
        return transform


def encoded(image: dict[str, Any]) -> bytes:
    """The bytes of a file, from an undecoded image."""
    return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
