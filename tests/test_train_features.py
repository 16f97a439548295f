"""The sparse autoencoder of the embedded GPT-2, in a short form."""

import json

import pytest
import torch

from lightning_ablate import Features
from tests import train_features


def test_a_short_training_reconstructs_and_is_read_back(tmp_path):
    x = train_features.activations(3_000)
    weights = train_features.trained(x, 256, 16, 150)
    untrained = train_features.trained(x, 256, 16, 0)
    shares = [train_features.explained(x, one, 16) for one in (untrained, weights)]
    assert shares[1] > 0.5 and shares[1] > shares[0] + 0.2
    train_features.save(tmp_path, weights, 16)
    basis = Features(str(tmp_path))
    units = basis.read(x[:100])
    assert basis.width == 256 and int((units > 0).sum(1).max()) == 16
    rebuilt = basis.write(torch.zeros(100, 128), torch.zeros_like(units), units) + weights["b_dec"]
    error = (rebuilt - x[:100]).square().sum() / (x[:100] - x.mean(0)).square().sum()
    assert 1 - float(error) == pytest.approx(train_features.explained(x[:100], weights, 16), abs=0.05)
    assert json.loads((tmp_path / "cfg.json").read_text())["architecture"] == "topk"
