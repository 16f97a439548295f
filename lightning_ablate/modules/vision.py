"""Image classifiers from timm or the Hugging Face hub, or from a local folder of either form."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lightning_ablate.demo import resolve
from lightning_ablate.errors import TargetError, loading
from lightning_ablate.metrics import Scored
from lightning_ablate.modules.base import exact_vectors
from lightning_ablate.modules.hub import HubModule, last_states
from lightning_ablate.seeds import seed_of
from lightning_ablate.shown import shown_image

ImageBatch = Mapping[str, Tensor]


class ImageClassifier(HubModule):
    """An image classifier of timm or transformers with the preprocessing it was trained with.

    Batches are mappings of ``pixel_values`` ``(batch, channels, height, width)`` float32, ``label`` ``(batch,)`` int64
    and ``index`` ``(batch,)`` int64, which is below 0 for examples that only fill a process's last batch.

    Args:
        name: a timm name (``vit_base_patch16_224``), a hub name, a local folder, or ``demo:vit``.
        library: whose model it is; by default a folder's ``config.json`` tells, and a name with a slash is that of
            transformers unless it begins with ``timm/`` or ``hf-hub:``.
    """

    facts = ("library",)

    def __init__(self, name: str, *, library: Literal["timm", "transformers"] | None = None, **options: Any) -> None:
        super().__init__(name, **options)
        self.library = library or _library_of(resolve(name))

    def build_target(self) -> nn.Module:
        """Loads it with timm or AutoModelForImageClassification."""
        if self._given:
            self.library = "transformers" if hasattr(self._given[0], "config") else "timm"
        if self._given or self.library == "transformers":
            return self.load("AutoModelForImageClassification")
        import timm

        name = resolve(self.name)
        prefix = "local-dir:" if Path(name).is_dir() else "hf-hub:" if name.startswith("timm/") else ""
        with loading(self.name, TargetError, "--model.name"):
            target = timm.create_model(prefix + name, pretrained=True)
            with exact_vectors(target):
                return target if self.dtype_name == "auto" else target.to(getattr(torch, self.dtype_name))

    def config_file(self, name: str) -> Mapping[str, Any]:
        """What config.json holds under a name; names of timm's own have none."""
        if self.library == "transformers":
            return super().config_file(name)
        if not Path(name).is_dir():
            if "/" not in name:
                return {}
            name = name.rpartition(":")[2]
        config = super().config_file(name)
        return {**config.get("pretrained_cfg", {}), **config}

    def evaluate(self, batch: ImageBatch) -> Scored:
        """One scored position an image."""
        output = self.target(self._pixels(batch))
        logits = output if isinstance(output, Tensor) else output.logits
        return Scored(logits, batch["label"], batch["index"])

    def shown(self, batch: ImageBatch) -> list[dict[str, Any]]:
        """A small picture of each image, and its class."""
        labels = self.class_texts(batch["label"].tolist())
        pictures = map(shown_image, batch["pixel_values"])
        return [{"picture": one, "label": label} for one, label in zip(pictures, labels, strict=True)]

    def probes(self, batch: ImageBatch) -> tuple[ImageBatch, ImageBatch]:
        """The first image, and the same with another pixel near its middle, where overlapping windows share it."""
        one = {name: tensor[:1] for name, tensor in batch.items()}
        pixels = one["pixel_values"].clone()
        # a change so large that its effect exceeds the rounding of low precision
        pixels[:, :, pixels.shape[2] // 2 | 1, pixels.shape[3] // 2 | 1] += 100.0
        return one, {**one, "pixel_values": pixels}

    def hidden(self, batch: ImageBatch) -> Sequence[Tensor]:
        """The last layer's tokens."""
        target: Any = self.target
        if self.library == "transformers":
            return last_states(target(self._pixels(batch), output_hidden_states=True))
        tokens = target.forward_features(self._pixels(batch))
        if isinstance(tokens, Tensor) and tokens.ndim == 4 and tokens.shape[-1] != target.num_features:
            tokens = tokens.movedim(1, -1)  # some models put the features before height and width
        return [tokens] if isinstance(tokens, Tensor) else tokens

    @cached_property
    def transform(self) -> Callable[[Any], Tensor]:
        """Maps a PIL image to what the target takes, ``(channels, height, width)`` float32; it can be pickled."""
        if self.library == "transformers":
            config = cast(Any, self.target).config
            parts = (config, *(getattr(config, name, None) for name in ("vision_config", "backbone_config")))
            channels = next((one for part in parts if (one := getattr(part, "num_channels", None))), 3)
            return partial(_transformed, channels, partial(_processed, self._processor, channels))
        from timm.data import create_transform, resolve_data_config

        options = resolve_data_config({}, model=self.target)
        return partial(_transformed, options["input_size"][0], create_transform(**options))

    def save_processor(self, folder: Path) -> None:
        """Writes the image processor. timm has its options in the configuration."""
        if self.library == "transformers":
            self._processor.save_pretrained(folder)

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

    @cached_property
    def _processor(self) -> Any:
        return self.pretrained("AutoImageProcessor")

    def _pixels(self, batch: ImageBatch) -> Tensor:
        return batch["pixel_values"].to(next(self.target.parameters()).dtype)


def in_channels(image: Any, channels: int) -> Any:
    """A PIL image in the target's channels, or ValueError where these can't hold it without loss."""
    mode, advice = {1: "L", 3: "RGB"}.get(channels), "bring images of 8 bits a channel"
    if mode is None:
        fits = len(image.getbands()) == channels
    elif fits := not image.mode.startswith(("I", "F")):  # which have more than 8 bits a channel
        advice = f"convert them, or have them converted (--data.mode {mode})"
        whole = image.convert("RGBA")
        converted = whole.convert(mode)
        fits = converted.convert("RGBA").tobytes() == whole.tobytes()
        image = converted if fits else image
    if not fits:
        raise ValueError(f"mode {image.mode} can't be given to a target of {channels} channels without loss; {advice}")
    return image


def _transformed(channels: int, transform: Callable[[Any], Tensor], image: Any) -> Tensor:
    return transform(in_channels(image, channels))


def _processed(processor: Any, channels: int, image: Any) -> Tensor:
    grey = {"do_convert_rgb": False, "input_data_format": "channels_first"} if channels == 1 else {}
    return processor(image, return_tensors="pt", **grey)["pixel_values"][0]


def _library_of(name: str) -> Literal["timm", "transformers"]:
    config = Path(name) / "config.json"
    if config.is_file():
        return "timm" if "architecture" in json.loads(config.read_text(encoding="utf-8")) else "transformers"
    return "transformers" if "/" in name and not name.startswith(("timm/", "hf-hub:", "hf_hub:")) else "timm"
