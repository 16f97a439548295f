"""The table, what follows from it by plain loops, and its files."""

import itertools
import statistics

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lightning_ablate.errors import ConfigError, DataError
from lightning_ablate.results import Results
from lightning_ablate.results.bootstrap import p_values
from tests.results.conftest import HEADS, by_example, own, plain

HEADER = "model,data,method,fraction,ablated,seed,part,head,n,top1,top5,cross_entropy,kl"
EQUAL = [("none", 0.0, None, 1.0), ("zero", 1.0, None, 2.0), ("mean", 1.0, None, 2.0)]


def same(one, other):
    pd.testing.assert_frame_equal(one, other, check_exact=True)


def per_example(results, row, metric="cross_entropy"):
    of = results.examples[results.examples["condition"] == row]
    return of[metric].to_numpy(), of["n"].to_numpy()


def test_save_and_load_keep_every_bit(made, tmp_path):
    results = made(("zero", "NA", "none yet"), places=HEADS)
    results.table.loc[1:2, "seed"] = 2**62 + 1
    results.table.loc[3, "kl"] = np.nan
    results.save(tmp_path)
    loaded = Results.load(tmp_path)
    same(loaded.table, results.table)
    same(loaded.examples, results.examples)
    assert loaded.facts == results.facts and str(loaded) == str(results)
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert lines[0] == HEADER and len(lines) == 1 + len(results.table)


def test_save_writes_the_same_bytes_twice_and_only_what_there_is(made, tmp_path, drawn):
    names = ["results.csv", "run.json", "examples.parquet", "degradation.png", "comparisons.png"]
    for folder in ("one", "two"):
        assert [path.name for path in made().save(tmp_path / folder)] == names
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "two" / n).read_bytes() for n in names)
    without = Results(made().table, None, made().facts)
    assert [path.name for path in without.save(tmp_path / "one")] == [*names[:2], names[3]]
    assert Results.load(tmp_path / "one").examples is None
    assert [path.name for path in made(places=HEADS).save(tmp_path / "three")] == [*names[:3], "importance.png"]
    assert not list(tmp_path.glob("**/*.part"))


def test_load_says_in_one_line_what_is_wrong(made, tmp_path):
    made(examples=5).save(tmp_path)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    header, *rows = whole["results.csv"].splitlines(keepends=True)
    for name, content, match in (
        ("results.csv", None, "No such file"),
        ("results.csv", b"", "could not load"),
        ("results.csv", b"a,b\n1,2\n", "lacks the columns model, .*; it has a, b"),
        ("results.csv", b"\x80\x81", "could not load"),
        ("results.csv", whole["results.csv"].replace(b"zero,0.1", b"zero,much"), "much"),
        ("results.csv", b"".join([header, *rows, rows[-1]]), "every condition needs a row for each example"),
        ("results.csv", b"".join([header, *rows[1:]]), "must be the baseline"),
        ("run.json", None, "No such file"),
        ("run.json", b"[1]", "could not load"),
        ("examples.parquet", b"PAR1", "could not load"),
    ):
        (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=match) as raised:
            Results.load(tmp_path)
        assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)
        (tmp_path / name).write_bytes(whole[name])


def test_summary_is_mean_and_standard_deviation_over_seeds(made):
    results = made()
    summary = results.summary()
    rows = [["none", 0.0], *([m, f] for m in ("zero", "peak") for f in (0.1, 0.5, 0.9, 1.0))]
    assert summary[["method", "fraction"]].to_numpy().tolist() == rows
    for _, row in summary.iterrows():
        for metric in ("top1", "top5", "cross_entropy", "kl"):
            values = [*own(results, row["method"], row["fraction"], metric).values()]
            assert row["seeds"] == len(values) and row["n"] == results.examples["n"].head(40).sum()
            assert row[metric] == pytest.approx(statistics.mean(values), rel=1e-14)
            sd = statistics.stdev(values) if len(values) > 1 else np.nan
            assert row[f"{metric}_sd"] == pytest.approx(sd, nan_ok=True)


@pytest.mark.parametrize("share", [1, 4])
def test_summary_has_the_intervals_of_a_bootstrap_over_clusters_by_hand(made, share):
    """Invariant 19: clusters of `share` neighbours are drawn, at the percentiles of a t distribution."""
    results = made(("zero",), [0.5], [1, 2])
    results = Results(results.table, results.examples.assign(cluster=results.examples["example"] // (3 * share)))
    row, generator, ratios = results.summary().iloc[1], np.random.default_rng(0), []
    (first, positions), (second, _) = per_example(results, 1), per_example(results, 2)
    clusters = results.examples["cluster"].to_numpy()[: len(positions)][positions > 0]
    groups = [np.flatnonzero(clusters == one) for one in np.unique(clusters)]
    sums, positions = (first + second)[positions > 0] / 2, positions[positions > 0]
    count = len(groups)
    assert (count, row["clusters"]) == ((len(positions),) * 2 if share == 1 else (10, 10))
    for _ in range(2000):
        drawn = generator.multinomial(count, [1 / count] * count)
        rows = [one for group, times in zip(groups, drawn, strict=True) for one in [*group] * times]
        ratios.append(sums[rows].sum() / positions[rows].sum())
    low = stats.norm.cdf(-np.sqrt(count / (count - 1)) * stats.t.ppf(0.975, count - 1))
    assert low < 0.025
    expected = np.quantile(ratios, [low, 1 - low])
    assert [row["cross_entropy_low"], row["cross_entropy_high"]] == pytest.approx(expected, rel=1e-12)


def test_curves_areas_and_comparisons_go_by_what_was_ablated():
    """Invariant 12: of 4 heads 10% and 20% ask for the same head, which is a quarter of the neurons."""
    points = [("none", 0.0, None, 1.0), ("zero", 0.1, 1, 2.0), ("zero", 0.4, 1, 4.0), ("zero", 1.0, None, 5.0)]
    points += [("mean", 0.25, 1, 1.5), ("mean", 1.0, None, 5.0)]
    went = [0, 0.25, 0.5, 1, 0.25, 1]
    table = plain(points).table.assign(ablated=went)
    results = Results(table, by_example([1] * 30, *np.outer(table["cross_entropy"], np.ones(30))))
    ranks = results.ranking().set_index("method")
    assert ranks.loc["zero", "cross_entropy"] == pytest.approx(0.25 * 1 / 2 + 0.25 * (1 + 3) / 2 + 0.5 * (3 + 4) / 2)
    assert ranks.loc["mean", "cross_entropy"] == pytest.approx(0.25 * 0.5 / 2 + 0.75 * (0.5 + 4) / 2)
    compared = results.compare("zero", "mean")
    assert compared[["fraction", "ablated", "cross_entropy"]].values.tolist() == [[0.1, 0.25, 0.5], [1, 1, 0]]
    (line, *_), *_ = ([x for x in axes.lines if x.get_label() == "zero"] for axes in results.plot().axes)
    assert line.get_xdata() == pytest.approx([0, 25, 50, 100])
    text = str(results)
    assert "mean over 0 to 100%" in text and "zero − mean at 25%" in text and " 10%" not in text and "40%" not in text


def test_seeds_that_ablate_as_much_are_one_share_and_a_method_that_ablates_nothing_makes_no_curve():
    points = [("none", 0.0, None, 1.0), *(("zero", 0.4, seed, 2.0) for seed in range(7)), ("mean", 0.4, None, 1.5)]
    results = plain([*points, ("idle", 0.3, 1, 1.0)])
    went = [0.0, *[5 / 12] * 8, 0.0]
    results = Results(results.table.assign(ablated=went))
    assert results.summary()["ablated"].nunique() == 2 and results.compare("zero", "mean")["ablated"].tolist() == [
        pytest.approx(5 / 12)
    ]
    assert results.ranking()["method"].tolist() == ["mean", "zero"]
    assert results.ranking()["to"].tolist() == [pytest.approx(5 / 12)] * 2


def test_intervals_are_missing_where_examples_are_unknown_or_too_few(made):
    one = plain([("none", 0.0, None, 1.0), ("zero", 1.0, None, 2.0)], by_example([0, 5], [0, 5], [0, 10]))
    for results in (one, Results(made().table)):
        assert results.summary()["top1_low"].isna().all() and results.ranking()["cross_entropy_high"].isna().all()
        assert "[" not in str(results)


def test_compare_pairs_seeds_and_takes_a_condition_without_one_against_all(made):
    results = made(("zero", "mean"), [0.5], [1, 2, 3])
    kept = results.table.drop(index=[5, 6])  # of mean at one half, only its first seed, which it doesn't need
    kept.loc[4, "seed"] = pd.NA
    for one, match in ((results, lambda seed: seed), (Results(kept), lambda seed: pd.NA)):
        row = one.compare("mean", "zero").iloc[0]
        mean, zero = own(one, "mean", 0.5), own(one, "zero", 0.5)
        each = [(mean[s] if match(s) is s else next(iter(mean.values()))) - zero[s] for s in zero]
        assert row["cross_entropy"] == pytest.approx(statistics.mean(each))
        assert row["cross_entropy_sd"] == pytest.approx(statistics.stdev(each)) and row["seeds"] == 3


def test_compare_leaves_out_methods_that_share_no_seed(made):
    table = made(("zero", "mean"), [0.5], [1, 2]).table
    table.loc[table["method"] == "mean", "seed"] += 2
    assert Results(table).compare("mean", "zero").empty


def test_compare_takes_every_pair_one_method_or_the_baseline(made):
    results = made(("zero", "mean", "peak"), [0.1, 0.5])
    pairs = [tuple(pair) for pair in results.compare()[["method", "other"]].to_numpy()]
    assert list(dict.fromkeys(pairs)) == [*itertools.combinations(("zero", "mean", "peak"), 2)] and len(pairs) == 6
    assert set(results.compare(other="mean")["method"]) == {"zero", "peak"}
    first = results.compare("peak", "none").iloc[0]
    expected = statistics.mean(own(results, "peak", 0.1).values()) - results.baseline["cross_entropy"]
    assert first["cross_entropy"] == pytest.approx(expected) and first["cross_entropy_low"] < expected
    for names in (("medain", None), ("zero", "medain"), ("none", None)):
        with pytest.raises(ConfigError, match="there is no method '(medain|none)' here; .* zero, mean, peak"):
            results.compare(*names)


def test_compare_of_equals_is_nothing_and_of_known_examples_is_known():
    equal = by_example([10] * 20, *[np.arange(20)] * 3)
    row = plain(EQUAL, equal).compare().iloc[0]
    assert (row["top1"], row["top1_low"], row["top1_high"]) == (0, 0, 0)
    uneven = by_example([10] * 100, np.zeros(100), np.arange(100) % 2 * 2, np.zeros(100))
    row = plain(EQUAL, uneven).compare().iloc[0]  # 0.1 ± 0.1 a position
    assert row["top1_high"] - row["top1_low"] == pytest.approx(2 * 1.96 * 0.1 / 10, rel=0.1)


def test_compare_holds_the_truth_in_95_percent_of_the_intervals():
    """60 examples of unlike lengths whose difference is known."""
    generator, truth, held = np.random.default_rng(0), 0.05, 0
    for _ in range(150):
        positions = generator.integers(5, 60, 60)
        mean = generator.binomial(positions, generator.beta(4, 6, 60))
        zero = mean + positions * (truth + 0.1 * generator.standard_normal(60))
        row = plain(EQUAL, by_example(positions, mean, zero, mean)).compare().iloc[0]
        held += row["top1_low"] <= truth <= row["top1_high"]
    assert 0.89 <= held / 150 <= 0.99


def test_ranking_is_the_area_above_the_baseline_as_far_as_all_methods_go():
    points = [("none", 0.0, None, 1.0), ("zero", 0.5, 1, 2.0), ("zero", 0.5, 2, 4.0), ("zero", 1.0, None, 5.0)]
    (row,) = plain(points).ranking().to_dict("records")  # of 0, 1 and 4 above the baseline, and of 0, 3 and 4
    assert row["cross_entropy"] == pytest.approx((1.5 + 2.5) / 2) and row["to"] == 1.0
    assert row["cross_entropy_sd"] == pytest.approx(statistics.stdev([1.5, 2.5]))
    assert row["top1"] == pytest.approx(-0.2)
    points = [("none", 0.0, None, 1.0), ("mean", 0.5, 1, 2.0)]  # 1/2 above on average
    points += [("zero", 0.25, 1, 1.0), ("zero", 0.75, 1, 3.0), ("zero", 1.0, None, 9.0)]  # 0 to 1/4, then 0 to 1 at 1/2
    ranking = plain(points).ranking()
    assert ranking["method"].tolist() == ["zero", "mean"] and ranking["to"].tolist() == [0.5, 0.5]
    assert ranking["cross_entropy"].tolist() == pytest.approx([0.25 * 0.5 / 0.5, 0.5])


def test_ranking_against_another_method_is_the_paired_difference_of_areas(made):
    results = made(("zero", "mean", "peak"), [0.25, 0.5, 1.0], [1, 2])
    ranking = results.ranking().set_index("method")
    against = results.ranking("mean").set_index("method")
    assert set(against.index) == {"zero", "peak"}
    for method, row in against.iterrows():
        gap = ranking.loc[method, "cross_entropy"] - ranking.loc["mean", "cross_entropy"]
        assert row["cross_entropy"] == pytest.approx(gap) and row["cross_entropy_low"] < gap < row["cross_entropy_high"]
        assert 0 <= row["q"] <= 1 and 0 <= row["top1_q"] <= 1
    sums, n = zip(*(per_example(results, row) for row in range(len(results.table))), strict=True)
    rows = results.table.reset_index(drop=True)
    points = [(0.0, 0.0)]
    for share in (0.25, 0.5, 1.0):
        own = [
            np.mean([sums[i] for i in rows.index[(rows["fraction"] == share) & (rows["method"] == method)]], axis=0)
            for method in ("zero", "mean")
        ]
        points.append((share, own[0] - own[1]))
    area = sum((b - a) * (f + g) / 2 for (a, f), (b, g) in itertools.pairwise(points))
    expected = plain(
        [("none", 0.0, None, 0.0), ("zero", 0.5, 1, 0.0)], by_example(n[0], np.zeros_like(area), area)
    ).compare(other="none")
    for end in ("low", "high"):
        assert against.loc["zero", f"cross_entropy_{end}"] == pytest.approx(expected[f"cross_entropy_{end}"].item())
    assert against.loc["zero", "q"] <= 1
    with pytest.raises(ConfigError, match="there is no method 'peek' here"):
        results.ranking("peek")


def test_areas_are_paired_by_seed_and_only_those_that_both_have():
    points = [("none", 0.0, None, 0.0)]
    points += [("zero", 1.0, 1, 1.0), ("zero", 1.0, 2, 5.0), ("mean", 1.0, 2, 4.0), ("mean", 1.0, 1, 0.5)]
    points += [("peak", 1.0, 2, 3.0), ("peak", 1.0, 3, 9.0), ("alone", 1.0, 4, 1.0), ("plain", 1.0, None, 2.0)]
    against = plain(points).ranking("zero").set_index("method")["cross_entropy"]
    assert against.to_dict() == pytest.approx({"mean": (-0.5 - 1.0) / 4, "peak": -1.0, "plain": (1.0 - 3.0) / 4})


def test_ranking_has_the_interval_of_the_examples_own_areas(made):
    results = made(("zero",), [0.5], [1])
    sums = [per_example(results, row)[0] for row in (0, 1)]
    area = plain([("none", 0.0, None, 0.0), ("zero", 0.5, 1, 0.0)], by_example(per_example(results, 0)[1], *sums))
    expected, found = area.compare(other="none").iloc[0], results.ranking().iloc[0]
    for end in ("low", "high"):  # a triangle
        assert found[f"cross_entropy_{end}"] == pytest.approx(expected[f"cross_entropy_{end}"] / 2)


def adjusted(p):
    """Benjamini and Hochberg's step-up procedure by loops: the smallest rate at which each is found."""
    count, order = len(p), sorted(range(len(p)), key=lambda place: p[place])
    return [min(p[order[k]] * count / (k + 1) for k in range(order.index(place), count)) for place in range(count)]


def test_the_q_of_parts_is_of_t_tests_over_clusters_among_the_parts_of_a_method_and_kind(made):
    sites = [{"name": "h.0.attn.proj", "kind": "self-attention"}, {"name": "h.1.attn.proj", "kind": "cross-attention"}]
    results = made(places=HEADS, sites=sites)
    examples = results.examples.assign(n=6, cluster=results.examples["example"] % 7)  # of 6 examples or of 5
    examples = examples[examples["example"] < 3 * 35]
    results = Results(results.table, examples, results.facts)
    found = results.compare(other="none")
    sums = examples.pivot_table("cross_entropy", "condition", "cluster", aggfunc="sum").to_numpy() / 30
    p = [stats.ttest_1samp(sums[row] - sums[0], 0).pvalue for row in range(1, 13)]
    expected = [q for start in range(0, 12, 3) for q in adjusted(p[start : start + 3])]
    assert found["q"].tolist() == pytest.approx(expected) and 1e-6 < min(expected) < max(expected)
    assert results.ranking().set_index(["method", "part", "head"])["q"].to_dict() == pytest.approx(
        found.set_index(["method", "part", "head"])["q"].to_dict()
    )
    assert Results(results.table).compare(other="none")["q"].isna().all()


def test_the_q_of_two_methods_are_of_all_shares_together(made):
    results = made(("zero", "peak"), [0.25, 0.5, 1.0], [1])
    results = Results(results.table, results.examples.assign(n=6), results.facts)
    sums = results.examples.pivot_table("cross_entropy", "condition", "cluster", aggfunc="sum").to_numpy()
    place = {(row.method, row.fraction): number for number, row in enumerate(results.table.itertuples())}
    pairs = [(place["zero", share], place["peak", share]) for share in (0.25, 0.5, 1.0)]
    p = [stats.ttest_1samp(sums[one] - sums[other], 0).pvalue for one, other in pairs]
    assert results.compare("zero", "peak")["q"].tolist() == pytest.approx(adjusted(p))


def test_p_values_of_nothing_are_uniform_also_where_clusters_are_unequal():
    generator = np.random.default_rng(0)
    clusters = np.repeat(np.arange(40), generator.integers(1, 9, 40))
    positions = generator.integers(0, 30, len(clusters))
    shared = generator.normal(size=(4000, 40))[:, clusters]
    p = p_values(positions * (shared + generator.normal(size=shared.shape)), positions, clusters)
    assert np.mean(p <= 0.05) == pytest.approx(0.05, abs=0.015) and np.mean(p <= 0.5) == pytest.approx(0.5, abs=0.03)
