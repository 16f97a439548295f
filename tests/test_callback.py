import json
import warnings
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace

import lightning
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.nn import functional as F

from lightning_ablate import AblationCallback, AblationModule, CausalLM, ImageClassifier
from lightning_ablate.calibration import Calibration
from lightning_ablate.callback import _check_counts_once
from lightning_ablate.errors import (
    ConfigError,
    DataError,
    NonFiniteError,
    SiteError,
    StatisticsError,
    TargetError,
)
from lightning_ablate.masks import ByImportance, EachHead, EachLayer, RandomNeurons, Selection
from lightning_ablate.methods import AblationMethod, Zero, constant
from lightning_ablate.results import read_rows
from lightning_ablate.sites import fingerprint
from lightning_ablate.statistics import Covariance, Moments, RangeHistogram
from lightning_ablate.sweep import BASELINE, Condition, Sweep
from tests import tiny
from tests.statistics.test_statistics import peak_by_numpy
from tests.test_sites import hooks


def raw_activations(model, loader, *which):
    """Every valid activation of every site, kept in memory, with hooks of its own."""
    kept = {site.name: [] for site in tiny.sites(model, *which)}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: kept[name].append(inputs[0]))
        for name in kept
    ]
    valid = []
    with torch.no_grad():
        for batch in loader:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            valid.append(batch["attention_mask"].bool())
    for handle in handles:
        handle.remove()
    return {n: torch.cat([x[v] for x, v in zip(parts, valid, strict=True)]) for n, parts in kept.items()}


def plain_evaluation(model, loader, replacements=None, masks=None):
    """Cross-entropy and top-1 in plain PyTorch; what is ablated is written into the projections' inputs by hand."""
    handles = []
    for name, value in (replacements or {}).items():

        def replace(_, inputs, name=name, value=value):
            changed = inputs[0].clone()
            changed[..., masks[name]] = value[masks[name]]
            return (changed,)

        handles.append(model.get_submodule(name).register_forward_pre_hook(replace))
    loss, hits, n = 0.0, 0, 0
    with torch.no_grad():
        for batch in loader:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
                targets = batch["input_ids"][row, 1:length]
                predicted = logits[row, : length - 1]
                loss += F.cross_entropy(predicted, targets, reduction="sum").item()
                hits += int((predicted.argmax(-1) == targets).sum())
                n += len(targets)
    for handle in handles:
        handle.remove()
    return loss / n, hits / n, n


def test_baseline_equals_an_independent_evaluation(tmp_path):
    _, callback = tiny.fit(tmp_path)
    loss, top1, n = plain_evaluation(tiny.gpt2(), tiny.loader(seed=2))
    base = callback.results.baseline
    assert base.n == n and base.top1 == pytest.approx(top1, abs=1e-12)
    assert base.cross_entropy == pytest.approx(loss, abs=1e-6) and base.kl == 0


@pytest.mark.parametrize("method", ["zero", "mean", "peak"])
def test_every_row_equals_an_independent_ablation(tmp_path, method):
    _, callback = tiny.fit(tmp_path, callback=AblationCallback([method], [0.3, 1.0], [7]))
    model = tiny.gpt2()
    raw = raw_activations(model, tiny.loader(seed=1))
    if method == "zero":
        values = {name: torch.zeros(16) for name in raw}
    elif method == "mean":
        values = {name: x.double().mean(0).float() for name, x in raw.items()}
    else:
        peaks = {name: [peak_by_numpy(x[:, i].numpy()) for i in range(16)] for name, x in raw.items()}
        values = {name: torch.tensor(peak, dtype=torch.float32) for name, peak in peaks.items()}
    for fraction, seed in ((0.3, 7), (1.0, None)):
        masks = {site.name: RandomNeurons().mask(Selection(fraction, seed), site) for site in tiny.sites(model)}
        loss, top1, n = plain_evaluation(model, tiny.loader(seed=2), values, masks)
        row = next(r for r in callback.results.rows if r.method == method and r.fraction == fraction)
        assert (row.n, row.seed) == (n, seed) and row.top1 == pytest.approx(top1, abs=1e-12)
        assert row.cross_entropy == pytest.approx(loss, abs=2e-6)


def test_peak_equals_the_papers_on_raw_activations_neuron_by_neuron(tmp_path):
    module, _ = tiny.fit(tmp_path)
    raw = raw_activations(tiny.gpt2(), tiny.loader(seed=1))
    for site in module.calibration.sites:
        found = module.calibration[site][RangeHistogram].peak()
        expected = torch.tensor([peak_by_numpy(raw[site.name][:, i].numpy()) for i in range(16)])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_files_table_and_checkpoint_are_left(tmp_path, capsys):
    _, callback = tiny.fit(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.csv",
        "run.json",
        "comparisons.csv",
        "comparisons.png",
        "intervals.csv",
        "degradation.png",
        "neurons.parquet",
        "neurons.png",
        "ablation.ckpt",
    }
    assert len(read_rows(tmp_path / "results.csv")) == 1 + 3 * 3
    shown = capsys.readouterr().out
    assert callback.results.table() in shown and str(tmp_path / "results.csv") in shown
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["sites"] == [asdict(site) for site in tiny.sites(tiny.gpt2())]
    assert facts["target"]["sha256"] == fingerprint(tiny.gpt2()) and facts["partial"] == []


def test_checkpoint_is_small_plain_and_without_the_target(tmp_path):
    tiny.fit(tmp_path)
    checkpoint = torch.load(tmp_path / "ablation.ckpt", weights_only=True)
    assert list(checkpoint["state_dict"]) == ["anchor"]
    sites = checkpoint["callbacks"]["AblationCallback"]["statistics"]["sites"]
    assert [entry["site"] for entry in sites] == [asdict(site) for site in tiny.sites(tiny.gpt2())]


def test_validate_with_the_checkpoint_gives_the_rows_of_fit(tmp_path):
    tiny.fit(tmp_path / "fit")
    callback = AblationCallback(fractions=[0.5, 1.0], seeds=[1, 2])
    validated = tiny.trainer(tmp_path / "validate", callback)
    validated.validate(tiny.Own(tiny.gpt2()), tiny.loader(seed=2), ckpt_path=tmp_path / "fit" / "ablation.ckpt")
    first, second = (tmp_path / which / "results.csv" for which in ("fit", "validate"))
    assert first.read_bytes() == second.read_bytes()
    assert not (tmp_path / "validate" / "ablation.ckpt").exists()


def test_validate_takes_other_methods_fractions_and_seeds(tmp_path):
    tiny.fit(tmp_path / "fit")
    callback = AblationCallback(["mean"], [0.25], [9])
    validated = tiny.trainer(tmp_path / "validate", callback)
    validated.validate(tiny.Own(tiny.gpt2()), tiny.loader(seed=2), ckpt_path=tmp_path / "fit" / "ablation.ckpt")
    assert [(r.method, r.fraction, r.seed) for r in callback.results.rows[1:]] == [("mean", 0.25, 9)]


def test_twice_the_same_run_gives_the_same_bytes(tmp_path, gpt2_folder):
    for seed, name in enumerate(("first", "second")):
        module = CausalLM(gpt2_folder)
        module.configure_model()
        torch.manual_seed(seed)  # what the process drew before doesn't matter
        methods = ["zero", "mean", "peak", "resample-characters", "resample-ids", "resample-generated"]
        tiny.fit(tmp_path / name, module, callback=AblationCallback(methods, [0.5, 1.0], [1, 2]))
    assert (tmp_path / "first/results.csv").read_bytes() == (tmp_path / "second/results.csv").read_bytes()


def test_a_second_run_in_the_same_folder_keeps_the_first(tmp_path):
    tiny.fit(tmp_path)
    before = (tmp_path / "results.csv").read_bytes()
    tiny.fit(tmp_path, callback=AblationCallback(["zero"], [0.5], [1]))
    assert (tmp_path / "results.csv").read_bytes() == before
    assert len(read_rows(tmp_path / "run-2" / "results.csv")) == 2


def test_weights_never_change_and_the_target_stays_in_eval_mode(tmp_path):
    model = tiny.gpt2(attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = []
    handle = model.transformer.h[0].register_forward_pre_hook(lambda module, _: modes.append(module.training))
    module, callback = tiny.fit(tmp_path, tiny.Own(model))
    handle.remove()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert modes and not any(modes) and hooks(model) == 0
    assert module.anchor.item() == 0
    loss, _, _ = plain_evaluation(tiny.gpt2(), tiny.loader(seed=2))
    assert callback.results.baseline.cross_entropy == pytest.approx(loss, abs=1e-6)


def test_no_hook_is_left_after_an_exception(tmp_path):
    class Broken(AblationMethod):
        name = "broken-of-the-tests"

        def prepare(self, ablation):
            return lambda activations: activations[..., :3]

    model = tiny.gpt2()
    with pytest.raises(RuntimeError):
        tiny.fit(tmp_path, tiny.Own(model), callback=AblationCallback([Broken()], [0.5], [1]))
    assert hooks(model) == 0
    assert (tmp_path / "ablation.ckpt").exists()  # the statistics were complete: nothing gathered is lost


def test_validate_without_a_checkpoint_refuses(tmp_path):
    with pytest.raises(StatisticsError, match="validate needs the statistics of a calibration.*--ckpt_path"):
        tiny.trainer(tmp_path, AblationCallback(["zero"])).validate(tiny.Own(tiny.gpt2()), tiny.loader(seed=2))


def test_a_checkpoint_without_the_methods_statistics_refuses(tmp_path):
    tiny.fit(tmp_path, callback=AblationCallback(["zero", "mean"], [0.5], [1]))
    with pytest.raises(StatisticsError, match="'peak' needs the statistic RangeHistogram"):
        tiny.trainer(tmp_path, AblationCallback(["peak"], [0.5], [1])).validate(
            tiny.Own(tiny.gpt2()), tiny.loader(seed=2), ckpt_path=tmp_path / "ablation.ckpt"
        )


def test_a_checkpoint_of_another_target_or_other_sites_is_refused(tmp_path):
    tiny.fit(tmp_path, callback=AblationCallback(fractions=[0.5], seeds=[1], sites="*.0.attn.c_proj"))
    checkpoint = tmp_path / "ablation.ckpt"
    other = tiny.gpt2()
    with torch.no_grad():
        other.transformer.wte.weight[0, 0] += 1
    callback = AblationCallback(fractions=[0.5], seeds=[1], sites="*.0.attn.c_proj")
    with pytest.raises(TargetError, match="the checkpoint is of another target: 'own' with the weights"):
        tiny.trainer(tmp_path, callback).validate(tiny.Own(other), tiny.loader(seed=2), ckpt_path=checkpoint)
    for asked in ("attention", "*.attn.c_proj"):
        callback = AblationCallback(fractions=[0.5], seeds=[1], sites=asked)
        with pytest.raises(
            StatisticsError, match="doesn't hold the statistics of all sites .* it holds transformer.h.0"
        ):
            tiny.trainer(tmp_path, callback).validate(tiny.Own(tiny.gpt2()), tiny.loader(seed=2), ckpt_path=checkpoint)


def test_a_run_cut_short_is_marked(tmp_path):
    _, callback = tiny.fit(tmp_path, limit_train_batches=2, limit_val_batches=1)
    assert callback.results.partial == (
        "calibration was cut to 2 of 3 batches",
        "evaluation was cut to 1 of 3 batches",
    )
    assert json.loads((tmp_path / "run.json").read_text())["partial"] == list(callback.results.partial)
    assert callback.results.baseline.n == 13 + 15


def test_fast_dev_run_writes_nothing(tmp_path):
    _, callback = tiny.fit(tmp_path, fast_dev_run=True)
    assert len(callback.results.rows) == 10 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("methods", "epochs"), [(["zero"], 1), (["mean"], 1), (["peak"], 2), (["zero", "peak"], 2)])
def test_epochs_follow_from_the_methods(tmp_path, methods, epochs):
    class Count(tiny.Own):
        steps = 0

        def training_step(self, batch, batch_idx):
            self.steps += 1
            return super().training_step(batch, batch_idx)

    callback = AblationCallback(methods, [0.5], [1])
    module, _ = tiny.fit(tmp_path, Count(tiny.gpt2()), callback=callback, max_epochs=7)
    assert module.steps == 3 * epochs and len(callback.results.rows) == 1 + len(methods)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 5}, "max_steps is 5"),
        ({"val_check_interval": 0.5}, "val_check_interval"),
        ({"val_check_interval": 1}, "val_check_interval"),
    ],
)
def test_limits_that_would_cut_the_calibration_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        tiny.fit(tmp_path, **options)


def test_another_module_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="needs an AblationModule, got a BoringModel"):
        tiny.fit(tmp_path, BoringModel())


def test_a_module_without_the_callback_says_so(tmp_path):
    module = tiny.Own(tiny.gpt2())
    with pytest.raises(ConfigError, match="needs an AblationCallback"):
        tiny.trainer(tmp_path, lightning.Callback()).fit(module, tiny.loader(), tiny.loader())
    with pytest.raises(ConfigError, match="needs an AblationCallback"):
        tiny.trainer(tmp_path, lightning.Callback()).validate(module, tiny.loader())


def test_non_finite_activations_stop_the_run_in_calibration(tmp_path):
    model = tiny.gpt2()
    nn.init.constant_(model.transformer.h[1].attn.c_attn.bias, torch.nan)
    with pytest.raises(NonFiniteError, match=r"transformer.h.1.attn.c_proj are NaN"):
        tiny.fit(tmp_path, tiny.Own(model), callback=AblationCallback(["zero"], [0.5], [1]))
    assert not list(tmp_path.iterdir())


def test_a_method_and_a_statistic_of_ones_own(tmp_path):
    class Lowest(AblationMethod):
        name = "lowest-of-the-tests"
        statistics = (RangeHistogram,)

        def prepare(self, ablation):
            return constant(ablation.statistics[RangeHistogram].low)

    _, callback = tiny.fit(tmp_path, callback=AblationCallback(["zero", Lowest()], [1.0], [1]))
    raw = raw_activations(tiny.gpt2(), tiny.loader(seed=1))
    values = {name: x.amin(0) for name, x in raw.items()}
    masks = {name: torch.ones(16, dtype=torch.bool) for name in raw}
    loss, _, _ = plain_evaluation(tiny.gpt2(), tiny.loader(seed=2), values, masks)
    assert callback.results.rows[-1].cross_entropy == pytest.approx(loss, abs=2e-6)


@pytest.mark.parametrize("kind", ["characters", "ids", "generated"])
def test_resampling_equals_an_independent_one(tmp_path, gpt2_folder, kind):
    module = CausalLM(gpt2_folder)
    callback = AblationCallback([f"resample-{kind}"], [0.5], [3])
    tiny.fit(tmp_path, module, callback=callback)
    source = module.unrelated(kind, 3, next(iter(tiny.loader(seed=2))))["input_ids"]
    model = tiny.gpt2()
    donors = raw_activations(model, [{"input_ids": source, "attention_mask": torch.ones_like(source)}])
    masks = {site.name: RandomNeurons().mask(Selection(0.5, 3), site) for site in tiny.sites(model)}

    def replace(name):
        def hook(_, inputs):
            changed = inputs[0].clone()
            changed[..., masks[name]] = donors[name][:, masks[name]]
            return (changed,)

        return model.get_submodule(name).register_forward_pre_hook(hook)

    handles = [replace(name) for name in donors]
    loss, _, _ = plain_evaluation(model, tiny.loader(seed=2))
    for handle in handles:
        handle.remove()
    assert callback.results.rows[-1].cross_entropy == pytest.approx(loss, abs=2e-6)


def test_targets_outside_the_classes_are_refused(tmp_path):
    class Wrong(tiny.Own):
        def evaluate(self, batch):
            scored = super().evaluate(batch)
            return scored._replace(targets=scored.targets + 10_000)

    with pytest.raises(ValueError, match=r"targets from 0 to 299"):
        tiny.fit(tmp_path, Wrong(tiny.gpt2()))


def test_pixels_are_refused_for_text_before_the_sweep(tmp_path, gpt2_folder):
    with pytest.raises(ConfigError, match="resample-pixels"):
        tiny.fit(tmp_path, CausalLM(gpt2_folder), callback=AblationCallback(["resample-pixels"], [0.5], [1]))


def test_timm_targets_resample_pixels(tmp_path):
    class Classifier(ImageClassifier):
        def build_target(self):
            return tiny.vit()

    rows = [
        {"pixel_values": torch.randn(1, 8, 8), "label": torch.tensor(i % 10), "index": torch.tensor(i)}
        for i in range(6)
    ]
    images = torch.utils.data.DataLoader(rows, batch_size=3)
    callback = AblationCallback(["mean", "resample-pixels"], [0.5, 1.0], [1, 2])
    tiny.fit(tmp_path, Classifier("tiny", library="timm"), images, images, callback)
    assert [r.seed for r in callback.results.rows] == [None, 1, 2, None, 1, 2, 1, 2]
    assert all(r.n == 6 for r in callback.results.rows)


def test_data_without_a_scored_position_are_refused(tmp_path):
    rows = [{**tiny.tokens(1), "index": torch.tensor([-1])}]
    nothing = torch.utils.data.DataLoader(rows, batch_size=None)
    with pytest.raises(DataError, match="no scored position"):
        tiny.fit(tmp_path, val=nothing)


@pytest.mark.parametrize("limit", ["limit_val_batches", "limit_train_batches"])
def test_a_fit_without_a_sweep_says_so(tmp_path, limit):
    with pytest.raises(ConfigError, match="fit ended before the sweep"):
        tiny.fit(tmp_path, **{limit: 0})


def test_the_baseline_alone_is_a_sweep(tmp_path, capsys):
    _, callback = tiny.fit(tmp_path, callback=AblationCallback(fractions=[0], seeds=[1]))
    assert [row.method for row in callback.results.rows] == ["none"]
    assert "nothing ablated: top-1" in capsys.readouterr().out and len(read_rows(tmp_path / "results.csv")) == 1


def test_a_stream_without_a_length_is_evaluated_whole(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(tiny.loader(seed=2))

    stream = torch.utils.data.DataLoader(Stream(), batch_size=None)
    _, callback = tiny.fit(tmp_path / "stream", val=stream)
    _, whole = tiny.fit(tmp_path / "whole")
    assert callback.results.rows == whole.results.rows


def test_filling_examples_enter_no_statistic_by_default():
    class Plain(tiny.Own):
        valid = AblationModule.valid

    module = Plain(tiny.gpt2())
    assert module.valid({"index": torch.tensor([3, -1])}).tolist() == [[True], [False]]
    assert module.valid(torch.zeros(2)) is None


@pytest.mark.parametrize(("examples", "refused"), [(7, True), (8, False)])
def test_a_sampler_that_repeats_examples_is_refused(examples, refused):
    sampler = torch.utils.data.DistributedSampler(range(examples), num_replicas=2, rank=0)
    loader = torch.utils.data.DataLoader(range(examples), sampler=sampler)
    check = partial(_check_counts_once, SimpleNamespace(world_size=2), loader)
    if refused:
        with pytest.raises(ConfigError, match="7 examples don't divide by 2 processes"):
            check()
    else:
        check()


def test_one_head_of_grouped_query_attention_changes_only_its_slice(tmp_path):
    """Against attention written by hand, with two key-value heads for four heads that are wider than the model."""
    callback = AblationCallback(["zero"], choice=EachHead())
    module, _ = tiny.fit(tmp_path, tiny.Own(tiny.mistral()), callback=callback)
    site = module.calibration.sites[0]
    assert (site.width, site.heads) == (32, 4) and len(callback.results.rows) == 1 + 2 * 4
    attention, batch = module.target.model.layers[0].self_attn, tiny.tokens()
    seen = {}
    attention.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    attention.o_proj.register_forward_hook(lambda _, inputs, output: seen.update(out=output))
    sweep = Sweep(module.calibration, [Zero()], [BASELINE, Condition("zero", 1.0, None, site.name, 2)], EachHead())
    sweep.prepare()
    with torch.no_grad(), sweep.applied(sweep.conditions[1]):
        module.target(batch["input_ids"])
    x, (cos, sin) = seen["hidden_states"], seen["position_embeddings"]

    def heads(projection):
        return projection(x).view(3, tiny.LENGTH, -1, 8).transpose(1, 2)

    def rotated(y):
        turned = torch.cat([-y[..., 4:], y[..., :4]], -1)
        return y * cos.unsqueeze(1) + turned * sin.unsqueeze(1)

    with torch.no_grad():
        query, key, value = rotated(heads(attention.q_proj)), rotated(heads(attention.k_proj)), heads(attention.v_proj)
        made = []
        for head in range(4):
            scores = query[:, head] @ key[:, head // 2].mT / 8**0.5
            scores = scores.masked_fill(torch.ones(tiny.LENGTH, tiny.LENGTH).triu(1).bool(), -torch.inf)
            made.append(scores.softmax(-1) @ value[:, head // 2])
        made[2] = torch.zeros_like(made[2])
        expected = torch.cat(made, -1) @ attention.o_proj.weight.T
    torch.testing.assert_close(seen["out"], expected, rtol=1e-5, atol=1e-5)


def test_each_layer_ablates_its_attention_and_mlp_together(tmp_path):
    callback = AblationCallback(["mean"], sites=["attention", "mlp"], choice=EachLayer())
    tiny.fit(tmp_path, callback=callback)
    assert [row.part for row in callback.results.rows] == ["", "transformer.h.0", "transformer.h.1"]
    raw = raw_activations(tiny.gpt2(), tiny.loader(seed=1), "attention", "mlp")
    values = {name: x.double().mean(0).float() for name, x in raw.items() if ".h.1." in name}
    masks = {name: torch.ones(len(value), dtype=torch.bool) for name, value in values.items()}
    loss, _, _ = plain_evaluation(tiny.gpt2(), tiny.loader(seed=2), values, masks)
    assert callback.results.rows[2].cross_entropy == pytest.approx(loss, abs=2e-6)
    assert (tmp_path / "importance.png").exists() and not (tmp_path / "curves").exists()


def test_a_choice_by_importance_gathers_its_own_statistics_and_validates(tmp_path):
    choice = ByImportance("magnitude", "highest", "head")
    _, callback = tiny.fit(tmp_path, callback=AblationCallback(["zero"], [0.25, 1.0], [1, 2], choice=choice))
    assert [(row.fraction, row.seed) for row in callback.results.rows[1:]] == [(0.25, None), (1.0, None)]
    again = AblationCallback(["zero"], [0.25, 1.0], [1, 2], choice=choice)
    module = tiny.Own(tiny.gpt2())
    tiny.trainer(tmp_path / "again", again).validate(module, tiny.loader(seed=2), ckpt_path=tmp_path / "ablation.ckpt")
    assert again.results.rows == callback.results.rows


def test_a_target_that_mixes_by_other_ways_is_refused_before_anything_is_gathered(tmp_path):
    class Convolved(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.config = tiny.gpt2(), tiny.gpt2().config
            self.conv = nn.Conv1d(16, 16, 3, padding=1)
            self.model.transformer.h[0].ln_2.register_forward_hook(lambda m, i, out: out + self.conv(out.mT).mT)

        def forward(self, **inputs):
            return self.model(**inputs)

    class Probed(tiny.Own):
        def probes(self, batch):
            one = {name: value[:1] for name, value in batch.items()}
            other = one["input_ids"].clone()
            other[:, 3] += 1
            return one, {**one, "input_ids": other}

        def hidden(self, batch):
            return [self.logits(batch)]

    tiny.fit(tmp_path / "pure", Probed(tiny.gpt2()))
    with pytest.raises(SiteError, match="also mixes positions by other ways"):
        tiny.fit(tmp_path / "mixed", Probed(Convolved()))
    with pytest.raises(SiteError, match="also mixes positions by other ways"):
        tiny.fit(tmp_path / "self", Probed(Convolved()), callback=AblationCallback(sites="self-attention"))
    tiny.fit(tmp_path / "all the same", Probed(Convolved()), callback=AblationCallback(sites="*.attn.c_proj"))
    with pytest.raises(NotImplementedError, match="Own gives probes"):
        tiny.Own(tiny.gpt2()).hidden({})


def test_a_choice_that_the_sites_do_not_allow_is_refused_at_the_first_batch(tmp_path):
    class Counting(tiny.Own):
        steps = 0

        def training_step(self, batch, batch_idx):
            Counting.steps += 1
            return super().training_step(batch, batch_idx)

    callback = AblationCallback(sites="mlp", choice=EachHead())
    with pytest.raises(SiteError, match="h.0.mlp.c_proj .mlp, 64 neurons. has no heads"):
        tiny.fit(tmp_path, Counting(tiny.gpt2()), callback=callback)
    assert Counting.steps == 1


def test_a_checkpoint_of_an_older_version_is_refused():
    calibration = Calibration(tiny.gpt2(), [])
    with pytest.raises(StatisticsError, match="older version of this package; run `fit` again"):
        calibration.load_state_dict({"transformer.h.0.attn.c_proj": {}})


def test_a_checkpoint_whose_statistics_have_another_form_is_refused():
    def gathered():
        made = Calibration(model, [Moments, Covariance])
        made.find(lambda: tiny.run(model))
        return made

    model = tiny.gpt2()
    state = gathered().state_dict()
    covariance = state["sites"][0]["statistics"]["Covariance"]
    covariance["parts"] = covariance["parts"][0]  # as before it had blocks
    with pytest.raises(StatisticsError, match=r"Covariance of .* as \(18, 16\), expected \(1, 18, 16\): .* run `fit`"):
        gathered().load_state_dict(state)


def test_a_trace_of_the_first_conditions_names_them(tmp_path):
    callback = AblationCallback(["zero", "mean"], [0.5, 1.0], [1, 2], profile=True, folder=tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the profiler's own
        tiny.fit(tmp_path, callback=callback)
    trace = json.loads((tmp_path / "run" / "trace.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"zero 50% seed 1", "mean 100%", "scoring"} <= names
