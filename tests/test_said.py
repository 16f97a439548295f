"""What a run's figures rest on is said where they stand."""

import json

import pytest
import torch

from lightning_ablate import AblationCallback, ConditionalTuned, Covariance, Optimal, Random, Results
from lightning_ablate.errors import StatisticsError
from lightning_ablate.statistics import solved
from tests import reference, tiny


@pytest.mark.parametrize("unit", ["head", "neuron"])
def test_the_table_says_what_share_of_neurons_went_beside_what_was_asked(tmp_path, unit):
    """Invariant 12: 20% and 70% of 4 heads of 4 neurons are 1 and 3 heads; of 16 neurons 3 and 11."""
    callback = AblationCallback("zero", [0.2, 0.7, 1.0], [1], neurons=Random(unit))
    _, made = tiny.fit(tmp_path, callback=callback)
    went = [0, 0.25, 0.75, 1] if unit == "head" else [0, 3 / 16, 11 / 16, 1]
    assert (
        made.results.table["fraction"].tolist() == [0, 0.2, 0.7, 1] and made.results.table["ablated"].tolist() == went
    )
    assert Results.load(tmp_path).table["ablated"].tolist() == went
    shown = str(made.results)
    assert all(f"{100 * share:.3g}%" in shown for share in went[1:]) and "20%" not in shown


def test_fewer_positions_than_neurons_are_noted_for_conditional_methods(tmp_path):
    few = tiny.loader(examples=1, batch_size=1, seed=1)  # 14 positions for 16 neurons
    for method, noted in (("conditional-mean", True), ("mean", False)):
        folder = tmp_path / method
        callback = AblationCallback(method, [0.5], [1], dirpath=folder)
        if noted:
            with pytest.warns(UserWarning, match="calibrated on 14 positions, fewer than the 16 neurons"):
                tiny.fit(tmp_path, train=few, callback=callback)
        else:
            tiny.fit(tmp_path, train=few, callback=callback)
        notes = json.loads((folder / "run.json").read_text())["notes"]
        assert len(notes) == noted and ("NOTE: calibrated on 14" in str(callback.results)) == noted


def test_a_raised_ridge_is_said():
    singular = torch.tensor([[1.0, 1 + 1e-7], [1 + 1e-7, 1.0]], dtype=torch.float64)
    across = torch.ones(2, 1, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"took a ridge of 1e-06 instead of 1e-08"):
        found = solved(singular.clone(), across, 1e-8)
    expected = torch.linalg.solve(singular + 1e-6 * torch.eye(2), across)
    torch.testing.assert_close(found, expected)
    with pytest.raises(StatisticsError, match="not positive definite"):
        solved(torch.tensor([[1.0, 1e3], [1e3, 1.0]], dtype=torch.float64), across, 1e-8)


def test_the_chosen_ridges_are_recorded_and_said(tmp_path):
    callback = AblationCallback(["conditional-mean", ConditionalTuned(steps=1)], [0.5], [1], dirpath=tmp_path)
    module, made = tiny.fit(tmp_path, callback=callback)
    ((name, found),) = made.results.facts["ridges"].items()
    site = made.run.calibration.sites[0]
    statistic = Covariance(site.width)
    with torch.no_grad():
        for batch in tiny.loader(seed=1):
            keep = lambda x, batch=batch: statistic.update(x, batch["attention_mask"].bool(), batch["index"])  # noqa: E731
            with reference.plain_hooks(module.target, {site.path: keep}):
                module.logits(batch)
    assert name == "Covariance" and found[site.name] == statistic.ridge
    assert json.loads((tmp_path / "run.json").read_text())["ridges"] == made.results.facts["ridges"]
    for method in ("conditional-mean", "conditional-tuned"):
        assert f"{method}: ridge, chosen at each site on held-out calibration examples: " in str(made.results)


@pytest.mark.parametrize(
    ("examples", "said"),
    [(2, ""), (1, "steps of 2 examples, not 1: a step is made"), (99, "of 6 examples, not 99: there are no more")],
)
def test_the_plan_says_how_many_examples_a_step_takes_where_they_differ(tmp_path, capsys, examples, said):
    tiny.fit(tmp_path, callback=AblationCallback([Optimal(steps=1, examples=examples)], [0.5], [1]))
    (plan,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("plan: ")]
    assert said in plan and ("takes steps" in plan) == bool(said)
