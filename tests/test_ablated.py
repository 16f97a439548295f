"""A target under an ablation, without a Trainer, against plain hooks."""

import copy

import pandas as pd
import pytest
import torch
from accelerate import cpu_offload

from lightning_ablate import (
    AblationCallback,
    Calibration,
    CausalLM,
    ConditionalMean,
    ConditionalTuned,
    Mean,
    Noise,
    Only,
    Peak,
    PositionalMean,
    Random,
    Selection,
    Site,
    Zero,
    ablated,
    find_sites,
)
from lightning_ablate.errors import ConfigError, SiteError, StatisticsError, TargetError
from lightning_ablate.identity import fingerprint
from lightning_ablate.methods import Ablation, Batch
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
    assert calibration.sites == tuple(Site(path + n, 16, 4, kind, layer + n, uses=3) for n in ("#0", "#1", "#2"))
    with reference.plain_hooks(model, {path: seen.append}):
        clean = tiny.run(model)
    change = reference.put(HALF, seen[1].double().flatten(0, 1).mean(0).float())
    with reference.plain_hooks(model, {path: lambda x: runs.append(x) or (change(x) if len(runs) == 2 else None)}):
        expected = tiny.run(model)
    with ablated(model, {f"{path}#1": HALF}, "mean", calibration):
        torch.testing.assert_close(tiny.run(model), expected, rtol=0, atol=1e-6)
    assert float((expected - clean).abs().max()) > 1e-3
    with pytest.raises(SiteError, match="no site '.*#1'"), ablated(model, {f"{path}#1": HALF}):
        pass
    with reference.plain_hooks(model, {path: reference.put(HALF, torch.zeros(16))}):
        expected = tiny.run(model)
    for known in (None, calibration):  # a path stands for all uses, whether they are known or not
        with ablated(model, {path: HALF}, "zero", known):
            assert torch.equal(tiny.run(model), expected)
    only = Only(neurons={path: range(8)}, heads={f"{path}#1": [3]})
    masks = [only.mask(only.selections(calibration.sites, [], [])[0], site) for site in calibration.sites]
    assert [mask.sum().item() for mask in masks] == [8, 12, 8]


@pytest.mark.parametrize("method", ["zero", "mean"])
def test_heads_and_neurons_are_named_by_numbers_beside_masks(method):
    model = sharpened(tiny.gpt2)
    other, calibration = PATH.replace("1", "0"), tiny.calibrated(model, Mean())
    numbers = {PATH: [0, 1, 2, 3, 8, 9, 10, 11, 15], other: [0, 3]}  # heads 0 and 2 of 4, neurons 15, 3; 0 by its mask
    masks = {path: torch.isin(torch.arange(16), torch.tensor(n)) for path, n in numbers.items()}
    with ablated(model, masks, method, calibration):
        expected = tiny.run(model)
    options = {"heads": {PATH: [0, 2]}, "neurons": {PATH: [15, 8], other: [3]}}
    with ablated(model, {other: torch.arange(16) < 1}, method, calibration, **options):
        assert torch.equal(tiny.run(model), expected)
    if method == "zero":  # which needs to know no more than the sites
        sites = find_sites(model, tiny.tokens()["input_ids"])
        assert sites == list(calibration.sites)
        with ablated(model, {other: torch.arange(16) < 1}, calibration=Calibration(sites=sites), **options):
            assert torch.equal(tiny.run(model), expected)
    for given, message in (
        ({"heads": {PATH: [4]}}, f"{PATH} has no head 4 .*, expected 0 to 3"),
        ({"neurons": {PATH: [16]}}, f"{PATH} has no neuron 16 .*, expected 0 to 15"),
        ({"heads": {"h.9": [0]}}, "the target has no site 'h.9'"),
        ({"heads": {PATH: [0]}, "calibration": None}, "has isn't known here: give a mask .*find_sites"),
    ):
        with pytest.raises(SiteError, match=message), ablated(model, **{"calibration": calibration, **given}):
            pass
    with pytest.raises(ConfigError, match="no heads and no neurons are named"), ablated(model):
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


COMPILED = {
    "in place": lambda model: model.compile(backend="eager") or model,
    "wrapped": lambda model: torch.compile(model, backend="eager"),
    "one layer": lambda model: model.transformer.h[1].compile(backend="eager") or model,
    "a method": lambda model: setattr(model, "forward", torch.compile(model.forward, backend="eager")) or model,
}


@pytest.mark.parametrize("way", COMPILED)
def test_a_target_that_ran_compiled_before_is_ablated_and_found(way):
    model = tiny.gpt2()
    with reference.plain_hooks(model, {PATH: reference.put(HALF, torch.zeros(16))}):
        expected = tiny.run(model)
    torch._dynamo.reset()
    compiled = COMPILED[way](model)
    prefix = "_orig_mod." if way == "wrapped" else ""
    intact = tiny.run(compiled)
    with ablated(compiled, {prefix + PATH: HALF}):
        torch.testing.assert_close(tiny.run(compiled), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(tiny.run(compiled), intact, rtol=0, atol=1e-5)
    assert [site.path for site in tiny.sites(compiled)][1] == prefix + PATH
    torch._dynamo.reset()


def test_a_site_that_never_ran_inside_is_an_error():
    model = tiny.gpt2()
    with pytest.raises(SiteError, match=f"{PATH} never ran inside"), ablated(model, {PATH: HALF}):
        pass
    model.transformer.h[1].attn.forward = lambda states, **options: (states, None)  # what a fused layer may do
    with (
        pytest.raises(SiteError, match=f"{PATH} never ran inside"),
        ablated(model, {PATH: HALF, PATH.replace("1", "0"): HALF}),
    ):
        tiny.run(model)


@pytest.mark.parametrize("make, path", [(tiny.gpt2, PATH), (tiny.vit, "blocks.1.attn.proj")])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_passes_are_recomputed_ablated_or_refused(make, path, reentrant):
    model, inputs = make(), torch.randn(3, 1, 8, 8) if make == tiny.vit else tiny.tokens()["input_ids"]

    def loss():
        output = model(inputs)
        return (output if make == tiny.vit else output.logits).square().mean()

    def gradients():
        model.zero_grad()
        loss().backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    with reference.plain_hooks(model, {path: reference.put(HALF, torch.zeros(16))}):
        expected = gradients()
    if make == tiny.vit:
        model.set_grad_checkpointing(True)
    else:
        model.train().activation_checkpointing_enable({"use_reentrant": reentrant})
        for module in model.modules():
            module.p = 0.0  # of any dropout
        model.enable_input_require_grads()
    with ablated(model, {path: HALF}):
        torch.testing.assert_close(gradients(), expected)
    with pytest.raises(SiteError, match=r"call backward\(\) inside"), ablated(model, {path: HALF}):
        loss()
    with ablated(model, {path: HALF}), torch.no_grad():
        loss()


def test_a_recomputed_run_of_a_shared_module_is_refused():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = torch.nn.Linear(16, 16)

        def forward(self, x):
            for _ in range(2):
                x = torch.utils.checkpoint.checkpoint(self.proj, x, use_reentrant=False).tanh()
            return x

    known = Calibration(sites=[Site(f"proj#{use}", 16, uses=2) for use in (0, 1)])
    with (
        pytest.raises(SiteError, match="proj runs 2 times"),
        ablated(model := Twice(), {"proj#1": HALF}, "zero", known),
    ):
        model(torch.randn(3, 16)).sum().backward()


def test_another_input_is_resampled_from_as_activation_patching_does():
    model, clean, corrupt = tiny.gpt2(), tiny.tokens(3, seed=1), tiny.tokens(3, seed=2)
    inputs, other = ({n: b[n] for n in ("input_ids", "attention_mask")} for b in (clean, corrupt))
    other["attention_mask"] = inputs["attention_mask"]
    seen = []
    with torch.no_grad():
        with reference.plain_hooks(model, {PATH: seen.append}):
            model(**other)
        with reference.plain_hooks(model, {PATH: lambda x: torch.where(HALF, seen[0], x)}):
            expected = model(**inputs).logits
        for method in ("resample-partner", "resample-same-position"):
            with ablated(model, {PATH: HALF}, method, source=other):
                found = model(**inputs).logits
            real = inputs["attention_mask"].bool()
            torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-5)
        for method, given, message in (("resample-partner", None, "needs a"), ("mean", other, "needs no")):
            with pytest.raises(ConfigError, match=f"{method} {message} `source`"):
                ablated(model, {PATH: HALF}, method, source=given).__enter__()
        two = {name: tensor[:2] for name, tensor in other.items()}
        with pytest.raises(ConfigError, match="holds 2 examples, expected 3, as many as the target runs, or 1"):
            with ablated(model, {PATH: HALF}, "resample-partner", source=two):
                model(**inputs)


@pytest.mark.parametrize("method", [PositionalMean(), Noise()], ids=lambda method: method.name)
def test_methods_by_position_run_in_whole_passes_and_not_on_a_cache(method):
    model = tiny.gpt2()
    calibration = tiny.calibrated(model, method)
    site = next(site for site in calibration.sites if site.name == PATH)
    with ablated(model, {PATH: HALF}, method, calibration):
        found = tiny.run(model)
    batch = Batch(torch.arange(3))
    replace = method.prepare(Ablation(site, HALF, calibration[site], None, batch))
    with reference.plain_hooks(model, {PATH: lambda x: torch.where(HALF, replace(x), x)}):
        assert torch.equal(found, tiny.run(model))
    ids = tiny.tokens(2, 6)["input_ids"]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False}
    with pytest.raises(ConfigError, match="use_cache=False"), ablated(model, {PATH: HALF}, method, calibration):
        model.generate(ids, **options)
    with ablated(model, {PATH: HALF}, method, calibration):
        assert model.generate(ids, **options, use_cache=False).shape == (2, 9)


def test_what_was_fitted_for_a_condition_is_found_by_its_masks(tmp_path):
    module, made = tiny.fit(tmp_path, callback=AblationCallback([ConditionalTuned(steps=1)], [0.5], [1]))
    batch, sites = tiny.tokens(6, seed=2), made.run.calibration.sites
    masks = {site.name: Random().mask(Selection(0.5, 1), site) for site in sites}
    with torch.no_grad(), ablated(module.target, masks, ConditionalTuned(steps=1), made.run.calibration):
        logits, targets, example, *_ = module.evaluate(batch)
    found = torch.nn.functional.cross_entropy(logits[example >= 0].double(), targets[example >= 0])
    assert float(found) == pytest.approx(made.results.table["cross_entropy"].iloc[1], abs=1e-6)
    with pytest.raises(StatisticsError, match="needs the values it learns"):
        with ablated(
            module.target, {sites[0].name: masks[sites[0].name]}, ConditionalTuned(steps=1), made.run.calibration
        ):
            pass


def test_an_offloaded_target_is_ablated_and_swept(tmp_path):
    model = tiny.mistral()
    path = "model.layers.1.self_attn.o_proj"
    _, made = tiny.fit(tmp_path / "whole", tiny.Own(copy.deepcopy(model)))
    offloaded = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert next(offloaded.parameters()).is_meta
    with reference.plain_hooks(offloaded, {path: reference.put(torch.arange(32) < 8, torch.zeros(32))}):
        expected = tiny.run(offloaded)
    with ablated(offloaded, {path: torch.arange(32) < 8}):
        assert torch.equal(tiny.run(offloaded), expected)
    _, again = tiny.fit(tmp_path / "offloaded", tiny.Own(offloaded))
    pd.testing.assert_frame_equal(again.results.table, made.results.table, rtol=0, atol=1e-9)
    assert Calibration.load(again.folder / "ablation.ckpt", model).sites == made.run.calibration.sites


def test_a_part_of_the_target_has_no_examples_to_resample_for():
    model, source = tiny.gpt2(), {"input_ids": tiny.tokens(1, 4)["input_ids"]}
    with pytest.raises(StatisticsError, match="run the target itself"):
        with ablated(model, {PATH: HALF}, "resample-same-position", source=source):
            model.transformer(tiny.tokens(3, 6)["input_ids"])


@pytest.mark.filterwarnings("ignore")  # torch deprecates it
def test_a_target_in_dynamic_int8_is_ablated():
    model = torch.ao.quantization.quantize_dynamic(tiny.mistral(), {torch.nn.Linear}, dtype=torch.qint8)
    assert fingerprint(model) == fingerprint(copy.deepcopy(model)) != fingerprint(tiny.mistral())
    path = "model.layers.1.self_attn.o_proj"
    with reference.plain_hooks(model, {path: reference.put(torch.arange(32) < 8, torch.zeros(32))}):
        expected = tiny.run(model)
    with ablated(model, {path: torch.arange(32) < 8}):
        assert torch.equal(tiny.run(model), expected)
    module = tiny.built(CausalLM.of(model))
    module.on_train_batch_start(tiny.tokens(), 0)


def test_a_fingerprint_knows_heads_that_no_weight_tells_and_no_cache():
    class Core(torch.nn.Module):
        def __init__(self, heads):
            super().__init__()
            self.heads = heads

    class Cache(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("frequencies", torch.ones(3), persistent=False)
            self.longest = 4

    made = [torch.nn.ModuleList([Core(heads), Cache()]) for heads in (2, 4)]
    assert fingerprint(made[0]) != fingerprint(made[1])
    before = fingerprint(made[0])
    made[0][1].longest, made[0][1].frequencies = 9, torch.zeros(3)
    assert fingerprint(made[0]) == before
