"""A sparse autoencoder of the embedded GPT-2, as SAELens saves it: ``python -m tests.train_features FOLDER``."""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from lightning_ablate.sites import find_sites, hooked
from tests import demos

BLOCK = "transformer.h.1"


def activations(tokens: int) -> Tensor:
    """What the block returns on the embedded data, ``(positions, features)`` float32, without padding."""
    module, data = demos.module_of("gpt2"), demos.data_of("gpt2", tokens)
    data.trainer = type("Trainer", (), {"lightning_module": module, "global_rank": 0, "world_size": 1})()
    kept: list[Tensor] = []
    for batch in demos.batches(module, data._loader("calibration")):
        (site,) = find_sites(module.target, lambda batch=batch: module.evaluate(batch), f"{BLOCK}:output")
        real = batch["attention_mask"].bool()
        with torch.no_grad(), hooked(module.target, {site: lambda x, real=real: kept.append(x[real])}):
            module.hidden(batch)
    return torch.cat(kept)


def trained(x: Tensor, width: int, k: int, steps: int) -> dict[str, Tensor]:
    """The weights of a TopK autoencoder (Gao et al. 2024, arXiv 2406.04093), by Adam on the squared error."""
    torch.manual_seed(0)
    decoder = F.normalize(torch.randn(width, x.shape[1]), dim=1)
    weights = {"W_enc": decoder.T.clone(), "b_enc": torch.zeros(width), "W_dec": decoder, "b_dec": x.mean(0)}
    for weight in weights.values():
        weight.requires_grad_()
    optimizer = torch.optim.Adam(weights.values(), lr=1e-3)
    for _ in range(steps):
        rows = x[torch.randint(len(x), (512,))]
        before = (rows - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
        largest = before.topk(k, dim=1)
        units = torch.zeros_like(before).scatter(1, largest.indices, largest.values.relu())
        loss = (units @ weights["W_dec"] + weights["b_dec"] - rows).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            weights["W_dec"].copy_(F.normalize(weights["W_dec"], dim=1))
    return {name: weight.detach() for name, weight in weights.items()}


def save(folder: Path, weights: dict[str, Tensor], k: int) -> None:
    """As SAELens saves one."""
    folder.mkdir(parents=True, exist_ok=True)
    width, features = weights["W_dec"].shape
    about = {"architecture": "topk", "d_in": features, "d_sae": width, "k": k, "dtype": "float32", "device": "cpu"}
    about |= {"apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none"}
    (folder / "cfg.json").write_text(json.dumps(about | {"metadata": {"hook_name": BLOCK}}), encoding="utf-8")
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "sae_weights.safetensors")


def explained(x: Tensor, weights: dict[str, Tensor], k: int) -> float:
    """The share of the variance of activations that the autoencoder reconstructs."""
    before = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    largest = before.topk(k, dim=1)
    units = torch.zeros_like(before).scatter(1, largest.indices, largest.values.relu())
    error = (units @ weights["W_dec"] + weights["b_dec"] - x).square().sum()
    return 1 - float(error / (x - x.mean(0)).square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a sparse autoencoder of the embedded GPT-2.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--tokens", type=int, default=120_000)
    given = parser.parse_args()
    x = activations(given.tokens)
    weights = trained(x, given.width, given.k, given.steps)
    save(given.folder, weights, given.k)
    print(f"{len(x):,} positions, {explained(x, weights, given.k):.1%} of the variance reconstructed: {given.folder}")


if __name__ == "__main__":
    main()
