"""Every row of whole runs on tiny targets, against plain hooks and plain arithmetic."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_ablate import AblationCallback, CausalLM, EachHead, EachLayer, ImageClassifier, Only, Random
from lightning_ablate.conditions import Selection
from lightning_ablate.errors import DataError, NonFiniteError
from lightning_ablate.methods import AblationMethod, ConditionalMean, constant
from lightning_ablate.statistics import ActivationStatistic, Histogram
from tests import tiny
from tests.reference import conditional_mean, evaluation, mean_loss, peaks, plain_hooks, put, raw_activations

PATHS = ("transformer.h.0.attn.c_proj", "transformer.h.1.attn.c_proj")
MLPS = ("transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj")


def swept(folder, *methods, module=None, **options):
    """The rows of a run, the baseline first."""
    given = {"fractions": [0.3, 1.0], "seeds": [7], **options}
    return tiny.fit(folder, module, callback=AblationCallback(methods, **given))[1].results.table


def masks(fraction, seed=7, model=None):
    return {s.name: Random().mask(Selection(fraction, seed), s) for s in tiny.sites(model or tiny.gpt2())}


def raw(paths=PATHS):
    return raw_activations(tiny.gpt2(), tiny.loader(seed=1), paths)


def assert_scores(row, replace, model=None):
    """That a row is what the plain evaluation gives with that done to the projections' inputs."""
    loss, top1, n = evaluation(model or tiny.gpt2(), tiny.loader(seed=2), replace)
    assert row.n == n and row.top1 == pytest.approx(top1, abs=1e-12)
    assert row.cross_entropy == pytest.approx(loss, abs=2e-6)


def assert_constants(table, values):
    for row, fraction in zip(table.iloc[1:].itertuples(), (0.3, 1.0), strict=True):
        assert row.fraction == fraction
        assert_scores(row, {name: put(mask, values[name]) for name, mask in masks(fraction).items()})


def test_baseline_and_zero(tmp_path):
    table = swept(tmp_path, "zero")
    assert_scores(table.iloc[0], {})
    assert table["method"][0] == "none" and table["kl"][0] == 0
    assert_constants(table, {path: torch.zeros(16) for path in PATHS})


def test_mean(tmp_path):
    assert_constants(swept(tmp_path, "mean"), {path: x.double().mean(0).float() for path, x in raw().items()})


def test_peak_is_the_papers_neuron_by_neuron(tmp_path):
    _, callback = tiny.fit(tmp_path, callback=AblationCallback(["peak"], [0.3, 1.0], [7]))
    assert_constants(callback.results.table, {path: peaks(x).float() for path, x in raw().items()})
    for site in callback.run.calibration.sites:
        found, expected = callback.run.calibration[site][Histogram].peak, peaks(raw()[site.name])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_positional_mean(tmp_path):
    valid = torch.cat([batch["attention_mask"] for batch in tiny.loader(seed=1)]).bool()
    place = valid.nonzero()[:, 1]
    each = {path: [x[place == p].double().mean(0) for p in range(tiny.LENGTH)] for path, x in raw().items()}
    assert_constants(swept(tmp_path, "positional-mean"), {path: torch.stack(x).float() for path, x in each.items()})


def test_conditional_mean(tmp_path):
    table = swept(tmp_path, ConditionalMean(ridge=0.1))
    for row, fraction in zip(table.iloc[1:].itertuples(), (0.3, 1.0), strict=True):
        changes = {path: conditional_mean(x, masks(fraction)[path], 0.1) for path, x in raw().items()}
        assert_scores(row, changes)


@pytest.mark.parametrize("kind", ["characters", "ids", "generated"])
def test_resampling(tmp_path, gpt2_folder, kind):
    module = CausalLM(gpt2_folder)
    table = swept(tmp_path, f"resample-{kind}", module=module)
    ids = module.source(kind, 7, next(iter(tiny.loader(seed=2))))["input_ids"]
    assert ids.shape == (1, tiny.LENGTH) and len(ids.unique()) > 2
    donors = raw_activations(tiny.gpt2(), [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], PATHS)
    assert_constants(table, donors)


def test_one_head_of_grouped_query_attention(tmp_path):
    """Attention is written by hand: two key-value heads for four heads, which are wider than the model."""
    _, callback = tiny.fit(tmp_path, tiny.Own(tiny.mistral()), callback=AblationCallback(["zero"], neurons=EachHead()))
    table, model = callback.results.table, tiny.mistral()
    assert len(table) == 1 + 2 * 4 and callback.run.calibration.sites[0].width == 32

    def rotated(y, cos, sin):
        return y * cos.unsqueeze(1) + torch.cat([-y[..., 4:], y[..., :4]], -1) * sin.unsqueeze(1)

    def by_hand(attention, _, kwargs, output):
        x, where = kwargs["hidden_states"], kwargs["position_embeddings"]
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        query, key, value = (p(x).view(len(x), tiny.LENGTH, -1, 8).transpose(1, 2) for p in projections)
        query, key, made = rotated(query, *where), rotated(key, *where), []
        for head in range(4):
            scores = query[:, head] @ key[:, head // 2].mT / 8**0.5
            future = torch.ones(tiny.LENGTH, tiny.LENGTH).triu(1).bool()
            made.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ value[:, head // 2])
        made[2] = torch.zeros_like(made[2])
        return torch.cat(made, -1) @ attention.o_proj.weight.T, *output[1:]

    model.model.layers[1].self_attn.register_forward_hook(by_hand, with_kwargs=True)
    (row,) = table[(table["part"] == "model.layers.1.self_attn.o_proj") & (table["head"] == 2)].itertuples()
    assert_scores(row, {}, model)


def test_each_layer_ablates_its_attention_and_mlp_together(tmp_path):
    table = swept(tmp_path, "mean", sites=["attention", "mlp"], neurons=EachLayer())
    assert table["part"].tolist() == ["", "transformer.h.0", "transformer.h.1"]
    means = {path: x.double().mean(0).float() for path, x in raw((PATHS[1], MLPS[1])).items()}
    assert_scores(table.iloc[2], {path: put(torch.ones(len(m), dtype=torch.bool), m) for path, m in means.items()})
    assert (tmp_path / "importance.png").exists() and not (tmp_path / "degradation.png").exists()


def test_only_ablates_heads_and_neurons_together(tmp_path):
    choice = Only(heads={PATHS[0]: [1, 3]}, neurons={PATHS[1]: [5], MLPS[1]: [60]}, label="circuit")
    table = swept(tmp_path, "zero", sites=["attention", "mlp"], neurons=choice)
    assert table["part"].tolist() == ["", "circuit"] and table["seed"].isna().all()
    gone = {PATHS[0]: [*range(4, 8), *range(12, 16)], PATHS[1]: [5], MLPS[1]: [60]}
    ablated = {path: torch.isin(torch.arange(64), torch.tensor(which)) for path, which in gone.items()}
    assert_scores(table.iloc[1], {path: put(mask, torch.zeros(64)) for path, mask in ablated.items()})


def test_a_timm_target_resamples_pixels(tmp_path):
    class Classifier(ImageClassifier):
        def build_target(self):
            return tiny.vit()

    pixels, labels = torch.randn(6, 1, 8, 8), torch.arange(6)
    rows = [{"pixel_values": p, "label": c, "index": c} for p, c in zip(pixels, labels, strict=True)]
    module, images = Classifier("tiny", library="timm"), DataLoader(rows, batch_size=3)
    callback = AblationCallback(["resample-pixels"], [0.5, 1.0], [1, 2])
    tiny.fit(tmp_path, module, images, images, callback)
    assert callback.results.table["seed"][1:].tolist() == [1, 2, 1, 2]
    model, chosen, seen = tiny.vit(), masks(0.5, 2, tiny.vit()), {}
    with torch.no_grad():
        with plain_hooks(model, {path: lambda x, path=path: seen.update({path: x[0]}) for path in chosen}):
            model(module.source("pixels", 2, next(iter(images)))["pixel_values"])
        with plain_hooks(model, {path: put(mask, seen[path]) for path, mask in chosen.items()}):
            loss = mean_loss(model(pixels), labels)
    assert callback.results.table["cross_entropy"][2] == pytest.approx(loss, abs=2e-6)


class LargestOfTheTests(ActivationStatistic):
    def __init__(self, neurons, earlier=None):
        super().__init__(neurons, earlier)
        self.add_state("largest", torch.zeros(neurons), dist_reduce_fx="max", persistent=True)

    def update(self, activations, valid=None):
        self.largest = torch.maximum(self.largest, activations[valid].abs().amax(0))

    def compute(self):
        return self.largest

    def finite(self):
        return self.largest.isfinite().all()


class ToLargest(AblationMethod):
    name = "largest-of-the-tests"
    statistics = (LargestOfTheTests,)

    def prepare(self, ablation):
        return constant(ablation.statistics[LargestOfTheTests].largest)


def test_a_method_and_a_statistic_of_ones_own(tmp_path):
    assert_constants(swept(tmp_path, ToLargest()), {path: x.abs().amax(0) for path, x in raw().items()})


def test_targets_outside_the_classes_are_refused(tmp_path):
    class Wrong(tiny.Own):
        def evaluate(self, batch):
            scored = super().evaluate(batch)
            return scored._replace(targets=scored.targets + 10_000)

    with pytest.raises(DataError, match="targets from 0 to 299"):
        tiny.fit(tmp_path, Wrong(tiny.gpt2()))


def test_activations_that_are_not_finite_end_the_calibration(tmp_path):
    model = tiny.gpt2()
    nn.init.constant_(model.transformer.h[1].attn.c_attn.bias, torch.nan)
    with pytest.raises(NonFiniteError, match=r"transformer.h.1.attn.c_proj are NaN"):
        swept(tmp_path, "zero", module=tiny.Own(model))
    assert not list(tmp_path.iterdir())
