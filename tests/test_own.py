"""Metrics of one's own: the built-in top-1, written again, has the same digits everywhere."""

import json

import pytest
import torch

from lightning_ablate import AblationCallback, CausalLM, EachHead, Results
from lightning_ablate.errors import DataError, NonFiniteError
from lightning_ablate.report import named_scores
from tests import tiny
from tests.command import CONFIGS, FEW, TWO, assert_same, found


class Right(CausalLM):
    metrics = ("right",)

    def evaluate(self, batch):
        scored = super().evaluate(batch)
        return scored._replace(extra={"right": (scored.logits.argmax(1) == scored.targets).float()})


class Own(tiny.Own):
    def __init__(self, metrics=("right", "half"), change=dict):
        super().__init__(tiny.gpt2())
        self.metrics, self.change = metrics, change

    def evaluate(self, batch):
        scored = super().evaluate(batch)
        right = (scored.logits.argmax(1) == scored.targets).double()
        return scored._replace(extra=self.change({"right": right, "half": right / 2}))


def same(results):
    for frame in (results.table, results.examples):
        assert frame["right"].tolist() == frame["top1"].astype(float).tolist()
        assert frame["half"].tolist() == (frame["top1"] / 2).tolist()
    for frame in (results.summary(), results.compare(), results.ranking()):
        for end in ("", "_low", "_high", "_sd"):
            assert frame[f"right{end}"].astype(str).tolist() == frame[f"top1{end}"].astype(str).tolist()


def run(folder, **options):
    callback = AblationCallback(["zero", "mean"], [0.3, 0.5], [1, 2], dirpath=folder, save_every=0)
    return tiny.fit(folder.parent, Own(), callback=callback, **options)[1].results


def test_it_has_the_digits_of_the_built_in_one_in_memory_on_disk_and_in_what_is_told(tmp_path):
    results = run(tmp_path / "run")
    same(results)
    again = Results.load(tmp_path / "run")
    same(again)
    assert again.table.equals(results.table) and again.metrics[-2:] == ["right", "half"]
    flat = named_scores(results)
    own = {name: value for name, value in flat.items() if name.startswith("right/")}
    assert own and all(value == flat[name.replace("right", "top1")] for name, value in own.items())
    text = str(results)
    assert "lost right" in text and text.count("half") >= 4
    assert [axes.get_ylabel() for axes in results.plot().axes][2:] == ["right", "half"]


def test_a_killed_run_goes_on_and_parts_have_a_map_of_it(tmp_path, drawn):
    whole = run(tmp_path / "whole")
    with pytest.raises(tiny.Death):
        run(tmp_path / "died", more=[tiny.Dies(None, 1)])
    assert run(tmp_path / "died").table.equals(whole.table)
    callback = AblationCallback(["zero"], neurons=EachHead(), dirpath=tmp_path / "heads")
    tiny.fit(tmp_path, Own(), callback=callback)
    pictures = {path.name for path in (tmp_path / "heads").glob("importance*")}
    assert pictures == {"importance.png", "importance_right.png", "importance_half.png"}
    table, drawn = callback.results.table, callback.results.plot("right").axes[0].images[0].get_array().ravel()
    assert drawn.tolist() == pytest.approx((table["right"][0] - table["right"][1:9]).tolist())  # red is what is lost
    assert "largest first: lost half" in str(callback.results)


def test_two_processes_find_what_one_does(tmp_path):
    words = ["fit", "--config", CONFIGS / "demo_gpt2.yaml", *FEW, "--model=tests.test_own.Right"]
    words += ["--model.name=demo:gpt2", "--ablation.methods=[mean]"]
    words += ["--data.calibration_tokens=500", "--data.evaluation_tokens=700"]
    one, two = found(tmp_path / "one", *words), found(tmp_path / "two", *words, *TWO)
    assert_same(one, two)
    for results in (one, two):
        assert results.table["right"].tolist() == results.table["top1"].tolist()
    assert "right" in json.dumps(list(named_scores(one)))


def test_what_is_not_declared_or_of_another_form_is_told_in_a_line(tmp_path):
    message = r"gave the extra metrics .* expected .*Scored's `extra`, which the module's `metrics` names"
    for module in (Own(metrics=()), Own(change=lambda extra: {**extra, "half": torch.zeros(3)})):
        with pytest.raises(DataError, match=message):
            tiny.fit(tmp_path, module)


@pytest.mark.parametrize("name", ["n", "top1", "seed", "part", "kept", "q", "top1_q"])
def test_names_of_other_columns_are_refused(tmp_path, name):
    with pytest.raises(DataError, match=f"name '{name}', which results call another column"):
        tiny.fit(tmp_path, Own((name,)))


def test_a_metric_that_is_no_number_is_named(tmp_path):
    odd = Own(("odd",), lambda extra: {"odd": extra["half"] * torch.nan})
    with pytest.raises(NonFiniteError, match="the values of odd under 'baseline' are NaN"):
        tiny.fit(tmp_path, odd)
