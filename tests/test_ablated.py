"""A target under an ablation, without a Trainer, against plain hooks."""

import pytest
import torch

from lightning_ablate import AblationCallback, Calibration, ConditionalMean, Mean, Peak, Site, Zero, ablated
from lightning_ablate.errors import SiteError, TargetError
from tests import reference, tiny

RIDGE = 0.01  # the few positions of these tests would leave the regression to the rounding of float32
METHODS = [Zero(), Mean(), Peak(), ConditionalMean(RIDGE)]
PATH, HALF = "transformer.h.1.attn.c_proj", torch.arange(16) < 8


def sharpened(make):
    """A target whose attention looks at some positions more than at others."""
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim == 2 and parameter.std() < 0.1 else 1)
    return model


def prepared(make, method):
    """A target, its calibration, masks of half of the neurons, and what plain hooks change for the method."""
    model, seen, changes = sharpened(make), {}, {}
    calibration = tiny.calibrated(model, *METHODS)
    masks = {site.name: torch.rand(site.width) < 0.5 for site in calibration.sites}
    with reference.plain_hooks(model, {path: lambda x, path=path: seen.update({path: x}) for path in masks}):
        tiny.run(model)
    for path, mask in masks.items():
        x = seen[path].flatten(0, -2).double()
        values = {"zero": torch.zeros(len(mask)), "mean": x.mean(0), "peak": reference.peaks(x)}.get(method.name)
        changes[path] = reference.conditional_mean(x, mask, RIDGE) if values is None else reference.put(mask, values)
    return model, calibration, masks, changes


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("make", [tiny.gpt2, tiny.mistral, tiny.vit])
def test_it_equals_plain_hooks_and_generates_with_a_cache_what_recomputing_every_position_gives(make, method):
    model, calibration, masks, changes = prepared(make, method)
    clean, ids = tiny.run(model), tiny.tokens(2, 6, seed=5)["input_ids"]
    with pytest.raises(RuntimeError, match="inside"), ablated(model, masks, method, calibration):
        found = tiny.run(model)
        raise RuntimeError("inside")
    with reference.plain_hooks(model, changes):
        expected = tiny.run(model)
    assert float((found - expected).norm()) < 1e-6 * float(expected.norm())
    assert float((found - clean).abs().max()) > 0.01 and reference.hooks(model) == 0
    if make == tiny.vit:
        return
    model.generation_config.eos_token_id = None
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    with ablated(model, masks, method, calibration):
        generated = model.generate(ids, **options)
    untouched = model.generate(ids, **options)
    with torch.no_grad(), reference.plain_hooks(model, changes):
        for _ in range(8):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, ids) and not torch.equal(untouched, ids)


def test_each_use_of_a_module_that_runs_again_is_named_by_its_number():
    model, seen, runs = sharpened(tiny.albert), [], []
    calibration = tiny.calibrated(model, Mean())
    layer = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    path, kind = f"{layer}.attention.dense", "self-attention"
    assert calibration.sites == tuple(Site(path + n, 16, 4, kind, layer + n, uses=3) for n in ("", "#1", "#2"))
    with reference.plain_hooks(model, {path: seen.append}):
        clean = tiny.run(model)
    change = reference.put(HALF, seen[1].double().flatten(0, 1).mean(0).float())
    with reference.plain_hooks(model, {path: lambda x: runs.append(x) or (change(x) if len(runs) == 2 else None)}):
        expected = tiny.run(model)
    with ablated(model, {f"{path}#1": HALF}, "mean", calibration):
        torch.testing.assert_close(tiny.run(model), expected, rtol=0, atol=1e-6)
    assert float((expected - clean).abs().max()) > 1e-3
    with pytest.raises(SiteError, match="no projection '.*#1'"), ablated(model, {f"{path}#1": HALF}):
        pass


def test_a_checkpoint_gives_what_the_calibration_in_memory_gives(tmp_path):
    methods = [Mean(), Peak(), ConditionalMean()]
    module, made = tiny.fit(tmp_path, callback=AblationCallback(methods, [0.5], [1]))
    loaded, model = Calibration.load(made.folder / "ablation.ckpt", tiny.gpt2()), tiny.gpt2()
    for method in methods:
        found = [tiny.run(model)]
        for target, calibration in ((module.target, made.run.calibration), (model, loaded)):
            with ablated(target, {site.name: HALF for site in loaded.sites}, method, calibration):
                found.append(tiny.run(target))
        assert torch.equal(*found[1:]) and not torch.equal(*found[:2])
    with pytest.raises(TargetError, match="is of another target, with the weights"):
        Calibration.load(made.folder / "ablation.ckpt", tiny.mistral())
