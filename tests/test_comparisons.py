"""Paired differences and their intervals."""

import csv

import numpy as np
import pytest
import torch

from lightning_ablate import AblationCallback, report
from lightning_ablate.comparisons import as_csv, compare, table
from lightning_ablate.sweep import BASELINE, Condition
from tests import tiny

ZERO, MEAN = Condition("zero", 1.0, None), Condition("mean", 1.0, None)


def sums(*scores):
    """The same scores for both metrics."""
    return {name: np.stack(scores).astype(float) for name in ("top1", "cross_entropy")}


def test_the_difference_is_that_of_the_ratios_of_sums():
    positions = np.array([1, 2, 3, 0])
    (top1, loss) = compare([BASELINE, ZERO, MEAN], positions, sums([9, 9, 9, 9], [1, 1, 2, 7], [0, 2, 1, 8]))
    assert top1.difference == loss.difference == pytest.approx((4 - 3) / 6)
    assert (top1.method, top1.other, top1.fraction, top1.seed_sd) == ("zero", "mean", 1.0, None)


def test_a_method_compared_with_its_equal_differs_by_nothing():
    scores = np.arange(50) % 7
    for one in compare([ZERO, MEAN], np.full(50, 7), sums(scores, scores)):
        assert (one.difference, one.low, one.high) == (0, 0, 0)


def test_seeds_are_paired_and_their_spread_is_shown():
    conditions = [Condition(method, 0.5, seed) for method in ("zero", "mean") for seed in (1, 2, 3)]
    scores = [[4, 4], [5, 5], [6, 6], [1, 1], [3, 3], [5, 5]]
    found = compare(conditions, np.array([10, 10]), sums(*scores))[0]
    assert found.difference == pytest.approx(0.2) and found.seed_sd == pytest.approx(np.std([0.3, 0.2, 0.1], ddof=1))
    assert found.low == found.high == pytest.approx(0.2)  # every example differs by as much


def test_a_method_without_seeds_is_compared_with_all_seeds_of_another():
    conditions = [Condition("zero", 1.0, None), Condition("resample", 1.0, 1), Condition("resample", 1.0, 2)]
    (found, _) = compare(conditions, np.array([10, 10]), sums([5, 5], [1, 1], [3, 3]))
    assert found.difference == pytest.approx(0.3) and found.seed_sd == pytest.approx(np.std([0.4, 0.2], ddof=1))


def test_95_percent_of_the_intervals_hold_the_truth(request):
    """200 examples of unlike lengths whose difference is known; 1,000 repetitions in full."""
    repetitions = 1000 if request.config.getoption("--full") else 150
    generator, truth, held = np.random.default_rng(0), 0.05, 0
    for repetition in range(repetitions):
        positions = generator.integers(5, 60, 200)
        mean = generator.binomial(positions, generator.beta(4, 6, 200))
        # a difference of truth a position on average, which varies from example to example
        zero = mean + positions * (truth + 0.1 * generator.standard_normal(200))
        (found, _) = compare([ZERO, MEAN], positions, sums(zero, mean), seed=repetition)
        held += found.low <= truth <= found.high
    assert (0.93 if repetitions == 1000 else 0.89) <= held / repetitions <= (0.97 if repetitions == 1000 else 0.99)


def test_wide_differences_between_examples_widen_the_interval():
    positions, even = np.full(100, 10), np.full(100, 1)
    uneven = np.where(np.arange(100) % 2, 2, 0)
    narrow, _ = compare([ZERO, MEAN], positions, sums(even, np.zeros(100)))
    wide, _ = compare([ZERO, MEAN], positions, sums(uneven, np.zeros(100)))
    assert narrow.difference == wide.difference == pytest.approx(0.1)
    assert narrow.high == narrow.low and wide.high - wide.low == pytest.approx(2 * 1.96 * 0.1 / 10, rel=0.2)


def test_the_csv_and_the_table_say_it(tmp_path):
    conditions = [Condition(m, f, s) for m in ("zero", "mean") for f in (0.1, 0.5) for s in (1, 2)]
    scores = np.random.default_rng(0).integers(0, 9, (8, 20))
    found = compare(conditions, np.full(20, 9), sums(*scores))
    (tmp_path / "comparisons.csv").write_text(as_csv(found))
    with (tmp_path / "comparisons.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found) == 2 * 2 and rows[0]["method"] == "zero" and rows[0]["other"] == "mean"
    assert float(rows[0]["low"]) == pytest.approx(found[0].low)
    assert "zero − mean at 50%: " in table(found) and "10%" not in table(found) and " points [" in table(found)
    assert table([]) == ""


def test_a_run_keeps_what_each_example_scored(tmp_path):
    """By the examples' own sums, from a run of one example at a time."""
    callback = AblationCallback(["zero", "mean"], [0.5, 1.0], [1, 2])
    module, _ = tiny.fit(tmp_path, callback=callback)
    kept = {}
    for number in range(6):
        one = torch.utils.data.Subset(tiny.loader(seed=2).dataset, [number])
        again = AblationCallback(["zero", "mean"], [0.5, 1.0], [1, 2])
        again.load_state_dict(callback.state_dict())
        tiny.trainer(tmp_path / str(number), again).validate(
            module, torch.utils.data.DataLoader(one, batch_size=1), verbose=False
        )
        kept[number] = again.results.rows
    positions = np.array([kept[number][0].n for number in range(6)])
    losses = [[kept[n][c].cross_entropy * kept[n][c].n for n in range(6)] for c in range(len(kept[0]))]
    conditions = [Condition(r.method, r.fraction, r.seed, r.part, r.head) for r in kept[0]]
    hits = [[kept[n][c].top1 * kept[n][c].n for n in range(6)] for c in range(len(kept[0]))]
    expected = compare(conditions, positions, {"top1": np.array(hits), "cross_entropy": np.array(losses)})
    for mine, other in zip(callback.comparisons, expected, strict=True):
        assert (mine.method, mine.other, mine.fraction) == (other.method, other.other, other.fraction)
        for name in ("difference", "low", "high"):
            assert getattr(mine, name) == pytest.approx(getattr(other, name), abs=1e-6)
    assert (tmp_path / "comparisons.csv").read_text() == as_csv(callback.comparisons)


def test_examples_that_cannot_be_told_apart_are_not_compared(tmp_path):
    loader = tiny.loader(seed=2)
    for row in loader.dataset:
        row["index"] = row["index"] + 100
    _, callback = tiny.fit(tmp_path, val=loader)
    assert callback.comparisons == [] and not (tmp_path / "comparisons.csv").exists()


def test_the_figure_shows_every_pair_with_its_interval(drawn):
    conditions = [Condition(m, f, s) for m in ("zero", "mean", "peak") for f in (0.1, 0.5, 1.0) for s in (1, 2)]
    scores = np.random.default_rng(0).integers(0, 9, (len(conditions), 20))
    figure = report.differences(compare(conditions, np.full(20, 9), sums(*scores)))
    assert [axes.get_title() for axes in figure.axes] == ["zero − mean", "zero − peak", "mean − peak"]
    assert all(len(axes.containers) == 1 for axes in figure.axes)
