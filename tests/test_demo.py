"""Runs of the three embedded targets against plain PyTorch, and of each shipped config."""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from lightning_ablate import AblationCallback, EachHead, Results
from lightning_ablate.cli import AblationCLI
from lightning_ablate.statistics import Histogram
from tests import reference, tiny
from tests.demos import NAMES, WIDTH, batches, data_of, module_of

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One ``fit`` of each target with a few conditions, made when first asked for."""
    made = {}

    def run(name):
        if name not in made:
            callback = AblationCallback(["zero", "mean", "peak"], [0.1, 0.5, 0.9], [42, 123, 456])
            module, data = module_of(name), data_of(name)
            tiny.trainer(tmp_path_factory.mktemp(name), callback).fit(module, datamodule=data)
            made[name] = module, data, callback
        return made[name]

    return run


@pytest.mark.parametrize("name", NAMES)
def test_baseline_equals_plain_pytorch(runs, name):
    module, data, callback = runs(name)
    loss, hits, n = reference.evaluation(module.target, batches(module, data.val_dataloader()))
    base = callback.results.baseline
    assert (base["n"], base["top1"]) == (n, hits) and base["cross_entropy"] == pytest.approx(loss, abs=1e-6)


def test_vit_classifies_held_out_digits(runs):
    base = runs("vit")[2].results.baseline
    assert base["n"] == 449 and base["top1"] >= 0.97


@pytest.mark.parametrize(("name", "gain"), [("gpt2", 2.0), ("roberta", 1.0)])
def test_language_models_know_more_than_token_frequencies(runs, name, gain):
    module, data, callback = runs(name)
    counts = Counter()
    with torch.no_grad():
        for batch in batches(module, data.val_dataloader()):
            counts.update(reference.scored(module.target, batch)[1].tolist())
    unigram = -sum(count / counts.total() * math.log(count / counts.total()) for count in counts.values())
    assert callback.results.baseline["cross_entropy"] <= unigram - gain


@pytest.mark.parametrize("name", NAMES)
def test_more_ablation_does_more_damage(runs, name):
    summary = runs(name)[2].results.summary()
    for method in ("zero", "mean", "peak"):
        tenth, half, most = summary[summary["method"] == method]["top1"]
        assert tenth > half > most


@pytest.mark.parametrize("name", NAMES)
def test_peak_equals_the_papers_on_raw_activations(runs, name):
    module, data, callback = runs(name)
    calibration = callback.run.calibration
    paths = [site.path for site in calibration.sites]
    raw = reference.raw_activations(module.target, batches(module, data.train_dataloader()), paths)
    assert len(raw) == 4
    for site in calibration.sites:
        expected = reference.peaks(raw[site.path])
        assert len(expected) == WIDTH[name]
        torch.testing.assert_close(calibration[site][Histogram].peak, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["vit", "gpt2"])
def test_the_map_of_heads_equals_a_loop_of_plain_hooks(name, tmp_path):
    module, data, callback = module_of(name), data_of(name, 2_000), AblationCallback(["mean"], neurons=EachHead())
    tiny.trainer(tmp_path, callback).fit(module, datamodule=data)
    table = callback.results.table.set_index(["part", "head"])
    paths = [site.path for site in callback.run.calibration.sites]
    assert len(table) == 1 + 4 * 4
    target, size = module_of(name).target, WIDTH[name] // 4
    raw = reference.raw_activations(target, batches(module, data.train_dataloader()), paths)
    evaluated = batches(module, data.val_dataloader())
    for path in paths:
        mean = raw[path].double().mean(0).float()
        for head in range(4):
            replace = {path: reference.put(torch.arange(4 * size) // size == head, mean)}
            loss, hits, n = reference.evaluation(target, evaluated, replace)
            row = table.loc[(path, head)]
            assert row["n"] == n and row["top1"] == pytest.approx(hits, abs=1 / n)
            assert row["cross_entropy"] == pytest.approx(loss, abs=2e-6)


def fitted(config, folder, monkeypatch, *options):
    """What a shipped config leaves."""
    monkeypatch.chdir(folder)
    AblationCLI(["fit", f"--config={CONFIGS / config}", "--trainer.enable_progress_bar=false", *options])
    (made,) = folder.glob("lightning_logs/*/version_0")
    return made


@pytest.mark.parametrize("config", sorted(path.name for path in CONFIGS.glob("demo_*.yaml")))
def test_shipped_config_runs(config, tmp_path, monkeypatch, pytestconfig):
    full, options = pytestconfig.getoption("--full"), ["--trainer.accelerator=cpu"]
    if not full:
        size = "images=60" if "vit" in config else "tokens=3000"
        options += [f"--data.{purpose}_{size}" for purpose in ("calibration", "evaluation")]
        options += ["--ablation.fractions=[0.5]", "--ablation.seeds=[42]"]
    folder = fitted(config, tmp_path, monkeypatch, *options)
    counts = Results.load(folder).table["method"].value_counts()
    expected = {method: 28 if full else 1 for method in ("zero", "mean", "peak")} | {"none": 1}
    resampled = ["pixels"] if "vit" in config else ["characters", "ids", "generated"]
    assert counts.to_dict() == expected | {f"resample-{kind}": 30 if full else 1 for kind in resampled}
    assert (folder / "ablation.ckpt").stat().st_size < 5 * 2**20


@pytest.mark.parametrize("config", sorted(path.name for path in CONFIGS.glob("replacements_*.yaml")))
def test_replacements_past_the_paper_hurt_less(config, tmp_path, monkeypatch, full):
    fractions = "--ablation.fractions=[0.1,0.5,0.9]"
    results = Results.load(fitted(config, tmp_path, monkeypatch, fractions, "--trainer.accelerator=cpu"))
    assert len(results.methods) == 12 and len(results.table) == 1 + 12 * 9
    damage = results.compare(other="none").pivot(index="fraction", columns="method", values="cross_entropy")
    print(config, damage.round(4).to_string(), sep="\n")
    for fraction, here in damage.iterrows():
        assert here["conditional-optimal"] <= min(here["conditional-mean"], here["optimal"]) + 0.005
        assert here["conditional-mean"] <= 0.45 * here["mean"] or "gpt2" not in config or fraction != 0.5
        assert here["optimal"] < here[["zero", "mean", "peak"]].min() or fraction < 0.5


def test_the_default_is_the_shipped_vit_config():
    default = CONFIGS.parent / "lightning_ablate" / "demo" / "default.yaml"
    assert default.read_text().split("\n", 1)[1] == (CONFIGS / "demo_vit.yaml").read_text().split("\n", 1)[1]
