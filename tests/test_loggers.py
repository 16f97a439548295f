"""Every logger, the Trainer's own metrics and what validate returns hold each condition's scores."""

import pandas as pd
import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_ablate import AblationCallback
from tests import tiny


def test_each_condition_is_in_csv_in_an_offline_wandb_run_in_callback_metrics_and_in_what_validate_returns(
    tmp_path, drawn
):
    callback = AblationCallback(["zero", "mean"], [0.5], [1, 2])
    loggers = [CSVLogger(tmp_path), WandbLogger(project="tests", save_dir=tmp_path, offline=True)]
    trainer = tiny.trainer(tmp_path, callback, logger=loggers)
    trainer.fit(module := tiny.Own(tiny.gpt2()), tiny.loader(seed=1), tiny.loader(seed=2))
    names = ["baseline", "zero 0.5 seed 1", "zero 0.5 seed 2", "mean 0.5 seed 1", "mean 0.5 seed 2"]
    table = callback.results.table
    expected = {f"{m}/{n}": table[m][i] for m in ("top1", "top5", "cross_entropy", "kl") for i, n in enumerate(names)}
    options = {"fractions": [0.5], "seeds": [1, 2]}

    def assert_there(found):
        assert {name: float(found[name]) for name in expected} == pytest.approx(expected, rel=1e-6)

    assert_there(trainer.callback_metrics)
    assert_there(pd.read_csv(loggers[0].experiment.metrics_file_path).iloc[-1])
    kept = yaml.safe_load((tmp_path / "lightning_logs/version_0/hparams.yaml").read_text())
    assert {name: list(kept[name]) for name in options} == options and len(kept["methods"]) == 2
    run = loggers[1].experiment
    assert_there(dict(run.summary))
    assert {name: list(run.config[name]) for name in options} == options
    run.finish()
    assert list(tmp_path.glob("wandb/offline-*/files/media/images/degradation_*.png"))
    (returned,) = tiny.trainer(tmp_path / "again", callback).validate(module, tiny.loader(seed=2), verbose=False)
    assert_there(returned)


def test_tensorboard_gets_a_curve_a_method_and_no_charts_of_one_point(tmp_path, drawn):
    callback = AblationCallback(["zero", "mean"], [0.5, 1.0], [1])
    loggers = [TensorBoardLogger(tmp_path, default_hp_metric=False), CSVLogger(tmp_path / "csv")]
    trainer = tiny.trainer(tmp_path, callback, logger=loggers)
    trainer.fit(tiny.Own(tiny.gpt2()), tiny.loader(seed=1), tiny.loader(seed=2))
    table = callback.results.table
    kept = pd.read_csv(loggers[1].experiment.metrics_file_path)
    for found in (trainer.callback_metrics, kept.iloc[-1]):
        assert float(found["top1/zero 0.5 seed 1"]) == pytest.approx(table["top1"][1])
    folders = loggers[0].log_dir, callback.folder / "curves/zero"
    own, zero = (EventAccumulator(str(folder)).Reload() for folder in folders)
    assert own.Tags()["scalars"] == [] and own.Tags()["images"] == ["degradation"] and len(kept) == 1
    points = {event.step: event.value for event in zero.Scalars("ablation/cross_entropy")}
    assert points == pytest.approx(dict(zip((0, 50, 100), table["cross_entropy"], strict=False)))
