"""Every row of whole runs on tiny targets, against plain hooks and plain arithmetic."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_ablate import AblationCallback, CausalLM, EachHead, EachLayer, ImageClassifier, Only, Random
from lightning_ablate.conditions import Selection
from lightning_ablate.errors import NonFiniteError
from lightning_ablate.methods import AblationMethod, ConditionalMean, constant
from lightning_ablate.phases import Epoch, MethodPhase
from lightning_ablate.sites import hooked
from lightning_ablate.statistics import ActivationStatistic
from tests import tiny
from tests.reference import conditional_mean, evaluation, peaks, put, raw_activations

PATHS = ("transformer.h.0.attn.c_proj", "transformer.h.1.attn.c_proj")
MLPS = ("transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj")


def swept(folder, *methods, module=None, **options):
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


def assert_constants(rows, values):
    for row, fraction in zip(rows.itertuples(), (0.3, 1.0), strict=True):
        assert row.fraction == fraction
        assert_scores(row, {name: put(mask, values[name]) for name, mask in masks(fraction).items()})


class LargestOfTheTests(ActivationStatistic):
    def __init__(self, neurons, earlier=None):
        super().__init__(neurons, earlier)
        self.add_state("largest", torch.zeros(neurons), dist_reduce_fx="max", persistent=True)

    def update(self, activations, valid=None):
        self.largest = torch.maximum(self.largest, activations[valid].abs().amax(0))

    def compute(self):
        return self.largest


class ToLargest(AblationMethod):
    name = "largest-of-the-tests"
    statistics = (LargestOfTheTests,)

    def prepare(self, ablation):
        return constant(ablation.statistics[LargestOfTheTests].largest)


class Midway(AblationMethod):
    """Halfway between the smallest and the largest activation of an epoch of its own, which its phase finds."""

    name = "midway-of-the-tests"

    def prepare(self, ablation):
        return constant(ablation.statistics.learned(self.name))


class MidwayPhase(MethodPhase):
    serves, title = Midway, "Midway"

    def __init__(self, module, run, method):
        super().__init__(module)
        self.run, self.seen = run, {site: [] for site in run.calibration.sites}

    @classmethod
    def scheduled(cls, method, sweep, amount):
        return [Epoch(0, partial(cls, method=method), 1.0)]

    def step(self, batch, batch_idx):
        keep = {s: lambda x, s=s: self.seen[s].append(x[batch["attention_mask"].bool()]) for s in self.seen}
        with torch.no_grad(), hooked(self.module.target, keep):
            self.module.evaluate(batch)

    def end_epoch(self):
        found = {site: torch.cat(rows) for site, rows in self.seen.items()}
        self.run.calibration.learned[Midway.name] = {s: (x.amin(0) + x.amax(0)) / 2 for s, x in found.items()}


def test_a_method_with_a_phase_of_its_own_in_one_file(tmp_path, capsys):
    table = swept(tmp_path, Midway(), "mean")
    values = {path: (x.amin(0) + x.amax(0)) / 2 for path, x in raw().items()}
    assert_constants(table[table["method"] == Midway.name], values)
    # of 3 batches: calibration and the epoch of its own; the sweep of 5 conditions
    assert "plan: 5 conditions, 21 forward passes" in capsys.readouterr().out


def test_a_constant_of_each_kind_and_a_method_and_a_statistic_of_ones_own(tmp_path):
    places = torch.cat([batch["attention_mask"] for batch in tiny.loader(seed=1)]).nonzero()[:, 1]
    values = {
        "zero": lambda x: torch.zeros(16),
        "mean": lambda x: x.double().mean(0),
        "peak": peaks,
        "positional-mean": lambda x: torch.stack([x[places == p].double().mean(0) for p in range(tiny.LENGTH)]),
        "largest-of-the-tests": lambda x: x.abs().amax(0),
    }
    table = swept(tmp_path, *list(values)[:-1], ToLargest())
    assert table["method"][0] == "none" and table["kl"][0] == 0
    assert_scores(table.iloc[0], {})
    for method, value in values.items():
        assert_constants(table[table["method"] == method], {path: value(x).float() for path, x in raw().items()})


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
    assert_constants(table[1:], donors)


def test_each_head_of_grouped_query_attention_goes_alone(tmp_path):
    """Its heads are wider than the model; that a slice holds what a head made is checked in test_coverage.py."""
    _, callback = tiny.fit(tmp_path, tiny.Own(tiny.mistral()), callback=AblationCallback(["zero"], neurons=EachHead()))
    table, path = callback.results.table, "model.layers.1.self_attn.o_proj"
    assert len(table) == 1 + 2 * 4 and callback.run.calibration.sites[0].width == 32
    (row,) = table[(table["part"] == path) & (table["head"] == 2)].itertuples()
    assert_scores(row, {path: put(torch.arange(32) // 8 == 2, torch.zeros(32))}, tiny.mistral())


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
    tiny.fit(tmp_path, module, DataLoader(rows[:3], batch_size=3), images, callback)
    assert callback.results.table["seed"][1:].tolist() == [1, 2, 1, 2]
    chosen, source = masks(0.5, 2, tiny.vit()), module.source("pixels", 2, next(iter(images)))
    values = raw_activations(tiny.vit(), [source], chosen)
    loss, *_ = evaluation(tiny.vit(), images, {path: put(mask, values[path]) for path, mask in chosen.items()})
    assert callback.results.table["cross_entropy"][2] == pytest.approx(loss, abs=2e-6)


def test_activations_that_are_not_finite_are_refused(tmp_path):
    model = tiny.gpt2()
    nn.init.constant_(model.transformer.h[1].attn.c_attn.bias, torch.nan)
    with pytest.raises(NonFiniteError, match=r"transformer.h.1.attn.c_proj are NaN"):
        swept(tmp_path / "activations", "zero", module=tiny.Own(model))
    assert not (tmp_path / "activations").exists()
