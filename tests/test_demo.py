"""Runs of the three embedded targets against plain PyTorch, and of each shipped config."""

import pytest
import torch

from lightning_ablate import AblationCallback, EachHead
from lightning_ablate.statistics import Histogram
from tests import reference, tiny
from tests.command import CONFIGS, found
from tests.demos import NAMES, WIDTH, batches, data_of, module_of


@pytest.mark.parametrize(("name", "gain"), [("vit", None), ("gpt2", 2.0), ("roberta", 1.0)])
def test_baseline_equals_plain_pytorch_and_knows_digits_or_more_than_token_frequencies(name, gain, tmp_path):
    module, data, callback = module_of(name), data_of(name), AblationCallback(fractions=[0])
    tiny.trainer(tmp_path, callback).fit(module, datamodule=data)
    base, evaluated = callback.results.baseline, batches(module, data.val_dataloader())
    loss, hits, n = reference.evaluation(module.target, evaluated)
    assert (base["n"], base["top1"]) == (n, hits) and base["cross_entropy"] == pytest.approx(loss, abs=1e-6)
    if name == "vit":
        assert n == 449 and hits >= 0.97
        return
    with torch.no_grad():
        targets = torch.cat([reference.scored(module.target, batch)[1] for batch in evaluated])
    shares = targets.bincount()[targets.unique()].double() / n
    assert loss <= -float((shares * shares.log()).sum()) - gain


@pytest.mark.parametrize("name", NAMES)
def test_peaks_and_the_map_of_heads_equal_a_loop_of_plain_hooks(name, tmp_path):
    module, data, callback = module_of(name), data_of(name, 2_000), AblationCallback(["peak"], neurons=EachHead())
    tiny.trainer(tmp_path, callback).fit(module, datamodule=data)
    table = callback.results.table.set_index(["part", "head"])
    sites = callback.run.calibration.sites
    assert len(table) == 1 + 4 * 4
    target, size = module_of(name).target, WIDTH[name] // 4
    raw = reference.raw_activations(target, batches(module, data.train_dataloader()), [s.path for s in sites])
    evaluated = batches(module, data.val_dataloader())
    for path, site in zip(raw, sites, strict=True):
        peaks = reference.peaks(raw[path])
        found = callback.run.calibration[site][Histogram].centres.peak
        torch.testing.assert_close(found, peaks, rtol=1e-12, atol=1e-12)
        for head in range(4):
            replace = {path: reference.put(torch.arange(4 * size) // size == head, peaks.float())}
            loss, hits, n = reference.evaluation(target, evaluated, replace)
            row = table.loc[(path, head)]
            assert row["n"] == n and row["top1"] == pytest.approx(hits, abs=1 / n)
            assert row["cross_entropy"] == pytest.approx(loss, abs=2e-6)


@pytest.mark.parametrize("config", sorted(path.name for path in CONFIGS.glob("demo_*.yaml")))
def test_shipped_config_runs(config, tmp_path, pytestconfig):
    full, options = pytestconfig.getoption("--full"), []
    if not full:
        size = "images=60" if "vit" in config else "tokens=3000"
        options += [f"--data.{purpose}_{size}" for purpose in ("calibration", "evaluation")]
        options += ["--ablation.fractions=[0.5]", "--ablation.seeds=[42]"]
    results = found(tmp_path / "run", "fit", "--config", CONFIGS / config, *options)
    counts = results.table["method"].value_counts()
    expected = {method: 28 if full else 1 for method in ("zero", "mean", "peak")} | {"none": 1}
    resampled = ["pixels"] if "vit" in config else ["characters", "ids", "generated"]
    assert counts.to_dict() == expected | {f"resample-{kind}": 30 if full else 1 for kind in resampled}
    assert (tmp_path / "run" / "ablation.ckpt").stat().st_size < 5 * 2**20


@pytest.mark.parametrize("config", sorted(path.name for path in CONFIGS.glob("replacements_*.yaml")))
def test_replacements_past_the_paper_hurt_less(config, tmp_path, full):
    results = found(tmp_path / "run", "fit", "--config", CONFIGS / config, "--ablation.fractions=[0.1,0.5,0.9]")
    assert len(results.methods) == 11 and len(results.table) == 1 + 11 * 9
    damage = results.compare(other="none").pivot(index="fraction", columns="method", values="cross_entropy")
    print(config, damage.round(4).to_string(), sep="\n")
    for fraction, here in damage.iterrows():
        assert here["conditional-mean"] <= 0.45 * here["mean"] or "gpt2" not in config or fraction != 0.5
        assert here["optimal"] < here[["zero", "mean", "peak"]].min() or fraction < 0.5


def test_the_default_is_the_shipped_vit_config():
    default = CONFIGS.parent / "lightning_ablate" / "demo" / "default.yaml"
    assert default.read_text().split("\n", 1)[1] == (CONFIGS / "demo_vit.yaml").read_text().split("\n", 1)[1]
