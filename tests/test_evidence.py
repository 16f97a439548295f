"""Evidence of single units against plain hooks, and what it tells of a head whose work is known."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from lightning_ablate import AblationCallback, ConditionalMean, EachHead
from tests import demos, reference, tiny

RIDGE = 0.01
METHODS = ["zero", "mean", ConditionalMean(RIDGE)]
SITES = {
    "vit": "blocks.1.attn.proj",
    "gpt2": "transformer.h.1.attn.c_proj",
    "roberta": "roberta.encoder.layer.1.attention.output.dense",
    "mistral": "model.layers.1.self_attn.o_proj",
}


def prepared(name):
    """A module, batches of calibration and of evaluation."""
    if name == "mistral":
        module = tiny.built(tiny.Own(tiny.mistral()))
        return module, None, [tiny.loader(30, 6, seed) for seed in (1, 2)]
    module, data = demos.module_of(name), demos.data_of(name, 3000)
    if name == "vit":
        data.calibration_images, data.evaluation_images = 300, 60
    data.trainer = type("Trainer", (), {"lightning_module": module, "global_rank": 0, "world_size": 1})()
    return module, data, [demos.batches(module, data._loader(kind)) for kind in ("calibration", "evaluation")]


def change(x, mask, method):
    """What plain hooks put in a unit's place."""
    if isinstance(method, ConditionalMean):
        return reference.conditional_mean(x, mask, RIDGE)
    return reference.put(mask, torch.zeros(len(mask)) if method == "zero" else x.double().mean(0).float())


def at_scored(x, batch):
    """Activations where something is asked, or the mean over an image's tokens."""
    if "labels" in batch:
        return x[batch["labels"] != -100]
    if "label" in batch:
        return x.mean(1)
    real = batch["attention_mask"].bool()
    return x[:, :-1][real[:, :-1] & real[:, 1:]]


@pytest.mark.parametrize("name", SITES)
def test_changes_activations_and_classes_equal_those_of_plain_hooks(tmp_path, name):
    module, data, (calibration, evaluation) = prepared(name)
    path, model = SITES[name], module.target
    x = reference.raw_activations(model, calibration, [path])[path]
    units = [f"{path} head 1", f"{path} neuron 5"]
    callback = AblationCallback(METHODS, sites=[path], neurons=EachHead(), explain=units, explain_examples=10_000)
    trainer = tiny.trainer(tmp_path, callback)
    fitted = trainer.fit(module, datamodule=data) if data else trainer.fit(module, calibration, evaluation)
    assert fitted is None
    width, heads = x.shape[1], callback.run.calibration.sites[0].heads
    masks = [torch.arange(width) // (width // heads) == 1, torch.arange(width) == 5]
    gathered, rows = callback.results.gathered, callback.results.table
    for unit, mask in zip(units, masks, strict=True):
        for method in METHODS:
            own = gathered.evidence[(gathered.evidence["unit"] == unit)]
            own = own[own["method"] == (method if isinstance(method, str) else method.name)]
            before, after, told, activation = [], [], 0.0, []
            for batch in evaluation:
                seen = {}
                with torch.no_grad():
                    with reference.plain_hooks(model, {path: lambda a, seen=seen: seen.update(x=a)}):
                        clean, targets = reference.scored(model, batch)
                    with reference.plain_hooks(model, {path: change(x, mask, method)}):
                        ablated, _ = reference.scored(model, batch)
                before.append(functional.cross_entropy(clean.double(), targets, reduction="none"))
                after.append(functional.cross_entropy(ablated.double(), targets, reduction="none"))
                told = told + (clean.double().log_softmax(1) - ablated.double().log_softmax(1)).sum(0)
                mean = x.double().mean(0).float()
                norm = (
                    (seen["x"] - mean)[..., mask].norm(dim=-1, keepdim=True) if mask.sum() > 1 else seen["x"][..., mask]
                )
                activation.append(at_scored(norm, batch).squeeze(-1))
            before, after, activation = map(torch.cat, (before, after, activation))
            assert np.abs(own["clean"].to_numpy() - before.numpy()).max() < 1e-5
            assert np.abs(own["change"].to_numpy() - (after - before).numpy()).max() < 1e-5
            assert np.abs(
                own["activation"].to_numpy() - activation.numpy()
            ).max() < 1e-6 * activation.abs().max().clamp_min(1)
            promoted = gathered.promoted[
                (gathered.promoted["unit"] == unit) & (gathered.promoted["method"] == own["method"].iloc[0])
            ]
            expected = (told / len(before)).numpy()
            assert np.abs(promoted["change"].to_numpy() - expected[promoted["class"]]).max() < 1e-5
            assert promoted["change"].max() == pytest.approx(expected.max(), abs=1e-5)
            assert promoted["change"].min() == pytest.approx(expected.min(), abs=1e-5)
            if "head" in unit:  # the sweep ablated it as well
                (row,) = rows[(rows["method"] == own["method"].iloc[0]) & (rows["head"] == 1)].itertuples()
                base = callback.results.baseline["cross_entropy"]
                assert own["clean"].mean() + own["change"].mean() == pytest.approx(row.cross_entropy, abs=1e-9)
                assert own["clean"].mean() == pytest.approx(base, abs=1e-9) and len(own) == row.n
