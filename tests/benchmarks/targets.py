"""Targets with random weights in the shapes of known models, the embedded ones, and batches for them."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_ablate import CausalLM, ImageClassifier
from lightning_ablate.data.base import AblationDataModule
from lightning_ablate.data.demo import Digits, PythonTexts
from lightning_ablate.modules import AblationModule

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL_OPT = {"hidden_size": 64, "ffn_dim": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
LARGE_OPT = {"hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24, "num_attention_heads": 32}


class Text(CausalLM):
    """A causal language model with random weights."""

    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__("random")
        self.make = make

    def build_target(self) -> Any:
        return on_device(self.make)

    def probes(self, batch: Any) -> None:
        """It has no tokenizer to make them with."""


class Image(ImageClassifier):
    """A ViT-B/16 with random weights."""

    def __init__(self) -> None:
        super().__init__("vit_base_patch16_224")

    def build_target(self) -> Any:
        import timm

        return on_device(lambda: timm.create_model(self.name))


def on_device(make: Callable[[], Any]) -> Any:
    """Made where it runs, in bfloat16 on a GPU."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    try:
        with torch.device(DEVICE):
            target = make()
    finally:
        torch.set_default_dtype(torch.float32)
    target.eval().requires_grad_(False)
    if hasattr(target, "config"):
        target.config.use_cache = False
    return target


def opt(**shape: int) -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(OPTConfig(**shape, word_embed_proj_dim=shape.get("hidden_size", 768)))


def mistral() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig())


MAKERS: dict[str, Callable[[], AblationModule]] = {
    "digits": lambda: ImageClassifier("demo:vit"),
    "gpt2": lambda: CausalLM("demo:gpt2"),
    "tiny": lambda: Text(lambda: opt(**SMALL_OPT)),
    "opt-125m": lambda: Text(opt),
    "vit-b16": Image,
    "opt-1.3b": lambda: Text(lambda: opt(**LARGE_OPT)),
    "mistral-7b": lambda: Text(mistral),
}
EMBEDDED: dict[str, Callable[[], AblationDataModule]] = {"digits": Digits, "gpt2": PythonTexts}


def batches(shape: str, module: AblationModule, tokens: int, batch: int, length: int) -> list[dict[str, Tensor]]:
    """The embedded data, or random tokens or pixels: ``tokens`` counts images for a ViT."""
    if shape in EMBEDDED:
        data = EMBEDDED[shape]()
        data.trainer = type("Trainer", (), {"lightning_module": module, "global_rank": 0, "world_size": 1})()
        module.configure_model()
        made = list(data.val_dataloader())
    else:
        generator, made = torch.Generator().manual_seed(0), []
        for number in range(max(1, tokens // (batch * (1 if shape == "vit-b16" else length)))):
            index = torch.arange(batch) + number * batch
            if shape == "vit-b16":
                pixels = torch.randn(batch, 3, 224, 224, generator=generator)
                made.append({"pixel_values": pixels, "label": torch.randint(1000, (batch,)), "index": index})
            else:
                ids = torch.randint(1000, (batch, length), generator=generator)
                made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "index": index})
    return [{name: tensor.to(DEVICE) for name, tensor in one.items()} for one in made]


def loader(made: list[dict[str, Tensor]]) -> DataLoader[Any]:
    """The batches as they are."""
    return DataLoader(made, batch_size=None)  # type: ignore[arg-type]


@torch.no_grad()
def bare(target: Any, batch: dict[str, Tensor]) -> tuple[float, int]:
    """One forward pass with a plain cross-entropy and argmax: their sums."""
    if "pixel_values" in batch:
        output = target(batch["pixel_values"].to(next(target.parameters()).dtype))
        logits, labels = output if isinstance(output, Tensor) else output.logits, batch["label"]
    else:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = target(input_ids=ids, attention_mask=mask).logits[:, :-1].flatten(0, 1)
        labels = torch.where(mask[:, 1:] > 0, ids[:, 1:], -100).flatten()
    loss = functional.cross_entropy(logits.float(), labels, reduction="sum")
    return loss.item(), int((logits.argmax(1) == labels).sum())


def seconds(run: Callable[[], object]) -> float:
    """How long something takes."""
    wait()
    began = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - began


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def repeat(run: Callable[[], object], times: int) -> None:
    for _ in itertools.repeat(None, times):
        run()
