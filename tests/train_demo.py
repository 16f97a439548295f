"""Trains the embedded targets, and a mixture: ``python -m tests.train_demo {gpt2,mixtral,roberta,vit} FOLDER``."""

import argparse
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_ablate.data.demo import digits, python_texts

LENGTH = 128


class Recipe(lightning.LightningModule):
    """Trains a network by the loss of a batch, in nats, with AdamW and a warm-up followed by a cosine decay."""

    def __init__(self, network: nn.Module, loss: Callable[[list[Tensor]], Tensor], peak: float, steps: int) -> None:
        super().__init__()
        self.network, self.loss, self.learning_rate, self.steps = network, loss, peak, steps

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW; weight decay on matrices only."""
        matrices = [p for p in self.network.parameters() if p.ndim > 1]
        others = [p for p in self.network.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.98))

        def rate(step: int) -> float:
            warm_up = 0.05 * self.steps
            return min(1.0, (step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / self.steps)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def run(self, data: TensorDataset, batch_size: int) -> None:
        loader = DataLoader(data, batch_size=batch_size, shuffle=True, drop_last=True)
        plain: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
        lightning.Trainer(**plain, max_steps=self.steps, max_epochs=-1, gradient_clip_val=1.0).fit(self, loader)
        self.network.eval()


def train_gpt2(folder: Path, steps: int = 1_500) -> None:
    """A GPT-2 of 4 layers and 128 features on Python's documentation and sources."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_positions": LENGTH, "n_embd": 128, "n_layer": 4, "n_head": 4}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    _train_causal(folder, lambda special: GPT2LMHeadModel(GPT2Config(**sizes, **dropout, **special)), steps)


def train_mixtral(folder: Path, steps: int = 1_500) -> None:
    """A mixture of 4 layers, 128 features and 8 experts of 128 neurons, two for each token, on the same text."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"max_position_embeddings": LENGTH, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": 8, "num_experts_per_tok": 2}
    balance = {"router_aux_loss_coef": 0.02, "output_router_logits": True}
    _train_causal(folder, lambda special: MixtralForCausalLM(MixtralConfig(**sizes, **balance, **special)), steps)


def _train_causal(folder: Path, made: Callable[[dict[str, int]], Any], steps: int) -> None:
    from transformers import GPT2TokenizerFast

    tokenizer = GPT2TokenizerFast(**_bpe(2_048, ["<|endoftext|>"]), model_max_length=LENGTH)
    ids = _token_rows(tokenizer.encode, [tokenizer.eos_token_id], LENGTH)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    model = made({"vocab_size": len(tokenizer), **special})
    recipe = Recipe(model, lambda batch: model(input_ids=batch[0], labels=batch[0]).loss, 3e-3, steps)
    recipe.run(TensorDataset(ids), batch_size=32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_roberta(folder: Path, steps: int = 3_000) -> None:
    """A RoBERTa of 4 layers and 128 features on the same text, 20% of the positions chosen."""
    from transformers import RobertaConfig, RobertaForMaskedLM, RobertaTokenizerFast

    words = _bpe(1_024, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer = RobertaTokenizerFast(**words, model_max_length=LENGTH)
    rows = _token_rows(lambda text: tokenizer.encode(text, add_special_tokens=False), [], LENGTH - 2)
    ends = torch.full((len(rows), 1), tokenizer.eos_token_id)
    ids = torch.cat([torch.full_like(ends, tokenizer.bos_token_id), rows, ends], dim=1)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": LENGTH + 2, "type_vocab_size": 1}
    sizes |= {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "pad_token_id", "eos_token_id")}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = RobertaForMaskedLM(RobertaConfig(**sizes, **special, **dropout))

    def loss(batch: list[Tensor]) -> Tensor:
        inputs = batch[0].clone()
        chosen = torch.rand(inputs.shape) < 0.2
        chosen[:, 0] = chosen[:, -1] = False
        fate = torch.rand(inputs.shape)
        inputs[chosen & (fate < 0.8)] = tokenizer.mask_token_id
        swapped = chosen & (fate >= 0.8) & (fate < 0.9)
        inputs[swapped] = torch.randint(5, len(tokenizer), (int(swapped.sum()),))
        hidden = model.roberta(inputs).last_hidden_state
        return F.cross_entropy(model.lm_head(hidden[chosen]), batch[0][chosen])

    Recipe(model, loss, 2.5e-3, steps).run(TensorDataset(ids), batch_size=32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_vit(folder: Path, steps: int = 3_000) -> None:
    """A ViT of 4 layers, 64 features and 16 patches on the digits, shifted, scaled, turned and dimmed a little."""
    import timm
    from timm.models import save_for_hf

    shape: dict[str, Any] = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4}
    shape["num_classes"] = 10
    levels = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0, "interpolation": "bilinear"}
    config = {**levels, "num_classes": 10, "license": "mit"}
    model = timm.create_model("vit_tiny_patch16_224", pretrained_cfg=config, drop_path_rate=0.1, **shape)
    data = digits("train").with_format("torch")[:]
    images, labels = torch.stack(list(data["image"])).float() / 255, torch.as_tensor(data["label"])

    def loss(batch: list[Tensor]) -> Tensor:
        logits = model((_jitter(batch[0]) - 0.5) / 0.5)
        return F.cross_entropy(logits, batch[1], label_smoothing=0.1)

    Recipe(model, loss, 2e-3, steps).run(TensorDataset(images, labels), batch_size=128)
    save_for_hf(model, str(folder), model_args=shape, safe_serialization=True)


def _jitter(images: Tensor) -> Tensor:
    n = len(images)
    angle = (torch.rand(n) - 0.5) * 0.5
    scale = 1 + (torch.rand(n, 2) - 0.5) * 0.3
    shift = (torch.rand(n, 2) - 0.5) * 0.5
    cos, sin = angle.cos(), angle.sin()
    rows = [torch.stack([cos * scale[:, 0], -sin * scale[:, 0], shift[:, 0]], 1)]
    rows += [torch.stack([sin * scale[:, 1], cos * scale[:, 1], shift[:, 1]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    return (moved * (0.8 + 0.4 * torch.rand(n, 1, 1, 1))).clamp(0, 1)


def _bpe(size: int, special: list[str]) -> dict[str, Any]:
    trained, options = ByteLevelBPETokenizer(), {"min_frequency": 2, "show_progress": False}
    trained.train_from_iterator(python_texts("train"), vocab_size=size, special_tokens=special, **options)
    with tempfile.TemporaryDirectory() as folder:
        merges = next(Path(path) for path in trained.save_model(folder) if path.endswith("merges.txt"))
        lines = merges.read_text(encoding="utf-8").splitlines()
    pairs = [tuple(line.split(" ")) for line in lines if not line.startswith("#version")]
    return {"vocab": trained.get_vocab(), "merges": pairs}


def _token_rows(encode: Callable[[str], list[int]], separator: list[int], length: int) -> Tensor:
    ids = [token for text in python_texts("train") for token in (*encode(text), *separator)]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


RECIPES: dict[str, Callable[..., None]] = {
    "gpt2": train_gpt2,
    "mixtral": train_mixtral,
    "roberta": train_roberta,
    "vit": train_vit,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=RECIPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, help="optimiser steps (default: the recipe's own)")
    arguments = parser.parse_args()
    lightning.seed_everything(0)
    RECIPES[arguments.target](arguments.folder, **({"steps": arguments.steps} if arguments.steps else {}))


if __name__ == "__main__":
    main()
