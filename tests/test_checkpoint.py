"""What a run leaves for later: its checkpoint, and those that Lightning writes."""

from dataclasses import asdict

import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_ablate import AblationCallback, Calibration, ImageClassifier, ImageData, Ranked
from lightning_ablate.data.demo import digits
from lightning_ablate.errors import ConfigError, StatisticsError, TargetError
from lightning_ablate.statistics import Covariance, Histogram, Moments
from tests import tiny

NAME = "ablation.ckpt"
FOUND = "target", "epochs", "held_out", "measured", "partial", "notes", "calibration"


def test_the_checkpoint_is_small_plain_and_without_the_target(tmp_path):
    tiny.fit(tmp_path)
    checkpoint = torch.load(tmp_path / NAME, weights_only=True)
    assert list(checkpoint["state_dict"]) == ["anchor"] and (tmp_path / NAME).stat().st_size < 40_000
    (state,) = checkpoint["callbacks"].values()
    assert set(state) == {*FOUND, "facts", "phase", "finished"} and state["finished"] and not state["phase"]
    assert [entry["site"] for entry in state["calibration"]["sites"]] == [asdict(s) for s in tiny.sites(tiny.gpt2())]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # of a callback that isn't there again
def test_checkpoints_that_lightning_writes_serve_as_well(tmp_path):
    theirs = ModelCheckpoint(tmp_path / "theirs")
    module, callback = tiny.fit(tmp_path / "fit", more=[theirs], enable_checkpointing=True)
    module.trainer.save_checkpoint(tmp_path / "behind.ckpt")
    assert theirs.best_model_path
    for number, path in enumerate([tmp_path / "behind.ckpt", theirs.best_model_path]):
        again = tiny.validate(tmp_path / str(number), path)
        pd.testing.assert_frame_equal(again.table, callback.results.table, check_exact=True)
    assert Calibration.load(theirs.best_model_path, tiny.gpt2()).sites == callback.run.calibration.sites


def test_validate_takes_part_of_the_sites_by_kind_path_or_pattern(tmp_path):
    tiny.fit(tmp_path / "fit", callback=AblationCallback(["zero"], [1.0], [1], sites=["attention", "mlp"]))
    for sites, layers in ((["mlp"], 2), (["transformer.h.1.attn.c_proj"], 1), (["*attn.c_proj"], 2)):
        again = AblationCallback(["zero"], [1.0], [1], sites=sites)
        tiny.validate(tmp_path / "again", tmp_path / "fit" / NAME, again)
        assert len(again.run.calibration.sites) == layers
    for sites in (["cross-attention"], ["*c_fc"], ["nowhere"]):
        with pytest.raises(StatisticsError, match=r"the checkpoint (doesn't hold the statistics of all|holds no) site"):
            tiny.validate(tmp_path / "none", tmp_path / "fit" / NAME, AblationCallback(["zero"], sites=sites))


def test_validate_takes_other_methods_fractions_and_seeds(tmp_path):
    tiny.fit(tmp_path / "fit")
    callback = AblationCallback(["mean"], [0.25], [9], neurons=Ranked("gap", unit="head"))
    table = tiny.validate(tmp_path / "validate", tmp_path / "fit" / NAME, callback).table
    assert table["method"].tolist() == ["none", "mean"] and table["fraction"][1] == 0.25
    with pytest.raises(StatisticsError, match="'conditional-mean' needs the statistic Covariance"):
        tiny.validate(tmp_path / "other", tmp_path / "fit" / NAME, AblationCallback(["conditional-mean"], [0.5], [1]))
    with pytest.raises(StatisticsError, match="validate needs the statistics of a calibration.*--ckpt_path"):
        tiny.validate(tmp_path / "none", None)


def test_a_checkpoint_of_a_target_that_differs_in_one_bit_or_of_other_sites_is_refused(tmp_path):
    tiny.fit(tmp_path, callback=AblationCallback(fractions=[0.5], seeds=[1], sites="*.0.attn.c_proj"))
    other = tiny.gpt2()
    with torch.no_grad():
        weight = other.transformer.h[0].mlp.c_fc.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))
    with pytest.raises(TargetError, match="the checkpoint is of another target, with the weights"):
        tiny.validate(tmp_path, tmp_path / NAME, AblationCallback(["zero"], sites="*.0.attn.c_proj"), tiny.Own(other))
    for asked in ("attention", "*.attn.c_proj"):
        with pytest.raises(StatisticsError, match="doesn't hold the statistics of all sites .*holds transformer.h.0"):
            tiny.validate(tmp_path, tmp_path / NAME, AblationCallback(["zero"], sites=asked))


def test_what_has_calibrated_is_never_evaluated_by_validate_with_other_options(tmp_path):
    """The checkpoint holds which images calibrated, so 10 in place of 50 frees none of the 50 for evaluation."""
    module, options = ImageClassifier("demo:vit"), {"evaluation_images": 40, "batch_size": 20}
    fitted, later = (ImageData.of(digits("calibration"), calibration_images=count, **options) for count in (50, 10))
    callback = AblationCallback(["zero"], [1.0], [1], dirpath=tmp_path / "fit")
    tiny.trainer(tmp_path, callback).fit(module, datamodule=fitted)
    again = tiny.trainer(tmp_path, AblationCallback(["zero"], [1.0], [1]))
    again.validate(module, datamodule=later, ckpt_path=tmp_path / "fit" / NAME, verbose=False)
    calibrated, evaluated = fitted.examples["calibration"].contents, later.examples["evaluation"].contents
    assert len(calibrated) == 50 and len(evaluated) == 40 and not set(calibrated) & set(evaluated)


def test_fit_is_given_no_checkpoint(tmp_path):
    tiny.fit(tmp_path)
    trainer = tiny.trainer(tmp_path, AblationCallback())
    with pytest.raises(ConfigError, match=r"ablation.ckpt', which is for validate; .* goes on by itself"):
        trainer.fit(tiny.Own(tiny.gpt2()), tiny.loader(seed=1), tiny.loader(seed=2), ckpt_path=tmp_path / NAME)


@pytest.mark.parametrize(("kind", "state"), [(Covariance, "sums"), (Moments, "sums"), (Histogram, "values")])
def test_checkpoints_of_other_versions_are_refused(tmp_path, kind, state):
    with pytest.raises(StatisticsError, match="older version of this package; run `fit` again"):
        Calibration.from_state_dict({"transformer.h.0.attn.c_proj": {}}, tiny.gpt2())
    callback = AblationCallback(["peak", "conditional-mean"], [0.5], [1])
    saved = tiny.fit(tmp_path, callback=callback)[1].run.calibration.state_dict()
    (held,) = (of for name, of in saved["sites"][0]["statistics"].items() if name.endswith(kind.__name__))
    held[state] = held[state][..., :-1]
    with pytest.raises(StatisticsError, match=rf"holds {kind.__name__} of transformer.h.0.* run `fit` again"):
        Calibration.from_state_dict(saved, tiny.gpt2())
