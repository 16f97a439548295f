"""Paired differences and their intervals."""

import csv

import numpy as np
import pytest
import torch

from lightning_ablate import AblationCallback, report
from lightning_ablate.comparisons import Comparison, as_csv, compare, intervals, middle_of, ranked, table
from lightning_ablate.results import Results
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


def test_points_and_areas_with_their_intervals_are_those_of_the_results():
    conditions = [BASELINE]
    for method in ("zero", "mean"):
        conditions += [Condition(method, f, s) for f in (0.1, 0.5) for s in (1, 2)] + [Condition(method, 1.0, None)]
    generator, positions = np.random.default_rng(0), np.random.default_rng(1).integers(1, 9, 40)
    scores = generator.random((len(conditions), 40)) * positions
    found = intervals(conditions, positions, {"top1": scores, "cross_entropy": 2 * scores})
    means = torch.tensor(scores.sum(1) / positions.sum())
    figures = {"n": torch.full((len(conditions),), 9), "top1": means, "top5": means, "cross_entropy": 2 * means}
    about = {"model": "m", "data": "d", "classes": 3}
    made = Results.of(conditions, figures | {"kl": means}, **about, intervals=found)
    assert len(found) == 2 * (1 + 2 * (3 + 1))
    for one in found:
        if one.method == "none":
            point = made.curve("zero", one.metric)[0]
        elif one.fraction is None:
            point = made.area(one.method, one.metric)
        else:
            point = next(p for p in made.curve(one.method, one.metric) if p.fraction == one.fraction)
        assert point.mean == pytest.approx(one.mean) and point.sd == (one.seed_sd and pytest.approx(one.seed_sd))
        assert point.interval == (one.low, one.high) and one.low < one.mean < one.high
    assert "[" in made.table()


def test_intervals_cover_what_a_resampling_of_examples_by_hand_covers():
    positions, scores = np.full(60, 5), np.random.default_rng(3).integers(0, 6, 60)
    (_, one, area, *_) = intervals([BASELINE, ZERO], positions, sums(np.full(60, 5), scores))
    generator = np.random.default_rng(9)
    drawn = [generator.choice(scores, 60).sum() / 300 for _ in range(4000)]
    assert (one.low, one.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.012)
    assert (area.low, area.high) == pytest.approx(((one.low - 1) / 2, (one.high - 1) / 2))  # a triangle


def test_many_methods_are_compared_with_their_neighbours_in_rank(drawn):
    names = ["a", "b", "c", "d", "e", "f"]
    scores = [np.full(20, level) for level in (3, 1, 5, 2, 4, 0)]
    found = compare([Condition(name, 0.5, None) for name in names], np.full(20, 9), sums(*scores))
    assert ranked(found) == ["f", "b", "d", "a", "e", "c"] and middle_of(found) == 0.5
    shown = table(found)
    assert shown.count(" points [") == 5 and "all 15 pairs: comparisons.csv" in shown
    assert "a − d" in shown and "a − b" not in shown
    axes = report.differences(found).axes[0]
    texts = {(text.get_position()): text.get_text() for text in axes.texts}
    assert len(texts) == 30 and texts[1, 0] == f"{-100 / 9:+.1f}" and texts[0, 1] == f"{100 / 9:+.1f}"


def test_the_csv_and_the_table_say_it(tmp_path):
    conditions = [Condition(m, f, s) for m in ("zero", "mean") for f in (0.1, 0.5) for s in (1, 2)]
    scores = np.random.default_rng(0).integers(0, 9, (8, 20))
    found = compare(conditions, np.full(20, 9), sums(*scores))
    (tmp_path / "comparisons.csv").write_text(as_csv(found, Comparison))
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
    assert (tmp_path / "comparisons.csv").read_text() == as_csv(callback.comparisons, Comparison)


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
