"""Image classifiers from timm or the Hugging Face hub, or from a local folder of either form."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lightning_ablate.data.labels import names_of
from lightning_ablate.demo import resolve
from lightning_ablate.errors import DataError, TargetError, loading
from lightning_ablate.metrics import Scored
from lightning_ablate.modules.base import exact_vectors
from lightning_ablate.modules.hub import HubModule, last_states
from lightning_ablate.seeds import seed_of

ImageBatch = Mapping[str, Tensor]


def in_channels(image: Any, channels: int) -> Any:
    """A PIL image in a target's channels where these can hold it without loss, or DataError."""
    advice = "bring images of 8 bits a channel"
    if channels not in (1, 3):
        fits = len(image.getbands()) == channels
    elif fits := not image.mode.startswith(("I", "F")):
        advice = f"convert them, or have them converted (--data.mode {'L' if channels == 1 else 'RGB'})"
        if image.has_transparency_data:
            image = image.convert("RGBA")
            fits = image.getchannel("A").getextrema()[0] == 255
        grey = image.mode in ("1", "L")
        image = image.convert("L" if grey else "RGB") if fits else image
        if fits and channels == 1:
            fits = grey or len({band.tobytes() for band in image.split()}) == 1
        image = image.convert("RGB" if channels == 3 else "L") if fits else image
    if not fits:
        raise DataError(f"mode {image.mode} can't be given to a target of {channels} channels without loss; {advice}")
    return image


def _transformed(channels: int, transform: Callable[[Any], Tensor], image: Any) -> Tensor:
    return transform(in_channels(image, channels))


def _processed(processor: Any, channels: int, image: Any) -> Tensor:
    grey = {"do_convert_rgb": False, "input_data_format": "channels_first"} if channels == 1 else {}
    return processor(image, return_tensors="pt", **grey)["pixel_values"][0]


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

            target = timm.create_model(self._timm_name, pretrained=True)
            with exact_vectors(target):
                return target if self.dtype_name == "auto" else target.to(getattr(torch, self.dtype_name))

    @property
    def class_names(self) -> list[str] | None:
        """The target's names of its classes, where it has some."""
        if self.known is not None or self.library == "transformers":
            return super().class_names
        from timm.models import get_pretrained_cfg, load_model_config_from_hf

        with loading(self.name, TargetError, "--model.name"):
            scheme, _, name = self._timm_name.rpartition(":")
            if scheme == "local-dir":
                config = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
            else:
                config = load_model_config_from_hf(name)[0] if scheme else vars(get_pretrained_cfg(name) or object)
            return names_of(config.get("label_names") or config.get("pretrained_cfg", {}).get("label_names"))

    @property
    def _timm_name(self) -> str:
        name = resolve(self.name)
        if Path(name).is_dir():
            return f"local-dir:{name}"
        return f"hf-hub:{name}" if name.startswith("timm/") else name

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
        return last_states(self.target(pixels, output_hidden_states=True))

    @cached_property
    def transform(self) -> Callable[[Any], Tensor]:
        """Maps a PIL image to what the target takes, ``(channels, height, width)`` float32; it can be pickled."""
        if self.library == "transformers":
            config: Any = self.target.config
            parts = (config, *(getattr(config, name, None) for name in ("vision_config", "backbone_config")))
            channels = next((one for part in parts if (one := getattr(part, "num_channels", None))), 3)
            return partial(_transformed, channels, partial(_processed, self.beside("AutoImageProcessor"), channels))
        from timm.data import create_transform, resolve_data_config

        config = resolve_data_config({}, model=self.target)
        return partial(_transformed, config["input_size"][0], create_transform(**config))

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
