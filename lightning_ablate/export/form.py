"""How a target of transformers or timm is built again under other options of its configuration, and saved."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_ablate.errors import SiteError
from lightning_ablate.sites import Site

Options = dict[str, Any]


class Form:
    """Builds a target of transformers again, and saves it.

    ``known`` are the target's own options, ``options`` those that were changed so far, and ``key_heads`` the number of
    key and value heads where several heads share one.
    """

    def __init__(self, target: nn.Module) -> None:
        self.target, self.options = cast(Any, target), Options()
        self.shapes = {name: tensor.shape for name, tensor in target.state_dict().items()}
        self.name, self.known, self.key_heads = self.described()

    def described(self) -> tuple[str, Options, int | None]:
        """The name of the architecture, the target's own options, and its ``key_heads``."""
        known = self.target.config.to_dict()
        return type(self.target).__name__, known, known.get("num_key_value_heads")

    def build(self, options: Options) -> nn.Module:
        """A model with random weights."""
        config = copy.deepcopy(self.target.config)
        for name, value in options.items():
            setattr(config, name, value)
        type(config).from_dict(config.to_dict())  # raises if a saved model couldn't be loaded
        return type(self.target)._from_config(config, dtype=self.target.dtype)

    def narrower(self, site: Site, kept: Tensor) -> Iterator[Options]:
        """Options that may make a site as narrow as its kept neurons, ``(neurons,)`` bool."""
        width, more = int(kept.sum()), Options()
        if site.heads is not None:
            size = site.width // site.heads
            width, more = width // size, {"head_dim": size}
            if self.key_heads is not None:
                more["num_key_value_heads"] = kept_key_heads(site, kept, self.key_heads)
        for name, value in self.known.items():
            if site.heads is None and (value == site.width or (value is None and ("inner" in name or "inter" in name))):
                yield {name: width}
            elif site.heads is not None and value == site.heads and name not in more:
                yield {name: width, **more}

    def biased(self) -> Iterator[Options]:
        """Options that may give projections a bias."""
        yield from ({name: True} for name, value in self.known.items() if value is False and "bias" in name)

    def probe(self) -> dict[str, Tensor]:
        """A random input, by argument of the target."""
        config, generator = self.target.config, torch.Generator().manual_seed(0)
        if self.target.main_input_name == "pixel_values":
            size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
            pixels = torch.randn(2, getattr(config, "num_channels", 3), size, size, generator=generator)
            return {"pixel_values": pixels.to(self.target.dtype)}
        ids = torch.randint(config.vocab_size, (2, 12), generator=generator)
        return {"input_ids": ids, **({"decoder_input_ids": ids} if config.is_encoder_decoder else {})}

    def save(self, model: nn.Module, folder: Path) -> None:
        """Writes the model, so that its library loads it by the name of the folder."""
        made = cast(Any, model)
        if getattr(self.target, "generation_config", None) is not None:
            made.generation_config = self.target.generation_config
        made.save_pretrained(folder)

    def built(self, device: str, more: Options | None = None) -> nn.Module:
        """A model with random weights, under the options changed so far and ``more``."""
        with torch.device(device):
            return self.build(self.options | (more or {}))

    def adopt(self, candidates: Iterable[Options], fits: Callable[[nn.Module], bool]) -> nn.Module | None:
        """Keeps the first options that make a fitting model, and returns it without weights; None if none do."""
        for more in candidates:
            with suppress(Exception):  # a library raises anything for options that make no model
                if fits(model := self.built("meta", more)):
                    self.options |= more
                    return model
        return None


class _Timm(Form):
    def described(self) -> tuple[str, Options, int | None]:
        return self.target.pretrained_cfg["architecture"], dict(getattr(self.target, "_model_args", {})), None

    def build(self, options: Options) -> nn.Module:
        import timm

        given = self.known | {"pretrained_cfg": dict(self.target.pretrained_cfg)} | options
        return timm.create_model(self.name, **given).to(next(self.target.parameters()).dtype)

    def narrower(self, site: Site, kept: Tensor) -> Iterator[Options]:
        if site.heads is None:
            hidden = len(self.target.get_submodule(site.path).weight)
            yield {"mlp_ratio": int(kept.sum()) / hidden}
            yield {"mlp_ratio": (int(kept.sum()) + 0.5) / hidden}  # timm may round the product down

    def biased(self) -> Iterator[Options]:
        yield from ()

    def probe(self) -> dict[str, Tensor]:
        channels, *size = self.target.pretrained_cfg["input_size"]
        channels, size = self.known.get("in_chans", channels), self.known.get("img_size", size)
        size = [size, size] if isinstance(size, int) else size
        pixels = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))
        return {"x": pixels.to(next(self.target.parameters()).dtype)}

    def save(self, model: nn.Module, folder: Path) -> None:
        from timm.models import save_for_hf

        save_for_hf(model, str(folder), safe_serialization=True)


def form_of(target: nn.Module) -> Form:
    """The form of a target; SiteError if it is neither of transformers nor of timm."""
    if hasattr(target, "_from_config"):
        return Form(target)
    if hasattr(target, "pretrained_cfg"):
        return _Timm(target)
    raise SiteError(f"a {type(target).__name__} can't be built again: expected a model of transformers or timm")


def kept_key_heads(site: Site, kept: Tensor, key_heads: int) -> int:
    """How many of the key and value heads stay if the neurons ``kept`` ``(neurons,)`` bool do.

    SiteError if different numbers of the query heads that share one stay.
    """
    left = kept.view(key_heads, -1).sum(1)
    if int(left.min()) == int(left.max()):
        return key_heads
    if int(left[left > 0].min()) * key_heads < site.width:
        raise SiteError(
            f"of the heads that share a key and value head some go at {site.name}, and not as many everywhere: take "
            f"them together (--ablation.neurons.unit {site.width // key_heads})"
        )
    return int((left > 0).sum())
