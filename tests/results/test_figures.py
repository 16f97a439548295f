"""What the figures hold."""

import itertools
import math
from itertools import product

import pytest

from lightning_ablate.methods import shipped
from lightning_ablate.results import Results, figures
from lightning_ablate.results.styles import styles
from tests.results.conftest import HEADS


def test_degradation_draws_a_curve_a_method_the_baseline_and_chance(made):
    results = made()
    results.table["model"] = "/runs/gpt2"
    table, figure = results.table, figures.degradation(results)
    top, bottom = figure.axes
    assert top.get_title() == "gpt2 on some, data"
    for axes, metric, scale in ((top, "top1", 100), (bottom, "cross_entropy", 1)):
        labels = [line.get_label() for line in axes.lines if line.get_label()[0] != "_"]
        assert labels == ["zero", "peak", "nothing ablated", *["chance"] * (axes is bottom)]
        assert axes.lines[0].get_xdata() == pytest.approx([0, 10, 50, 90, 100])
        last = table[(table["method"] == "zero") & (table["fraction"] == 1.0)][metric].item()
        assert axes.lines[0].get_ydata()[[0, -1]] == pytest.approx([scale * table[metric][0], scale * last])
        for label in (*axes.get_xticklabels(), *axes.get_yticklabels(), axes.yaxis.label, axes.title):
            assert label.get_fontsize() >= 8
    assert [label.get_text() for label in bottom.get_xticklabels()] == ["0", "10", "50", "90", "100"]
    assert bottom.lines[-1].get_ydata()[0] == pytest.approx(math.log(10))
    assert top.texts[0].get_text() == "↓ chance: 10%" and not bottom.texts
    assert figure.legends[0].get_title().get_text() == "band: 95% interval; bar: ± sd over 3 seeds"
    assert all(text.get_fontsize() >= 8 for text in figure.legends[0].get_texts())
    assert figure.get_figwidth() <= 3.5  # inches: a column's width, so that 8 points stay 8 points
    assert figures.degradation(results, results).get_figwidth() <= 7.0


def test_chance_is_a_line_among_the_curves_and_does_not_stretch_the_axis(made):
    for classes, lines in ((2, 1), (1000, 0)):
        top, _ = figures.degradation(made(classes=classes)).axes
        assert [line.get_label() for line in top.lines].count("chance") == lines and len(top.texts) == 1 - lines
        assert top.get_ylim() == figures.degradation(made(classes=None)).axes[0].get_ylim()
        assert not lines or top.lines[-1].get_ydata()[0] == pytest.approx(50)


def test_a_method_looks_the_same_in_every_figure_and_in_joined_runs():
    look = ("color", "marker")
    alone, few, joined = (styles(names) for names in (["mean"], ["zero", "mean"], ["mean (A)", "mean (B)"]))
    assert alone["mean"] == few["mean"] == joined["mean (A)"]
    assert [joined["mean (B)"][key] for key in look] == [alone["mean"][key] for key in look]
    assert joined["mean (A)"]["linestyle"] != joined["mean (B)"]["linestyle"]
    assert len({tuple(style.values()) for style in styles(shipped()).values()}) == len(shipped())
    assert len({(style["color"], style["marker"]) for style in styles(shipped()).values()}) == len(shipped())
    own = styles(["zero", "my-own", "another", "a-third"])
    assert len({style["color"] for style in own.values()}) == 4


def test_maps_of_a_model_share_their_colours_which_an_outlier_does_not_wash_out(made):
    results = made(places=HEADS)
    assert "darkest" not in results.plot().get_suptitle()
    results.table.loc[3, "cross_entropy"] += 9.0
    figure = results.plot()
    losses = results.table["cross_entropy"] - results.baseline["cross_entropy"]
    inner = losses.drop(3).max()
    assert [axes.images[0].norm.vmax for axes in figure.axes[:2]] == pytest.approx([inner, inner])
    assert f"darkest: 1 beyond ±{inner:.2g}, up to {losses[3]:.2g}" in figure.get_suptitle()


def test_degradation_of_one_fraction_draws_a_line_from_the_baseline(made):
    top, bottom = figures.degradation(made(fractions=[0.5])).axes
    assert [label.get_text() for label in bottom.get_xticklabels()] == ["0", "50"]
    lines = [line for line in top.lines if line.get_label() in ("zero", "peak")]
    assert [line.get_xdata().tolist() for line in lines] == [[0, 50], [0, 50]]


def test_differences_show_every_pair_with_its_interval(made):
    results = made(("zero", "mean", "peak"), [0.1, 0.5])
    figure = figures.differences(results)
    assert [axes.get_title() for axes in figure.axes] == ["zero − mean", "zero − peak", "mean − peak"] * 2
    assert [axes.get_ylabel() for axes in figure.axes[::3]] == ["lost top-1, points", "added cross-entropy, nats"]
    assert all(len(axes.containers) == 1 for axes in figure.axes)
    assert figure.get_suptitle() == "a model on some, data"
    means = results.table.groupby("method")["top1"].mean()
    line = figure.axes[0].containers[0].lines[0].get_ydata()
    assert line.mean() == pytest.approx(100 * (means["mean"] - means["zero"]))
    means = results.table.groupby("method")["cross_entropy"].mean()
    line = figure.axes[5].containers[0].lines[0].get_ydata()
    assert line.mean() == pytest.approx(means["mean"] - means["peak"])


def test_differences_of_many_methods_are_those_of_neighbours_in_rank(made):
    results = made(("a", "b", "c", "d", "e"), [0.5])
    titles = {axes.get_title() for axes in figures.differences(results).axes if axes.get_visible()}
    means = results.table.groupby("method")["cross_entropy"].mean().drop("none")
    ranks = sorted(means.index, key=lambda method: means[method])
    assert titles == {" − ".join(sorted(pair)) for pair in itertools.pairwise(ranks)}


def test_importance_draws_each_heads_damage_where_it_belongs_and_marks_what_is_known(made):
    results = made(places=HEADS)
    results.table.loc[2, "cross_entropy"] = results.baseline["cross_entropy"]
    same = results.examples["condition"] == 2
    examples = results.examples
    examples.loc[same, "cross_entropy"] = examples["cross_entropy"][:40].to_numpy()
    results = Results(results.table, examples, results.facts)
    figure = results.plot()
    maps = [axes for axes in figure.axes if axes.images]
    losses = (results.table["cross_entropy"] - results.baseline["cross_entropy"]).tolist()
    assert [axes.get_title() for axes in maps] == ["zero", "peak"]
    assert maps[0].images[0].get_array().ravel().tolist() == pytest.approx(losses[1:7])
    assert maps[1].images[0].norm.vmin == -maps[1].images[0].norm.vmax == pytest.approx(-max(losses))
    assert [label.get_text() for label in maps[0].get_yticklabels()] == ["0", "1"]
    dots = list(zip(maps[0].lines[0].get_ydata(), maps[0].lines[0].get_xdata(), strict=True))
    known = results.compare("zero", "none")["q"] <= 0.05
    assert dots == [place for place, found in zip(product((0, 1), (0, 1, 2)), known, strict=True) if found]
    assert not known[1] and known.sum() >= 4 and "dot: differs from 0 (q ≤ 0.05)" in figure.get_suptitle()
    assert "dot" not in Results(results.table).plot().get_suptitle()


def test_importance_of_layers_is_a_line_a_method(made):
    results = made(places=[("h.0", None), ("h.1", None)])
    axes = results.plot().axes[0]
    losses = (results.table["cross_entropy"] - results.baseline["cross_entropy"]).tolist()
    assert list(axes.lines[0].get_ydata()) == pytest.approx(losses[1:3]) and axes.lines[1].get_label() == "peak"


@pytest.mark.parametrize("count", [1, 30])
def test_figures_keep_their_boxes(made, count):
    methods = [f"a-rather-long-method-{i}" for i in range(12)]
    layers = [(f"encoder.block.{i}.self_attention.out", None) for i in range(count)]
    for results in (made(methods, places=layers, examples=5), made(methods, places=[(part, 0) for part, _ in layers])):
        figure = results.plot()
        figure.canvas.draw()
        assert all(min(axes.get_window_extent().size) > 100 for axes in figure.axes[: len(methods)] if axes.get_title())
        assert min(figure.axes[0].get_window_extent().size) > 100
