"""Image classifiers from timm or the Hugging Face hub, or from a local folder of either form."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lightning_ablate.choices import seed_of
from lightning_ablate.demo import resolve
from lightning_ablate.errors import TargetError, loading
from lightning_ablate.metrics import Scored
from lightning_ablate.modules.hub import HubModule

ImageBatch = Mapping[str, Tensor]


class ImageClassifier(HubModule):
    """An image classifier of timm or transformers with the preprocessing it was trained with.

    Batches are mappings of ``pixel_values`` ``(batch, channels, height, width)`` float32, ``label`` ``(batch,)`` int64
    and ``index`` ``(batch,)`` int64, the example's place in the data, below 0 for examples that only fill a rank's last
    batch.

    Args:
        name: a timm name (``vit_base_patch16_224``), a hub name, a local folder, or ``demo:vit``.
        library: whose model it is; by default a folder's ``config.json`` tells, and a name with a slash is that of
            transformers unless it begins with ``timm/`` or ``hf-hub:``.
        options: see :class:`HubModule`.
    """

    def __init__(self, name: str, *, library: Literal["timm", "transformers"] | None = None, **options: Any) -> None:
        super().__init__(name, **options)
        self.library = library or _library_of(resolve(name))

    def build_target(self) -> nn.Module:
        """Loads it with timm or AutoModelForImageClassification."""
        if self._given:
            self.library = "transformers" if hasattr(self._given[0], "config") else "timm"
        if self._given or self.library == "transformers":
            return self.load("AutoModelForImageClassification")
        with loading(self.name, TargetError, "--model.name"):
            import timm

            name = resolve(self.name)
            if Path(name).is_dir():
                name = f"local-dir:{name}"
            elif name.startswith("timm/"):
                name = f"hf-hub:{name}"
            target = timm.create_model(name, pretrained=True)
            return target if self.dtype_name == "auto" else target.to(getattr(torch, self.dtype_name))

    def evaluate(self, batch: ImageBatch) -> Scored:
        """One scored position an image."""
        output = self.target(batch["pixel_values"].to(next(self.target.parameters()).dtype))
        logits = output if isinstance(output, Tensor) else output.logits
        return Scored(logits, batch["label"], batch["index"])

    def probes(self, batch: ImageBatch) -> tuple[ImageBatch, ImageBatch]:
        """The first image, and the same with another pixel near its middle, where overlapping windows share it."""
        one = {name: tensor[:1] for name, tensor in batch.items()}
        pixels = one["pixel_values"].clone()
        # so much that no mixing stays below the rounding of low precision
        pixels[:, :, pixels.shape[2] // 2 | 1, pixels.shape[3] // 2 | 1] += 100.0
        return one, {**one, "pixel_values": pixels}

    def hidden(self, batch: ImageBatch) -> Sequence[Tensor]:
        """The last layer's tokens."""
        pixels = batch["pixel_values"].to(next(self.target.parameters()).dtype)
        if self.library == "timm":
            tokens, width = cast(Any, self.target).forward_features(pixels), cast(Any, self.target).num_features
            if isinstance(tokens, Tensor) and tokens.ndim == 4 and tokens.shape[-1] != width:
                tokens = tokens.movedim(1, -1)  # some give the features before height and width
            return [tokens] if isinstance(tokens, Tensor) else tokens
        return [self.target(pixels, output_hidden_states=True).hidden_states[-1]]

    @cached_property
    def transform(self) -> Callable[[Any], Tensor]:
        """Maps a PIL image to what the target takes, ``(channels, height, width)`` float32."""
        if self.library == "transformers":
            processor = self.beside("AutoImageProcessor")
            return lambda image: processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        from timm.data import create_transform, resolve_data_config

        config = resolve_data_config({}, model=self.target)
        transform, mode = create_transform(**config), "L" if config["input_size"][0] == 1 else "RGB"
        return lambda image: transform(image.convert(mode))

    def save_beside(self, folder: Path) -> None:
        """Writes the image processor, which timm has in its configuration."""
        if self.library == "transformers":
            self.beside("AutoImageProcessor").save_pretrained(folder)

    def source(self, kind: str, seed: int, batch: ImageBatch) -> ImageBatch:
        """One image of pixels drawn uniformly from the 256 levels, preprocessed as any other."""
        if kind != "pixels":
            return super().source(kind, seed, batch)
        from PIL import Image

        like = batch["pixel_values"]
        channels, *size = like.shape[1:]
        generator = torch.Generator().manual_seed(seed_of(seed, kind))
        levels = torch.randint(256, (*size, channels), dtype=torch.uint8, generator=generator).numpy()
        pixels = self.transform(Image.fromarray(levels.squeeze(-1) if channels == 1 else levels))
        index = batch["index"].new_zeros(1)
        return {"pixel_values": pixels.unsqueeze(0).to(like.device), "label": index, "index": index}

    def describe(self) -> dict[str, Any]:
        """Adds the library."""
        return super().describe() | {"library": self.library}


def _library_of(name: str) -> Literal["timm", "transformers"]:
    config = Path(name) / "config.json"
    if config.is_file():
        return "timm" if "architecture" in json.loads(config.read_text(encoding="utf-8")) else "transformers"
    return "transformers" if "/" in name and not name.startswith(("timm/", "hf-hub:", "hf_hub:")) else "timm"
