"""What units are worth alone: exact where that can be known, the truth where it can be measured."""

import json
from math import comb

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader

from lightning_ablate import (
    AblationCallback,
    AblationModule,
    Attribution,
    EachHead,
    Optimal,
    Ranked,
    Results,
    Scored,
    Site,
)
from lightning_ablate import attribution as attributions
from lightning_ablate.agreement import beyond, picked, trust
from lightning_ablate.attribution import Measured, cotangents, orders, table_of
from lightning_ablate.errors import ConfigError, DataError, StatisticsError
from lightning_ablate.methods import Ablation, ConditionalMean, ConditionalMeanPerHead, ConditionalTuned, others_of
from lightning_ablate.phases import attribution as phase
from lightning_ablate.phases import check_attribution
from lightning_ablate.results.attributions import lines, plot, wide
from lightning_ablate.statistics import FOUND, Moments, SiteStatistics
from tests import reference, tiny
from tests.command import CONFIGS, FEW, TWO, assert_same_bytes, found
from tests.tiny import Death

METHODS = ["zero", "mean", "positional-mean", "conditional-mean", "noise"]


class Linear(AblationModule):
    """Logits that are linear in the one site, and small, so that the loss is a square; a position an example."""

    def build_target(self):
        torch.manual_seed(0)
        target = nn.Sequential(nn.Identity(), nn.Linear(8, 5))
        nn.init.normal_(target[1].weight, std=3e-3)
        return target

    def evaluate(self, batch):
        return Scored(self.target(batch["x"]), batch["label"], batch["index"])


def rows(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 8, generator=generator) @ torch.randn(8, 8, generator=generator)
    return [{"x": x[i], "label": torch.tensor(i % 5), "index": i} for i in range(count)]


def attributed(folder, module, train, methods=("zero", "mean"), val=None, **options):
    given = {name: options.pop(name) for name in ("draws", "verify", "examples", "heads") if name in options}
    attribution = Attribution(methods, **given)
    callback = AblationCallback(["zero"], [1.0], [1], attribution=attribution, dirpath=folder / "run", **options)
    tiny.fit(folder, module, train, train if val is None else val, callback)
    return callback


@pytest.fixture
def exact(monkeypatch):
    """In the place of random ones the cotangents whose products are the Fisher of one position an example."""

    def made(scored, rows, draws):
        yield next(cotangents(scored, rows, 0))
        p = scored.logits.softmax(1)
        for label in range(p.shape[1]):
            yield (p[:, [label]] * p.shape[1]).sqrt() * (torch.eye(p.shape[1])[label] - p)

    monkeypatch.setattr(phase, "cotangents", made)


@pytest.mark.filterwarnings("ignore:.* calibrate and are evaluated as well")
def test_of_a_linear_target_with_a_squared_error_it_is_the_truth(tmp_path, exact):
    loader = DataLoader(rows(20), batch_size=5)
    options = {"sites": ["*1"], "draws": 5, "verify": 8}
    table = attributed(tmp_path, Linear(), loader, ["zero", "mean", "conditional-mean"], **options).attributions
    neurons = table[table["level"] == "neuron"]
    assert len(neurons) == 3 * 8 and neurons["verified"].notna().all()
    total = neurons["first"] + neurons["second"]
    assert neurons["verified"].abs().max() > 1e-4
    np.testing.assert_allclose(total, neurons["verified"], rtol=0, atol=1e-5 * neurons["verified"].abs().max() * 40)
    np.testing.assert_allclose(neurons["estimate"], total, atol=1e-6)
    # the standard error of a mean, by hand
    np.testing.assert_allclose(neurons["se"], neurons["verified_se"], rtol=2e-2)


def test_the_random_gradients_are_unbiased_for_the_fisher_and_do_not_depend_on_the_batch():
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)) * 2
    scored = Scored(logits, torch.tensor([0, 1, 2, 3]), torch.tensor([7, 7, -1, 9]))
    place = torch.tensor([0, 0, -1, 1])
    first, *drawn = cotangents(scored, place, 6000)
    p = logits.double().softmax(1)
    truth = torch.eye(6)[scored.targets]
    torch.testing.assert_close(first, ((p - truth) * (place >= 0).unsqueeze(1)).float())
    found = torch.stack(drawn).double()
    assert not bool(found[:, 2].any())
    both = torch.cat([found[:, 0], found[:, 1]], 1)  # positions of one example are independent
    fisher = torch.block_diag(*(torch.diag(p[i]) - torch.outer(p[i], p[i]) for i in (0, 1)))
    assert float((both.T @ both / len(both) - fisher).abs().max()) < 0.02
    assert float(both.mean(0).abs().max()) < 0.03
    alone = scored._replace(logits=logits[3:], targets=scored.targets[3:], example=scored.example[3:])
    _, again = cotangents(alone, torch.tensor([0]), 1)
    torch.testing.assert_close(again[0], drawn[0][3])


def test_what_one_position_does_levels_off():
    moved = torch.tensor([[0.1, 0.2], [1e-3, 2e-3], [-1e-3, 1e-3]]).view(3, 1, 2, 1)
    first, second, estimate = (order.item() for order in orders(moved))
    assert first == pytest.approx(0.3) and second == pytest.approx((3e-3**2 + 0) / 4, rel=1e-4)
    assert estimate == pytest.approx(first + second, rel=1e-5)
    moved[1:, 0, 1] *= 1e5
    first, second, estimate = (order.item() for order in orders(moved))
    assert second > 1e3 and estimate < 4 * attributions.BOUND and first == pytest.approx(0.3)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    options = {"val": tiny.loader(seed=2), "verify": 5, "sites": ["attention", "mlp"]}
    return attributed(folder, tiny.Own(tiny.gpt2()), tiny.loader(seed=1), METHODS, **options)


def test_what_is_verified_is_what_plain_hooks_find_on_the_same_examples(gpt2):
    """Of methods whose replacement plain hooks can put in: zero, and the mean by numpy."""
    model, batches = tiny.gpt2(), list(tiny.loader(seed=1))
    paths = [site.name for site in gpt2.run.calibration.sites]
    raw = reference.raw_activations(model, batches, paths)
    clean, *_ = reference.evaluation(model, batches, {})
    checked = gpt2.attributions.dropna(subset="verified")
    groups = checked.groupby(["method", "level", "kind"]).size()
    assert groups.tolist() == [8, 10, 10] * len(METHODS)  # all heads, and neurons of both kinds of site
    for row in checked[checked["method"].isin(["zero", "mean"])].itertuples():
        width = raw[row.site].shape[1]
        size = 1 if row.level == "neuron" else width // 4
        mask = torch.arange(width) // size == row.unit
        values = torch.zeros(width) if row.method == "zero" else raw[row.site].double().mean(0).float()
        loss, *_ = reference.evaluation(model, batches, {row.site: reference.put(mask, values)})
        assert row.verified == pytest.approx(loss - clean, abs=2e-6)


def test_units_add_up(gpt2):
    table = gpt2.attributions
    assert set(table["method"]) == set(METHODS) and table["estimate"].notna().all() and (table["se"] >= 0).all()
    for method in ("zero", "mean", "positional-mean", "noise"):
        own = table[table["method"] == method]
        for site in gpt2.run.calibration.sites:
            here = own[own["site"] == site.name].set_index("level")["first"]
            neurons = here.loc["neuron"].to_numpy()
            assert here.loc["site"] == pytest.approx(neurons.sum(), abs=1e-6)
            if site.heads:
                np.testing.assert_allclose(here.loc["head"], neurons.reshape(site.heads, -1).sum(1), atol=1e-7)


def test_of_a_trained_target_estimates_agree_with_the_truth(tmp_path):
    options = ["--data.max_length=64", "--data.calibration_tokens=1000", "--data.evaluation_tokens=100"]
    options += [
        "--ablation.methods=mean",
        "--ablation.attribution.methods=[zero,mean]",
        "--ablation.attribution.verify=16",
    ]
    options.append("--ablation.sites=[attention,mlp]")
    found(tmp_path / "run", "fit", "--config", CONFIGS / "demo_gpt2.yaml", *FEW, *options)
    for name, pearson in (("neurons", 0.95), ("heads", 0.8)):
        table = pd.read_parquet(tmp_path / "run" / f"{name}.parquet")
        for method in ("zero", "mean"):
            pair = table[[f"{method}_estimate", f"{method}_verified"]].dropna()
            assert len(pair) == {"neurons": 64, "heads": 16}[name] and np.corrcoef(pair.T)[0, 1] > pearson


@pytest.mark.parametrize("kind", [ConditionalMean, ConditionalMeanPerHead])
def test_the_conditional_mean_of_a_unit_alone_is_that_of_a_condition_which_ablates_it_alone(kind):
    x, site = tiny.mixed(600).view(60, 10, 12)[..., [0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 0, 3]], Site("p", 12, heads=3)
    statistics = tiny.gathered(site, [x + torch.randn(x.shape) * 0.1], *kind.statistics)
    new = torch.randn(4, 5, 12)
    nothing = Ablation(site, torch.ones(12, dtype=torch.bool), statistics, None)
    for size, replace in kind().alone(nothing, [1, 4, 12]).items():
        for unit in range(12 // size):
            mask = torch.arange(12) // size == unit
            expected = kind().prepare(Ablation(site, mask, statistics, None))(new).expand(new.shape)
            found = replace(new).expand(new.shape)
            torch.testing.assert_close(found[..., mask], expected[..., mask], rtol=1e-3, atol=2e-3)


def test_padding_held_back_positions_and_other_batches_change_nothing(tmp_path):
    plain, longer = tiny.loader(seed=1).dataset, []
    for row in plain:
        ids = torch.cat([row["input_ids"], torch.randint(5, 50, (3,))])
        real = torch.cat([row["attention_mask"], torch.zeros(3).long()])
        longer.append({**row, "input_ids": ids, "attention_mask": real})
    longer.append({**longer[0], "index": torch.tensor(-1)})  # which only fills a batch
    given = {"methods": ["zero", "mean", "conditional-mean"], "val": tiny.loader(seed=2)}
    one = attributed(tmp_path / "one", tiny.Own(tiny.gpt2()), DataLoader(plain, batch_size=6), **given).attributions
    other = attributed(
        tmp_path / "other", tiny.Own(tiny.gpt2()), DataLoader(longer, batch_size=2), **given
    ).attributions
    for column in ("first", "second", "estimate", "se"):
        np.testing.assert_allclose(one[column], other[column], rtol=1e-3, atol=2e-6)


def test_resampling_is_attributed_with_what_another_example_does(tmp_path):
    """A site at a time: at fraction 1 the first order is the gradient, by hand, times what the donors do."""
    train, model, method = tiny.loader(seed=1, batch_size=6), tiny.gpt2(), "resample-same-position"
    made = attributed(tmp_path, tiny.Own(tiny.gpt2()), train, [method], val=tiny.loader(seed=2))
    table = made.attributions.set_index(["site", "level"])["first"]
    batch, paths = next(iter(train)), [site.name for site in made.run.calibration.sites]
    donors = others_of(batch["index"], 1, 6)
    kept = {}
    change = {path: lambda x, path=path: kept.setdefault(path, x.detach().requires_grad_()) for path in paths[:1]}
    with reference.plain_hooks(model, change):
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    real = batch["attention_mask"][:, 1:].bool()
    torch.nn.functional.cross_entropy(logits[real], batch["input_ids"][:, 1:][real], reduction="sum").backward()
    x, lengths = kept[paths[0]], batch["attention_mask"].sum(1)
    other = torch.stack([x[d][torch.arange(x.shape[1]) % lengths[d]] for d in donors.tolist()])
    expected = (x.grad * (other - x)).sum((0, 1)).detach() / real.sum()
    np.testing.assert_allclose(table.loc[[(paths[0], "neuron")]], expected, rtol=1e-3, atol=1e-6)


def arguments(*more):
    methods = ["zero", "conditional-mean", "resample-any-position", "noise"]
    given = [f"--ablation.attribution.methods={json.dumps(methods)}"]
    given += ["--ablation.attribution.verify=3", "--ablation.attribution.draws=2", *more]
    given += ["--ablation.attribution.heads=true"]
    return ["fit", *FEW, "--data.calibration_images=19", "--data.evaluation_images=19", *given]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    found(folder, *arguments())
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_files_and_two_processes(tmp_path, whole, strategy):
    found(tmp_path / "two", *arguments(), *TWO, f"--trainer.strategy={strategy}")
    for name in ("neurons.parquet", "heads.parquet"):
        one, two = (pd.read_parquet(folder / name) for folder in (whole, tmp_path / "two"))
        columns = [column for column in one if column.split("_", 1)[-1] in (*FOUND, "verified")]
        assert len(columns) == 4 * 5 and len(one) == {"neurons.parquet": 4 * 64, "heads.parquet": 16}[name]
        np.testing.assert_allclose(one[columns], two[columns], rtol=1e-5, atol=1e-6)
    assert (whole / "attribution.png").is_file() and one["zero_verified"].notna().all()  # of all heads


def test_processes_that_use_other_numbers_of_examples_do_not_wait_for_one_another(tmp_path):
    """The last batch has an unused example on one of the two alone; the merged effects are those of one process."""
    given = ["--ablation.attribution.examples=15", "--ablation.attribution.methods=[zero]"]
    for name, more in (("one", []), ("two", TWO)):
        found(tmp_path / name, *arguments(*given), *more)
    one, two = (pd.read_parquet(tmp_path / name / "heads.parquet") for name in ("one", "two"))
    np.testing.assert_allclose(one["zero_verified"], two["zero_verified"], atol=1e-6)


@pytest.mark.parametrize("epoch", [1, 2])  # behind the attribution, in the verification
def test_a_run_that_died_goes_on(tmp_path, whole, epoch):
    dies = ["--trainer.callbacks=tests.tiny.Dies", f"--trainer.callbacks.epoch={epoch}", "--trainer.callbacks.batch=0"]
    with pytest.raises(Death):
        found(tmp_path / "run", *arguments(), *dies)
    found(tmp_path / "run", *arguments())
    assert_same_bytes(tmp_path / "run", whole, ["results.csv", "neurons.parquet", "heads.parquet"])


def test_it_ranks_units_also_from_a_checkpoint(tmp_path, gpt2):
    table, checkpoint = gpt2.attributions, gpt2.folder / "ablation.ckpt"
    for unit, under, first in (("neuron", "mean", "lowest"), ("head", "zero", "highest")):
        choice = Ranked("divergence", first=first, unit=unit, under=under)
        again = AblationCallback(["zero"], [0.5], [1], neurons=choice, sites=["attention"])
        tiny.validate(tmp_path / unit, checkpoint, again)
        for site in again.run.calibration.sites:
            own = table[(table["method"] == under) & (table["site"] == site.name) & (table["level"] == unit)]
            order = choice.order(site, 0, again.run.calibration[site]).tolist()
            assert order == own["second"].argsort(kind="stable").tolist()[:: 1 if first == "lowest" else -1]
    with pytest.raises(StatisticsError, match="needs the attribution of peak .*, there is zero, mean, positional-mean"):
        site = again.run.calibration.sites[0]
        Ranked("divergence", under="peak").order(site, 0, again.run.calibration[site])
    statistics = again.run.calibration[site]
    first_order = {"mean": statistics.attributed["mean"] * (torch.arange(len(FOUND)) != 1).unsqueeze(1)}
    of_a_metric = SiteStatistics(site.name, {}, {}, first_order)
    with pytest.raises(StatisticsError, match="is that of a metric, whose divergence isn't estimated"):
        Ranked("divergence").order(site, 0, of_a_metric)
    site, weight = again.run.calibration.sites[0], tiny.gpt2().transformer.h[0].attn.c_proj.weight
    score = again.run.calibration[site][Moments].sd * weight.norm(dim=1)
    assert Ranked("weighted-sd").order(site, 0, again.run.calibration[site]).tolist() == score.argsort().tolist()


def test_a_share_of_all_sites_together_takes_the_units_of_least_divergence_anywhere(tmp_path, gpt2):
    table, choice = gpt2.attributions, Ranked("divergence", under="mean", across="sites")
    given = [0.25, 0.5, 1.0], [1, 2]
    again = AblationCallback(["mean"], *given, neurons=choice, sites=["attention", "mlp"])
    tiny.validate(tmp_path, gpt2.folder / "ablation.ckpt", again)
    own = table[(table["method"] == "mean") & (table["level"] == "neuron")].sort_values("second", kind="stable")
    masks = again.sweep.masks(again.sweep.conditions(again.run.calibration.sites)[1], again.run.calibration)
    taken = {(site.name, neuron) for site, mask in masks.items() for neuron in mask.nonzero().flatten().tolist()}
    assert taken == set(own[["site", "unit"]][: len(own) // 4].itertuples(index=False, name=None))
    assert len({float(mask.double().mean()) for mask in masks.values()}) > 1  # more of some sites than of others
    assert again.results.table["ablated"].tolist() == pytest.approx([0.0, 0.25, 0.5, 1.0])
    heads = Ranked("divergence", "highest", unit="head", under="mean", across="sites")
    known = {site: again.run.calibration[site] for site in again.run.calibration.sites if site.heads}
    selection = heads.selections(list(known), [0.01, 0.125], [1])[0]
    (most,) = [site.name for site, mask in heads.masks_of(selection, known).items() if mask.any()]
    own = table[(table["method"] == "mean") & (table["level"] == "head")]
    assert selection.fraction == 0.125 and own.loc[own["second"].idxmax(), "site"] == most
    with pytest.raises(ConfigError, match="no mask of a single one"):
        heads.mask(selection, next(iter(known)), next(iter(known.values())))
    with pytest.raises(ConfigError, match="the surgeon's order is of one site"):
        Ranked("surgeon", across="sites")


@pytest.mark.parametrize(("methods", "heads", "measured"), [(1, None, 8), (3, None, 0), (3, True, 24), (1, False, 0)])
def test_all_heads_are_measured_where_that_takes_no_more_than_the_estimates(tmp_path, methods, heads, measured):
    given = {"val": tiny.loader(seed=2), "methods": ["zero", "mean", "resample-any-position"][:methods], "heads": heads}
    made = attributed(tmp_path, tiny.Own(tiny.gpt2()), tiny.loader(seed=1), **given)
    table = made.attributions[made.attributions["level"] == "head"]
    assert len(made.run.measured) == measured and len(table) == 8 * methods
    if not measured:
        return
    assert (table["picked"] == "all").all() and table["verified"].notna().all()
    model, batches = tiny.gpt2(), list(tiny.loader(seed=1))
    clean, *_ = reference.evaluation(model, batches, {})
    for row in table[table["method"] == "zero"].itertuples():
        mask = torch.arange(16) // 4 == row.unit
        loss, *_ = reference.evaluation(model, batches, {row.site: reference.put(mask, torch.zeros(16))})
        assert row.verified == pytest.approx(loss - clean, abs=2e-6)
    largest = table[table["method"] == "zero"].nlargest(1, "verified").iloc[0]
    t = table["verified"] / table["verified_se"] * (table["examples"] - 1) ** 0.5 / table["examples"] ** 0.5
    p = 2 * stats.t.sf(t.abs(), table["examples"] - 1)
    own = (table["method"] == "zero").to_numpy()
    assert table["q"][own].to_numpy() == pytest.approx(stats.false_discovery_control(p[own]))
    text, figure = lines(made.attributions), plot(made.attributions)
    shown = (
        f"{largest['site']} head {largest['unit']}: {largest['verified']:+.4f} ± {largest['verified_se']:.4f}, estim"
    )
    assert shown in text and text.index(shown) < text.index("estimates against")
    assert "of the unmeasured" not in text  # nothing was drawn
    assert "measured (nats)" in [axes.get_ylabel() for axes in figure.axes]


def test_what_a_sample_cannot_tell_is_said_and_holds():
    """Of 300 units 10 random ones are measured: the share of others beyond the largest is rarely above the bound."""
    generator, site, told = np.random.default_rng(0), Site("p", 300), beyond(10, 290)
    above = []
    for _ in range(4000):
        order = generator.permutation(300)  # the ranks of units, the random ones first
        above.append((order[10:] > order[:10].max()).mean() > told)
    assert 0.04 < np.mean(above) < 0.06  # by as many samples, ± 0.01
    count = round(told * 290)
    assert comb(299 - count, 10) / comb(300, 10) <= 0.05 < comb(300 - count, 10) / comb(300, 10)
    found = torch.rand(len(FOUND), 301, generator=torch.Generator().manual_seed(0)).double()
    plain = table_of({"mean": {site: found}})
    rows = picked(plain, 10)[["method", "site", "level", "unit", "picked"]]
    measured = [Measured(*key, float(place), 0.1) for place, key in enumerate(rows.itertuples(index=False, name=None))]
    table = table_of({"mean": {site: found}}, measured)
    (said,) = trust(table).to_dict("records")
    assert said["largest_random"] == 19.0 and said["beyond"] == pytest.approx(1 - 0.05**0.1, abs=0.01)
    assert "measured: +19.0000; at most 26% of the unmeasured are worth more (95% confidence)" in lines(table)


def synthetic(layers, heads, verified=True):
    generator = torch.Generator().manual_seed(0)
    by_site, measured = {}, []
    for layer in range(layers):
        site = Site(f"model.layers.{layer}.self_attn.o_proj", 4 * heads, heads=heads)
        units = 4 * heads + heads + 1
        found = torch.randn(4, units, generator=generator).double().abs().pow(3) * 0.01
        found = torch.cat([found, torch.full((1, units), 9.0)])  # examples
        by_site[site] = found
        measured.append(Measured("mean", site.name, "head", 0, "largest", float(found[2, 4 * heads]) * 1.1, 0.001))
        measured.append(Measured("mean", site.name, "head", 1, "random", float(found[2, 4 * heads + 1]) * 0.9, 0.001))
    return table_of({"mean": by_site}, measured if verified else ())


@pytest.mark.parametrize(("layers", "heads"), [(5, 5), (30, 9), (32, 32)])
@pytest.mark.parametrize("verified", [True, False])
def test_figures_of_any_size(layers, heads, verified, tmp_path):
    figure = plot(synthetic(layers, heads, verified))
    assert len(figure.axes) == 2 + verified  # a map, its scale, and the truth
    figure.savefig(tmp_path / "figure.png")
    ticks = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert ticks[:2] == ["0", "1"] and len(ticks) <= 32
    assert figure.get_figwidth() <= 7.0  # inches: a page's width
    assert figure.axes[0].get_title() == "mean: heads" and figure.axes[0].get_ylabel() == "layer"


def test_maps_of_several_methods_have_the_same_colours():
    table = pd.concat([synthetic(5, 5, False), synthetic(5, 5, False).assign(method="zero")], ignore_index=True)
    table.loc[table["method"] == "zero", "estimate"] *= 0.5
    limits = [axes.images[0].norm.vmax for axes in plot(table).axes if axes.get_xlabel().startswith("head")]
    heads = table[table["level"] == "head"]["estimate"].abs().sort_values(ascending=False)
    assert limits == [pytest.approx(heads.iloc[0])] * 2


def test_how_far_to_trust_a_map_is_what_scipy_says():
    table = synthetic(30, 9)
    said = trust(table).set_index("level").loc["head"]
    own = table[(table["level"] == "head") & table["verified"].notna()]
    x, y = own["estimate"], own["verified"]
    assert said["pearson"] == pytest.approx(stats.pearsonr(x, y)[0])
    assert said["spearman"] == pytest.approx(stats.spearmanr(x, y)[0])
    assert said["slope"] == pytest.approx(stats.linregress(x, y).slope)
    for name in ("pearson", "spearman", "slope"):
        assert said[f"{name}_low"] <= said[name] <= said[f"{name}_high"]
    assert said[["scale", "scale_low", "scale_high"]].isna().all()  # second orders don't add up to anything positive
    text = lines(table)
    top = table[table["level"] == "neuron"].nlargest(1, "estimate").iloc[0]
    head, dim = divmod(top["unit"], 4)
    assert f"  {top['site']} neuron {top['unit']} (head {head}, dim {dim}): +" in text
    assert "estimates against measured effects" in text
    own = table[table["level"] == "head"]
    expected = stats.false_discovery_control(2 * stats.t.sf((own["estimate"] / own["se"]).abs() * (8 / 9) ** 0.5, 8))
    assert own["q"].to_numpy() == pytest.approx(expected) and 0 < (own["q"] <= 0.05).sum() < len(own) / 2
    count = f"{(own['q'] <= 0.05).sum()} of them found to differ from 0 (q ≤ 0.05)"
    assert f"mean, 270 heads (self-attention), {count}" in text
    assert wide(table, "head")["mean_q"].tolist() == own["q"].tolist()
    assert wide(table, "head").columns.tolist()[:4] == ["site", "head", "mean_first", "mean_second"]


def test_units_that_do_nothing_are_not_found_and_those_of_one_example_have_no_q():
    found = torch.tensor([[0.0, 1.0, 3.0, 1.0], [0.0] * 4, [0.0, 1.0, 3.0, 1.0], [0.0, 0.0, 1.0, torch.nan], [4.0] * 4])
    table = table_of({"mean": {Site("p", 3): found.double()}})
    assert table["q"].tolist() == pytest.approx([1.0, 0.0, 1.5 * 2 * stats.t.sf(3 * 0.75**0.5, 3), np.nan], nan_ok=True)
    assert table_of({})["q"].empty


def test_second_orders_are_scaled_until_the_measured_units_add_up(request):
    """A third of the units has been measured; on average over the samples the scale is that of all."""
    generator, site = np.random.default_rng(0), Site("p", 60)
    first, second = generator.normal(size=61), generator.exponential(size=61) ** 2
    found = torch.tensor(np.stack([first, 9 * second, first + second, second, 9 + 0 * second]))
    true = first + second * generator.uniform(1, 2, size=61)
    whole, plain = (true - first)[:60].sum() / second[:60].sum(), table_of({"mean": {site: found}})
    sums, ends = [], []
    for seed in range(200 if request.config.getoption("--full") else 60):
        rows = picked(plain[plain["level"] == "neuron"], 10, seed)
        keys = rows[["method", "site", "level", "unit", "picked"]].itertuples(index=False, name=None)
        table = table_of({"mean": {site: found}}, [Measured(*key, true[key[3]], 0.0) for key in keys])
        own = table[table["level"] == "neuron"]
        scale = ((own["calibrated"] - own["first"]) / (own["estimate"] - own["first"])).to_numpy()
        said = trust(table).iloc[0]
        assert np.ptp(scale) < 1e-9 and said["scale"] == pytest.approx(scale[0])
        sums.append(scale[0])
        ends.append(said["scale_low"] <= whole <= said["scale_high"])
    assert np.mean(sums) == pytest.approx(whole, rel=0.01) and np.std(sums) < 0.1 and np.mean(ends) > 0.85
    site_row = table[table["level"] == "site"]  # of which none was measured
    assert np.isnan(site_row["calibrated"].item())


def test_what_cannot_be_attributed_is_refused(tmp_path):
    methods = [ConditionalTuned(steps=1, examples=2)]
    callback = AblationCallback(methods, [1.0], [1], attribution=Attribution(methods))
    with pytest.raises(ConfigError, match="conditional-tuned can.t be attributed"):
        tiny.fit(tmp_path, callback=callback)

    for under, given in ((None, ()), ("mean", ["zero"])):
        choice = Ranked("divergence", under=under)
        with pytest.raises(ConfigError, match="expected it in --ablation.attribution.methods"):
            tiny.fit(
                tmp_path,
                callback=AblationCallback(["zero"], [0.5], [1], neurons=choice, attribution=Attribution(given)),
            )

    ranked = {"neurons": Ranked("divergence"), "attribution": Attribution(["mean"], metric="logit_difference")}
    with pytest.raises(ConfigError, match="the attribution of a metric doesn't estimate"):
        check_attribution(ranked["attribution"], AblationCallback(["mean"], **ranked).sweep, ["logit_difference"])

    class Graphless(tiny.Own):
        def evaluate(self, batch):
            with torch.no_grad():
                return super().evaluate(batch)

    with pytest.raises(ConfigError, match="needs gradients of the logits"):
        tiny.fit(
            tmp_path,
            Graphless(tiny.gpt2()),
            callback=AblationCallback(["zero"], [1.0], [1], attribution=Attribution(["zero"])),
        )


@pytest.mark.parametrize("options", [{}, {"fractions": [], "seeds": [], "neurons": EachHead()}])
def test_without_methods_units_are_attributed_and_the_intact_model_is_evaluated(tmp_path, capsys, options):
    swept = attributed(tmp_path, tiny.Own(tiny.gpt2()), tiny.loader(seed=1), val=tiny.loader(seed=2), verify=2)
    capsys.readouterr()
    attribution = Attribution(["zero", "mean"], verify=2)
    callback = AblationCallback([], attribution=attribution, dirpath=tmp_path / "alone", **options)
    tiny.fit(tmp_path, tiny.Own(tiny.gpt2()), callback=callback, logger=TensorBoardLogger(tmp_path / "logs"))
    found, shown = callback.results, capsys.readouterr().out
    columns = ["method", "site", "level", "unit", *FOUND]
    pd.testing.assert_frame_equal(callback.attributions[columns], swept.attributions[columns])
    pd.testing.assert_frame_equal(found.table, swept.results.table[:1])
    assert str(found) in shown and lines(callback.attributions) in shown and "nothing ablated: top-1" in shown
    files = {path.name for path in (tmp_path / "alone").iterdir()}
    assert {"heads.parquet", "attribution.png", "results.csv"} < files
    assert not files & {"degradation.png", "comparisons.png", "importance.png", "curves"}
    loaded = Results.load(tmp_path / "alone")
    assert (
        len(loaded.ranking()) == len(loaded.compare()) == 0
        and len(loaded.summary()) == 1
        and "1 conditions" in repr(found)
    )


def test_a_share_of_the_examples_is_attributed(tmp_path):
    given = {"val": tiny.loader(seed=2), "methods": ["zero"], "verify": 2}
    train = tiny.loader(seed=1)
    part = attributed(tmp_path / "part", tiny.Own(tiny.gpt2()), train, examples=3, **given)
    head = DataLoader(train.dataset[:3], batch_size=2)
    whole = attributed(tmp_path / "whole", tiny.Own(tiny.gpt2()), head, **given)
    pd.testing.assert_frame_equal(part.attributions, whole.attributions, atol=1e-7)


@pytest.mark.filterwarnings("ignore:.* calibrate and are evaluated as well")
def test_the_same_examples_are_attributed_and_verified_whatever_their_order(tmp_path):
    rows = tiny.loader(7, seed=1).dataset
    given = {"val": tiny.loader(seed=2), "methods": ["mean"], "verify": 2, "examples": 3}
    plain = attributed(tmp_path / "plain", tiny.Own(tiny.gpt2()), DataLoader(rows, batch_size=3), **given).attributions
    mixed = DataLoader(rows, batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(0))
    other = attributed(tmp_path / "mixed", tiny.Own(tiny.gpt2()), mixed, **given).attributions
    for column in ("estimate", "verified"):
        np.testing.assert_allclose(plain[column], other[column], rtol=2e-3, atol=2e-6)


def test_examples_that_are_not_those_of_the_batch_are_told(tmp_path):
    known = tiny.loader(6, seed=1).dataset
    rows = [{"id" if name == "index" else name: value for name, value in row.items()} for row in known]

    class Named(tiny.Own):
        def evaluate(self, batch):
            return super().evaluate({**batch, "index": batch["id"]})

        def valid(self, batch):
            return batch["attention_mask"].bool()

    callback = AblationCallback(["zero"], [1.0], [1], attribution=Attribution(["zero"]))
    with pytest.raises(DataError, match="`evaluate` scored example 5, the batch holds 0, 1"):
        tiny.fit(tmp_path, Named(tiny.gpt2()), DataLoader(rows[::-1], batch_size=2), DataLoader(rows), callback)


@pytest.mark.filterwarnings("ignore:.*what was learned is worse")  # in a step
def test_what_is_learned_waits_for_the_ranks_or_is_attributed_itself(tmp_path):
    learned = Optimal(steps=1, examples=2)
    for number, (attribute, neurons) in enumerate(((["zero"], Ranked("divergence")), ([learned], None))):
        callback = AblationCallback(
            [learned], [0.5], [1], neurons=neurons, attribution=Attribution(attribute, verify=1)
        )
        tiny.fit(tmp_path / str(number), callback=callback)
        assert callback.attributions["verified"].notna().sum() >= 2 and len(callback.results.table) == 2
