"""Several data sets in one run: each is what it is alone, and the column ``data`` tells them apart."""

import json
import shutil

import pandas as pd
import pytest
from torch.utils.data import DataLoader, Subset

from lightning_ablate import AblationCallback, Results
from lightning_ablate.errors import ConfigError
from lightning_ablate.report import named_scores
from lightning_ablate.results import load
from tests import tiny
from tests.command import FEW, ROOT, TWO, assert_same, assert_same_bytes, found
from tests.tiny import Death, Dies

LONG, SHORT = {"max_length": 64, "evaluation_tokens": 700}, {"max_length": 32, "evaluation_tokens": 400}
METHODS = ["mean", "conditional-mean", "resample-same-position"]


def arguments(main, *others):
    rows = [{"class_path": "PythonTexts", "init_args": {"batch_size": 4, **other}} for other in others]
    options = [f"--data.{name}={value}" for name, value in main.items()] + ["--data.calibration_tokens=1000"]
    given = ["fit", "--config", "configs/demo_gpt2.yaml", *FEW, *options, f"--ablation.methods={json.dumps(METHODS)}"]
    given = [str(word).replace("configs/", f"{ROOT}/configs/") for word in given]
    return [*given, f"--data.evaluation={json.dumps(rows)}"] if rows else given


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("both") / "run"
    return found(folder, *arguments(LONG, SHORT)), folder


def test_each_is_what_it_is_alone(tmp_path, both):
    results, folder = both
    assert results.data == ["python-texts", "python-texts 2"] and len(results.table) == 2 * (1 + 3 * 2)
    for name, alone in zip(results.data, (LONG, SHORT), strict=True):
        own = ["validate", "--ckpt_path", folder / "ablation.ckpt", *[f"--data.{n}={v}" for n, v in alone.items()]]
        one = found(tmp_path / str(alone["max_length"]), *own, "--data.batch_size=4", "--data.evaluation=[]")
        pd.testing.assert_frame_equal(results.on(name).table.assign(data=""), one.table.assign(data=""), atol=1e-6)
        pd.testing.assert_frame_equal(results.on(name).examples, one.examples, atol=1e-4)
    assert results.on("python-texts 2").baseline["n"] != results.on("python-texts").baseline["n"]


def test_tables_figures_and_loggers_tell_them_apart(both):
    results, folder = both
    for frame in (results.summary(), results.compare(), results.ranking()):
        assert frame.columns[0] == "data" and frame["data"].unique().tolist() == results.data
    alone = results.on("python-texts 2").compare("mean", "conditional-mean")
    ours = results.compare("mean", "conditional-mean")
    pd.testing.assert_frame_equal(ours[ours["data"] == "python-texts 2"].iloc[:, 1:].reset_index(drop=True), alone)
    assert len(named_scores(results)) == 4 * len(results.table)
    assert str(results).count("nothing ablated") == 2 and results._repr_html_().count("nothing ablated") == 2
    names = {path.name for path in folder.glob("*.png")}
    assert names == {"degradation.png", "comparisons.png", "comparisons_python-texts_2.png"}
    with pytest.raises(ConfigError, match="no results on 'wiki', expected one of python-texts, python-texts 2"):
        results.on("wiki")


def test_runs_join_by_data(tmp_path, both):
    results, folder = both
    shutil.copytree(folder, tmp_path / "again")
    joined = load([folder, tmp_path / "again"], ["one", "two"])
    assert [one.data for one in joined] == [["python-texts"], ["python-texts 2"]]
    assert all(len(one.table) == 1 + 2 * 3 * 2 for one in joined)
    assert Results.load(folder).table.equals(results.table)


def test_two_processes_find_what_one_does(tmp_path, both):
    two = found(tmp_path / "two", *arguments(LONG, SHORT), *TWO)
    for name in both[0].data:
        assert_same(both[0].on(name), two.on(name))


def own(folder, *more, loaders=None, train=None):
    """A module of one's own under a Trainer, with three loaders of its own."""
    callback = AblationCallback(["mean", "zero"], [0.5], [1], dirpath=folder, save_every=0)
    made = loaders or [tiny.loader(seed=2), tiny.loader(5, seed=3), tiny.loader(2, seed=4)]
    tiny.fit(folder.parent, callback=callback, train=train, val=made, more=more)
    return callback.results


def test_only_what_is_evaluated_of_others_is_read_and_names_stay_apart(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        texts = [{"text": f"{name} {number} is {number}"} for number in range(60)]
        (tmp_path / name / "test.jsonl").write_text("\n".join(map(json.dumps, texts)))
    few = {"evaluation_split": "test", "max_length": 32, "evaluation_tokens": 200}
    named = [{"name": str(tmp_path / name), **few} for name in ("one", "two")]
    others = [{"class_path": "TextData", "init_args": options} for options in named]
    given = [*arguments(LONG), f"--data.evaluation={json.dumps(others)}"]
    results = found(tmp_path / "run", *given)
    assert [name.rsplit("/", 1)[-1] for name in results.data] == ["python-texts", "one", "two"]
    frames = [one.table.assign(data=f"/{number}/test") for number, one in enumerate(results.each)]
    alike = Results(pd.concat(frames))
    assert alike.labels == ["test", "test 2", "test 3"] and len(named_scores(alike)) == 4 * len(alike.table)


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_a_run_that_died_in_one_of_them_goes_on(tmp_path, batch):
    whole = own(tmp_path / "whole")

    class DiesInSecond(Dies):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            if dataloader_idx == 1:
                super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    with pytest.raises(Death):
        own(tmp_path / "run", DiesInSecond(None, batch))
    own(tmp_path / "run")
    assert_same_bytes(tmp_path / "run", tmp_path / "whole")
    assert whole.data == ["data", "data 2", "data 3"]
    assert whole.table.groupby("data", sort=False).size().tolist() == [3, 3, 3]


def test_loaders_by_name_and_those_that_share_examples_with_the_calibration(tmp_path):
    rows = tiny.loader(6, seed=1)
    by_name = {"same": DataLoader(Subset(rows.dataset, [0, 1]), batch_size=2), "other": tiny.loader(seed=2)}
    train = DataLoader(Subset(rows.dataset, [1, 2, 3, 4]), batch_size=2)
    with pytest.warns(UserWarning, match="1 examples of same calibrate and are evaluated as well") as warned:
        results = own(tmp_path / "run", loaders=by_name, train=train)
    assert results.data == ["same", "other"]
    assert not [one for one in warned if "of other" in str(one.message)]
    with pytest.warns(UserWarning, match="6 examples of data calibrate"):
        own(tmp_path / "again", loaders=rows, train=rows)
