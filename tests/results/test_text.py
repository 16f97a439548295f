"""What results say in the terminal."""

import statistics

import numpy as np
import pytest

from lightning_ablate.results import Results
from lightning_ablate.results.bootstrap import ENOUGH
from tests.results.conftest import HEADS, by_example, own, plain


def test_few_clusters_are_said_where_the_interval_stands(made):
    few = made(examples=24)  # some of which have no scored position
    assert few.counts[1] < 25 and "true coverage" not in str(made())
    few = Results(few.table, few.examples.assign(cluster=few.examples["example"] % 5))
    counted = f"{few.counts[0]} examples in 5 clusters"
    said = f"95% interval over {counted}; fewer than {ENOUGH} clusters: its true coverage is below 95%"
    assert f"of {counted};" in str(few)
    assert f"[{said};" in str(few) and said in few._repr_html_()


def test_str_shows_scores_ranks_and_differences(made):
    results = made(partial=["evaluation was cut to 1 of 9 batches"], notes=["few"], methods_notes=["ridge: 1e-4"])
    first, scores, _, ranks, differences, note = str(results).split("\n\n")
    base = results.baseline
    baseline = f"top-1 {100 * base['top1']:.2f}%, cross-entropy {base['cross_entropy']:.4f} nats"
    counted = f"of {results.counts[0]} examples"
    said = f"a model on some, data: {base['n']:,} scored positions {counted}; nothing ablated: {baseline}"
    assert first.splitlines() == [said, "PARTIAL: evaluation was cut to 1 of 9 batches", "NOTE: few", "ridge: 1e-4"]
    values = [100 * value for value in own(results, "zero", 0.9, "top1").values()]
    assert f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}" in scores
    assert [word for word in scores.split() if word.endswith("%")][-6:] == ["10%", "50%", "90%"] * 2
    assert ranks.startswith("mean over 0 to 100%") and ranks.count("[") == 4
    lost = results.compare("zero", "peak").set_index("fraction")["top1"][0.5] * -100
    assert differences.startswith(f"zero − peak at 50%: {lost:+.2f} points lost [-") and lost < 0
    assert " nats added [-" in differences
    assert note.startswith("[95% interval over 37 examples; for these draws")
    assert repr(results).count("\n") == 0 and f"<pre>{first}\n" in results._repr_html_()


def test_str_compares_many_methods_with_their_neighbours_in_rank():
    names, levels = ["a", "b", "c", "d", "e"], (3, 1, 5, 2, 4)
    points = [("none", 0.0, None, 0.0), *((name, 0.5, 1, level) for name, level in zip(names, levels, strict=True))]
    text = str(plain(points, by_example([9] * 20, *[np.full(20, level) for level in (0, *levels)])))
    pairs = [line.partition(" at 50%")[0] for line in text.splitlines() if " at 50%" in line]
    assert pairs == ["a − d", "a − e", "b − d", "c − e"] and "all 10 pairs" in text


@pytest.mark.parametrize(("name", "shown"), [("/home/me/gpt2", "gpt2"), ("./models/vit", "vit"), ("an/opt", "an/opt")])
def test_str_shortens_paths_and_keeps_hub_names(made, name, shown):
    assert str(Results(made().table.assign(model=name))).startswith(f"{shown} on some, data: ")


def test_str_of_parts_shows_the_most_important_first(made):
    results = made(("zero",), places=HEADS)
    losses = results.table["cross_entropy"].tolist()
    ranked = sorted(range(6), key=lambda place: -losses[1 + place])[:5]
    *lines, found = str(results).partition("largest first: added cross-entropy, nats\n")[2].splitlines()
    assert found == f"found to differ from 0 (q ≤ 0.05): {(results.ranking()['q'] <= 0.05).sum()} of 6 under zero"
    for place, line in zip(ranked, lines, strict=True):
        assert "{} head {} ".format(*HEADS[place]) in line and f" {losses[1 + place] - losses[0]:+.4f} [" in line
    ranks = results.ranking()[["part", "head", "cross_entropy"]].values.tolist()
    assert ranks[:5] == [[*HEADS[place], pytest.approx(losses[1 + place] - losses[0])] for place in ranked]
