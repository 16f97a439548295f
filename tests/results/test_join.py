"""Results of several runs, joined."""

import shutil
import statistics

import pandas as pd
import pytest

from lightning_ablate.errors import ConfigError, DataError
from lightning_ablate.results import Results, load
from lightning_ablate.results.__main__ import main


@pytest.fixture
def runs(tmp_path):
    """Saves results in a folder of that name."""

    def saved(name, results):
        results.save(tmp_path / name)
        return tmp_path / name

    return saved


def same_base(made, methods, fractions=(0.5,), **options):
    """Results that share their baseline with all others made here."""
    results, base = made(methods, fractions, **options), made(("zero",), [0.5])
    examples = results.examples.copy()
    examples.loc[examples["condition"] == 0] = base.examples[base.examples["condition"] == 0].to_numpy()
    return Results(pd.concat([base.table[:1], results.table[1:]]), examples, results.facts)


def test_load_joins_runs_and_names_their_methods(made, runs):
    folders = [runs("a/version_0", same_base(made, ["zero", "mean"], [0.1, 0.5, 0.9, 1.0]))]
    folders.append(runs("b/version_0", same_base(made, ["mean"])))
    (joined,) = load(folders, ["a", "b"])
    assert joined.methods == ["zero (a)", "mean (a)", "mean (b)"] and joined.facts["classes"] == 10
    assert joined.ranking()["to"].tolist() == [0.5] * 3
    half = joined.table[(joined.table["method"] == "mean (b)")]["cross_entropy"].tolist()
    rank = joined.ranking().set_index("method").loc["mean (b)", "cross_entropy"]
    assert rank == pytest.approx((statistics.mean(half) - joined.baseline["cross_entropy"]) / 2)
    known = joined.compare("mean (b)", "zero (a)")
    assert known["fraction"].tolist() == [0.5] and known["top1_low"].notna().all()
    lines = {line.get_label(): line for line in joined.plot().axes[0].lines}
    assert lines["mean (a)"].get_xdata() == pytest.approx([0, 10, 50, 90, 100])
    assert lines["mean (b)"].get_xdata() == pytest.approx([0, 50])


def test_load_needs_names_only_for_methods_that_several_runs_hold(made, runs):
    folders = [runs("first", same_base(made, ["zero"])), runs("second", same_base(made, ["mean", "peak"]))]
    (joined,) = load(folders)
    assert joined.methods == ["zero", "mean", "peak"] and joined.partial == []
    second = Results.load(folders[1])
    peak = second.summary()[second.summary()["method"] == "peak"].reset_index(drop=True)
    same = joined.summary()[joined.summary()["method"] == "peak"].reset_index(drop=True)
    pd.testing.assert_frame_equal(same, peak, check_exact=False, rtol=1e-12)
    for names, said in ((None, r"have the methods mean, peak: .*--names A B"), (["one"], "1 names for 3 runs")):
        with pytest.raises(ConfigError, match=said) as raised:
            load([*folders, folders[1]], names)
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


def test_load_drops_examples_that_are_not_the_same(made, runs):
    other = same_base(made, ["peak"])
    folders = [runs("one", same_base(made, ["zero"]))]
    for name, examples in (("none", None), ("other", other.examples.assign(example=other.examples["example"] + 1))):
        (joined,) = load([*folders, runs(name, Results(other.table, examples, other.facts))])
        assert joined.examples is None and joined.methods == ["zero", "peak"]


def test_load_refuses_other_data_and_single_parts(made, runs):
    one = runs("one", made(["zero"], [0.5]))
    for name, change in (("less", {"n": 58}), ("other", {"cross_entropy": 9.0})):
        results = same_base(made, ["zero"])
        folder = runs(name, Results(results.table.assign(**change), results.examples, results.facts))
        with pytest.raises(DataError, match=f"{name} has .* evaluated on other data") as raised:
            load([one, folder])
        assert "\n" not in str(raised.value)
    with pytest.raises(DataError, match="single sites, layers or heads"):
        load([runs("heads", made(["zero"], places=[("h.0", 1)]))])


def test_the_command_draws_several_targets_and_says_in_a_line_what_is_wrong(made, runs, tmp_path, capsys, drawn):
    one, other = made(["zero"], [0.5]), made(["zero"], [0.5])
    other.table["model"] = "another"
    folders = [runs("one", one), runs("two", other)]
    main([*map(str, folders), "--names", "A", "B", "--out", str(tmp_path / "joined")])
    printed = capsys.readouterr().out
    assert "a model on some, data: " in printed and "another on some, data: " in printed
    assert (tmp_path / "joined" / "joined.png").read_bytes().startswith(b"\x89PNG")
    table = pd.read_csv(tmp_path / "joined" / "joined.csv", keep_default_na=False)
    assert table["model"].tolist() == ["a model"] * 4 + ["another"] * 4
    assert table["method"].tolist() == ["none", *["zero (A)"] * 3, "none", *["zero (B)"] * 3]
    shutil.rmtree(folders[1])
    with pytest.raises(SystemExit, match="^error: [^\n]*$"):
        main([str(folders[1])])


def test_runs_that_ended_early_keep_their_confidence_sequences(runs, made):
    """A bootstrap's intervals are too narrow where one looked on the way."""
    one, other = made(["zero"], until=0.1), made(["peak"])
    (joined,) = load([runs("one", one), runs("other", other)])
    assert joined.facts["until"] == 0.1
    ends = ["cross_entropy_low", "cross_entropy_high"]
    whole = one.compare(other="none")[ends].to_numpy()
    own = joined.compare("zero", "none")[ends].to_numpy()
    assert own == pytest.approx(whole)
