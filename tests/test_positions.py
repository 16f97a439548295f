"""Sites that are outputs, and single positions, in whole runs and in generation: against plain hooks."""

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_ablate import AblationCallback, Attribution, Calibration, ConditionalMean, EachLayer, Optimal, ablated
from lightning_ablate.errors import ConfigError, SiteError, StatisticsError
from lightning_ablate.positions import places
from tests import reference, tiny

RIDGE = 0.01
BLOCK, FUSED = "transformer.h.1:output", "transformer.h.0.attn.c_attn"
METHODS = ["zero", "mean", "peak", ConditionalMean(RIDGE)]


def raw(model, batches, name, positions=None):
    """Every activation of an output that isn't padding, ``(positions, neurons)`` float32, by plain hooks."""
    kept = []
    for batch in batches:
        seen = {}
        with torch.no_grad(), reference.plain_hooks(model, {name: lambda x, seen=seen: seen.update(x=x)}):
            reference.forward(model, batch)
        real = batch["attention_mask"].bool()
        kept.append(seen["x"][real if positions is None else places(positions, real)])
    return torch.cat(kept)


def change(method, x, mask):
    name = getattr(method, "name", method)
    values = {"zero": torch.zeros(len(mask)), "mean": x.double().mean(0).float()}
    if name == "peak":
        return reference.put(mask, reference.peaks(x).float())
    return reference.put(mask, values[name]) if name in values else reference.conditional_mean(x, mask, RIDGE)


def part(own, start):
    """A change of 16 features as one of a wider output."""

    def whole(x):
        x = x.clone()
        x[..., start : start + 16] = own(x[..., start : start + 16])
        return x

    return whole


@pytest.mark.parametrize("name", [BLOCK, f"{FUSED}:query", f"{FUSED}:key", f"{FUSED}:value"])
def test_outputs_are_swept_as_plain_hooks_would(tmp_path, name):
    callback = AblationCallback(METHODS, fractions=[0.5], seeds=[1], sites=[name])
    module, _ = tiny.fit(tmp_path, tiny.Own(tiny.gpt2()), callback=callback, train=tiny.loader(40, seed=1))
    (site,), path = callback.run.calibration.sites, name if name == BLOCK else f"{FUSED}:output"
    start = 0 if name == BLOCK else 16 * ["query", "key", "value"].index(site.kind)
    assert (site.name, site.width) == (name, 16)
    x = raw(module.target, tiny.loader(40, seed=1), path)[:, start : start + 16]
    table = callback.results.table.set_index("method")
    for method in METHODS:
        condition = next(c for c in callback.sweep.conditions([site]) if c.method == getattr(method, "name", method))
        mask = callback.sweep.masks(condition, callback.run.calibration)[site]
        own = part(change(method, x, mask), start)
        loss, top1, n = reference.evaluation(module.target, tiny.loader(seed=2), {path: own})
        found = table.loc[condition.method]
        assert found["cross_entropy"] == pytest.approx(loss, abs=1e-6)
        assert (found["top1"], found["n"], found["ablated"]) == (pytest.approx(top1), n, 0.5)


@pytest.mark.parametrize("positions", ["first", "last", (1, -2), "subject"])
@pytest.mark.parametrize("name", [BLOCK, "transformer.h.0.attn.c_proj"])
def test_positions_are_swept_as_plain_hooks_would(tmp_path, name, positions):
    def rows(batches):
        found = []
        for batch in batches:
            batch["subject"] = batch["input_ids"] % 3 == 0
            found += [{key: value[row] for key, value in batch.items()} for row in range(len(batch["index"]))]
        return DataLoader(found, 2)

    def meant(batch):
        real = batch["attention_mask"].bool()
        return real & batch["subject"] if positions == "subject" else places(positions, real)

    train, val = rows(tiny.loader(20, seed=1)), rows(tiny.loader(seed=2))
    callback = AblationCallback(
        ["zero", "mean"], fractions=[0.5], seeds=[1], sites=[name], positions=positions, calibrate_at="positions"
    )
    module, _ = tiny.fit(tmp_path, tiny.Own(tiny.gpt2()), callback=callback, train=train, val=val)
    assert f"neurons are ablated at these positions alone: {positions}" in str(callback.results)
    calibration, (site,) = callback.run.calibration, callback.run.calibration.sites
    kept = []
    for batch in train:
        seen = {}
        with torch.no_grad(), reference.plain_hooks(module.target, {name: lambda x, seen=seen: seen.update(x=x)}):
            reference.forward(module.target, batch)
        kept.append(seen["x"][meant(batch)])
    x = torch.cat(kept)
    for method in ("zero", "mean"):
        condition = next(c for c in callback.sweep.conditions([site]) if c.method == method)
        mask = callback.sweep.masks(condition, calibration)[site]
        loss, n = 0.0, 0
        for batch in val:

            def own(activations, batch=batch, mask=mask, method=method):
                return torch.where(meant(batch)[..., None], change(method, x, mask)(activations), activations)

            mean, _, count = reference.evaluation(module.target, [batch], {name: own})
            loss, n = loss + mean * count, n + count
        found = callback.results.table.set_index("method").loc[method]
        assert found["cross_entropy"] == pytest.approx(loss / n, abs=1e-6)


def test_padding_on_either_side_has_no_place():
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 1, 1, 0]]).bool()
    assert places("last", real).nonzero().tolist() == [[0, 4], [1, 1], [2, 3]]
    assert places("first", real).nonzero().tolist() == [[0, 2], [1, 0], [2, 0]]
    assert places((2, -3), real).nonzero().tolist() == [[0, 2], [0, 4], [2, 0], [2, 3]]  # the second is too short


def test_attributions_are_of_the_positions(tmp_path):
    def found(positions):
        attribution = Attribution(["mean"], verify=4, heads=True)
        callback = AblationCallback([], sites=["attention"], positions=positions, attribution=attribution)
        tiny.fit(tmp_path, tiny.Own(tiny.gpt2(), name=str(positions)), callback=callback)
        return callback.attributions

    everywhere, one, other = found("all"), found((3,)), found(tuple(set(range(16)) - {3}))
    # the first order is a sum over positions, but for the damping of large ones
    torch.testing.assert_close(
        *(torch.tensor(first.values) for first in (everywhere["first"], one["first"] + other["first"])),
        rtol=0.02,
        atol=2e-5,
    )
    measured = one[one["verified"].notna() & (one["level"] == "neuron")]
    assert measured["verified"].corr(measured["estimate"]) > 0.9
    assert not torch.allclose(torch.tensor(one["first"].values), torch.tensor(everywhere["first"].values), rtol=0.1)


def test_layers_are_ablated_whole_and_alone_with_outputs(tmp_path):
    callback = AblationCallback(["zero"], sites=["residual", "mlp"], neurons=EachLayer())
    tiny.fit(tmp_path, tiny.Own(tiny.gpt2()), callback=callback)
    table = callback.results.table
    assert table["part"].tolist()[1:] == ["transformer.h.0", "transformer.h.1"]


def test_statistics_of_other_positions_and_positions_that_arent_there_are_refused(tmp_path):
    given = {"methods": ["mean"], "fractions": [0.5], "seeds": [1]}
    callback = AblationCallback(**given, positions=[1], calibrate_at="positions", dirpath=tmp_path)
    tiny.fit(tmp_path, tiny.Own(tiny.gpt2()), callback=callback)
    with pytest.raises(StatisticsError, match=r"are of the positions \(1,\), expected those of 'all'"):
        tiny.validate(tmp_path, tmp_path / "ablation.ckpt", AblationCallback(**given))
    for positions in ([], [0.5], ""):
        with pytest.raises(ConfigError, match="expected all, first, last, places"):
            AblationCallback(positions=positions)
    with pytest.raises(ConfigError, match="which holds input_ids, attention_mask, index"):
        tiny.fit(tmp_path, callback=AblationCallback(["zero"], positions="subject"))
    with pytest.raises(ConfigError, match="optimal learns what takes the place of neurons at all positions"):
        tiny.fit(tmp_path, callback=AblationCallback([Optimal(steps=1)], positions="last"))


@pytest.mark.parametrize("beyond", [False, True])
@pytest.mark.parametrize("make", [tiny.gpt2, tiny.mistral])
def test_generation_with_a_cache_equals_recomputation(make, beyond):
    model, ids = make(), tiny.tokens(2, 6, seed=5)["input_ids"]
    model.generation_config.eos_token_id = None
    calibration = Calibration(sites=tiny.sites(model, "residual"))
    masks = {site.name: torch.arange(site.width) % 2 == 0 for site in calibration.sites}
    positions = torch.tensor([[0, 1, 0, 0, 1, 1], [1, 1, 0, 0, 0, 0]]).bool()
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    with ablated(model, masks, "zero", calibration, positions=positions, beyond=beyond):
        generated = model.generate(ids, **options)
    with ablated(model, masks, "zero", calibration):
        everywhere = model.generate(ids, **options)

    def own(x):
        where = torch.nn.functional.pad(positions, (0, x.shape[1] - 6), value=beyond)
        return torch.where(where[..., None] & (torch.arange(x.shape[-1]) % 2 == 0), 0, x)

    with torch.no_grad(), reference.plain_hooks(model, dict.fromkeys(masks, own)):
        for _ in range(8):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, ids) and not torch.equal(generated, everywhere)
    with pytest.raises(SiteError, match="expected one row, or 1"), ablated(model, masks, positions=positions):
        model(ids[:1])


def test_neither_outputs_nor_positions_are_exported(tmp_path):
    given = {"methods": ["zero"], "fractions": [0.5], "seeds": [1]}
    for options, why in [({"sites": ["residual"]}, "at the input of a plain"), ({"positions": "last"}, "no smaller")]:
        callback = AblationCallback(**given, **options)
        module, _ = tiny.fit(tmp_path, tiny.Own(tiny.gpt2()), callback=callback)
        with pytest.raises((ConfigError, SiteError), match=why):
            callback.export(module, tmp_path / "smaller", "zero")
        assert not (tmp_path / "smaller").exists()


class Doubled(torch.nn.Module):
    """Doubles what a module returned, in place or not."""

    def __init__(self, inner, in_place):
        super().__init__()
        self.inner, self.in_place = inner, in_place

    def forward(self, x):
        made = self.inner(x)
        return made.mul_(2) if self.in_place else made * 2


def test_an_output_that_is_changed_in_place_is_attributed_rightly(tmp_path):
    def found(in_place):
        model = tiny.gpt2()
        for block in model.transformer.h:
            block.mlp.dropout = Doubled(torch.nn.Linear(16, 16), in_place).requires_grad_(False)
            torch.nn.init.eye_(block.mlp.dropout.inner.weight)
        callback = AblationCallback([], sites=["*.inner:output"], attribution=Attribution(["zero"], verify=8))
        tiny.fit(tmp_path / str(in_place), tiny.Own(model.eval(), name=str(in_place)), callback=callback)
        return callback.attributions

    one, other = found(False), found(True)
    for column in ("first", "second", "verified"):
        torch.testing.assert_close(*(torch.tensor(t[column].to_numpy(float)) for t in (one, other)), equal_nan=True)


def test_units_of_a_module_that_is_several_sites_are_named_by_the_site(tmp_path):
    for name in (f"{FUSED} head 0", "transformer.h.0 neuron 3"):
        callback = AblationCallback(["zero"], fractions=[0.5], sites=["query", "key", "residual"], explain=[name])
        with pytest.raises(SiteError, match=f"there is no unit '{name}', did you mean"):
            tiny.fit(tmp_path, tiny.Own(tiny.gpt2()), callback=callback)


def test_a_named_entry_of_another_length_is_refused_in_a_line(tmp_path):
    data = tiny.loader(seed=2)
    for row in data.dataset:
        row["subject"] = torch.ones(5).bool()
    callback = AblationCallback(["zero"], fractions=[0.5], seeds=[1], positions="subject")
    with pytest.raises(SiteError, match=r"where the positions of \(2, 5\) are asked for"):
        tiny.fit(tmp_path, tiny.Own(tiny.gpt2()), callback=callback, val=data)


def test_masks_of_outputs_must_fit_and_a_cache_of_states_tells_no_positions():
    model, ids = tiny.gpt2(), tiny.tokens()["input_ids"]
    for width in (1, 8):
        mask = torch.ones(width, dtype=torch.bool)
        with pytest.raises(SiteError, match=f"has 16 neurons in a pass, expected {width}"), torch.no_grad():
            with ablated(model, {BLOCK: mask}):
                model(ids)
    with pytest.raises(SiteError, match="heads and neurons of outputs"), ablated(model, neurons={BLOCK: [0]}):
        pass

    class States:
        def get_seq_length(self):
            raise ValueError("only of attention")

    with pytest.raises(ConfigError, match="use_cache=False"), torch.no_grad():
        with ablated(model, {BLOCK: torch.ones(16).bool()}, positions=torch.ones(1, 3).bool()):
            model(ids, past_key_values=States())
