import csv
import json
import statistics
from dataclasses import replace

import pytest
import torch

from lightning_ablate import report
from lightning_ablate.errors import DataError
from lightning_ablate.files import write_whole
from lightning_ablate.results import Results, Row, read_rows
from lightning_ablate.sweep import BASELINE, Condition

HEADER = "model,data,method,fraction,seed,part,head,n,top1,top5,cross_entropy,kl"


def results(partial=()):
    conditions = [BASELINE]
    for method in ("zero", "peak"):
        conditions += [Condition(method, f, s) for f in (0.1, 0.5, 0.9) for s in (1, 2, 3)]
        conditions.append(Condition(method, 1.0, None))
    count = len(conditions)
    torch.manual_seed(0)
    loss = 1 + torch.rand(count, dtype=torch.float64)
    figures = {"n": torch.full((count,), 1234), "top1": torch.rand(count, dtype=torch.float64)}
    figures |= {"top5": figures["top1"].sqrt(), "cross_entropy": loss, "kl": loss - 1}
    return Results.of(conditions, figures, model="a model", data="some, data", classes=10, partial=partial)


def test_csv_holds_one_row_a_condition_and_reads_back(tmp_path):
    made = results()
    lines = made.csv().splitlines()
    assert lines[0] == HEADER and len(lines) == 1 + 1 + 2 * 10
    first = next(csv.DictReader(lines))
    assert (first["method"], float(first["fraction"]), first["seed"]) == ("none", 0, "")
    write_whole(tmp_path / "results.csv", made.csv())
    for read, row in zip(read_rows(tmp_path / "results.csv"), made.rows, strict=True):
        assert read.seed == row.seed and read.n == row.n == 1234
        assert read.cross_entropy == pytest.approx(row.cross_entropy, rel=1e-9)


def test_read_rows_refuses_another_file(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="expected"):
        read_rows(tmp_path / "other.csv")


def test_read_rows_refuses_what_its_run_did_not_write(tmp_path):
    report.save(results(), tmp_path, {})
    path = tmp_path / "results.csv"
    assert len(read_rows(path)) == len(results().rows)
    path.write_text(path.read_text().replace("1234", "1235", 1))
    with pytest.raises(DataError, match="checksum isn't the one in run.json"):
        read_rows(path)
    (tmp_path / "run.json").unlink()
    assert read_rows(path)


def test_curve_is_mean_and_standard_deviation_over_seeds():
    made = results()
    values = [row.top1 for row in made.rows if row.method == "peak" and row.fraction == 0.5]
    points = {point.fraction: point for point in made.curve("peak", "top1")}
    assert len(values) == 3
    assert points[0.5].mean == pytest.approx(statistics.mean(values))
    assert points[0.5].sd == pytest.approx(statistics.stdev(values))
    assert points[0.0].mean == made.baseline.top1 and points[1.0].sd is None


def test_table_shows_ten_fifty_and_ninety_percent():
    made = results(partial=["evaluation was cut to 1 of 9 batches"])
    table = made.table()
    values = [100 * row.top1 for row in made.rows if row.method == "zero" and row.fraction == 0.9]
    assert f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}" in table
    assert "PARTIAL: evaluation was cut to 1 of 9 batches" in table and "1,234 scored positions" in table
    curves = table.partition("mean over 0 to 100%")[0]
    assert [word for word in curves.split() if word.endswith("%")][-6:] == ["10%", "50%", "90%"] * 2


def test_table_ranks_the_methods_by_what_they_cost_over_all_fractions():
    made = results()
    loss = {method: made.area(method, "cross_entropy").mean for method in ("zero", "peak")}
    ranks = [line.split()[:2] for line in made.table().partition("mean over 0 to 100%")[2].splitlines()[1:]]
    assert ranks == [[method, f"{loss[method]:+.4f}"] for method in sorted(loss, key=lambda method: loss[method])]


def test_the_area_is_that_between_curve_and_baseline():
    def row(method, fraction, seed, loss):
        return Row("m", "d", method, fraction, seed, "", None, 5, 1.0, 1.0, loss, 0.0)

    points = [(0.5, 1, 2.0), (0.5, 2, 4.0), (1.0, None, 5.0)]
    made = Results([row("none", 0.0, None, 1.0), *(row("zero", *point) for point in points)], 10)
    area = made.area("zero", "cross_entropy")  # of 0, 1 and 4 above the baseline, and of 0, 3 and 4
    assert area.mean == pytest.approx((1.5 + 2.5) / 2) and area.sd == pytest.approx(statistics.stdev([1.5, 2.5]))
    assert area.fraction == 1.0 and area.interval is None
    half = Results([made.rows[0], *made.rows[1:3]], 10).area("zero", "cross_entropy")
    assert half.mean == pytest.approx(1.0) and half.fraction == 0.5


def test_table_shows_other_fractions_where_those_are_not_there():
    row = Row("m", "d", "none", 0.0, None, "", None, 5, 1.0, 1.0, 0.1, 0.0)
    rows = [row] + [Row("m", "d", "zero", f, 1, "", None, 5, 0.5, 0.5, 1.0, 0.9) for f in (0.2, 0.3, 0.4, 0.6)]
    table = Results(rows, 10).table()
    assert "20%" in table and "40%" in table and "60%" in table and "30%" not in table


def test_save_writes_csv_json_and_figure(tmp_path, drawn):
    paths = report.save(results(["cut"]), tmp_path / "run", {"seeds": (1, 2)})
    assert [path.name for path in paths] == ["results.csv", "run.json", "degradation.png"]
    assert all(path.stat().st_size > 0 for path in paths) and not list(tmp_path.glob("**/*.part"))
    facts = json.loads(paths[1].read_text())
    assert facts["partial"] == ["cut"] and facts["seeds"] == [1, 2] and "torch" in facts["versions"]
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_figure_draws_a_curve_a_method_the_baseline_and_chance():
    figure = report.degradation(results())
    for axes in figure.axes:
        labels = [line.get_label() for line in axes.lines]
        assert [name for name in labels if name[0] != "_"] == ["zero", "peak", "nothing ablated", "chance"]
        assert axes.lines[0].get_xdata() == pytest.approx([0, 10, 50, 90, 100])
        for label in (*axes.get_xticklabels(), *axes.get_yticklabels(), axes.yaxis.label):
            assert label.get_fontsize() >= 8
    assert figure.axes[0].lines[-1].get_ydata()[0] == pytest.approx(10)
    assert figure.get_figwidth() <= 3.5  # inches: a column's width, so that 8 points stay 8 points


def test_tensorboard_overlays_a_run_a_method(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = results()
    (curves,) = report.tensorboard(made, tmp_path)
    assert sorted(path.name for path in curves.iterdir()) == ["peak", "zero"]
    events = EventAccumulator(str(curves / "peak"))
    events.Reload()
    scalars = events.Scalars("ablation/top1")
    assert [scalar.step for scalar in scalars] == [0, 10, 50, 90, 100]
    expected = [point.mean for point in made.curve("peak", "top1")]
    assert [scalar.value for scalar in scalars] == pytest.approx(expected, rel=1e-6)


def test_fresh_folder_never_takes_one_that_holds_a_run(tmp_path):
    assert report.fresh_folder(tmp_path) == tmp_path
    (tmp_path / "results.csv").touch()
    assert report.fresh_folder(tmp_path) == tmp_path / "run-2"
    (tmp_path / "run-2").mkdir()
    (tmp_path / "run-2" / "ablation.ckpt").touch()
    assert report.fresh_folder(tmp_path) == tmp_path / "run-3"


def parts(heads=True):
    """Two methods, two sites of three heads each (or two layers); the damage is told by hand."""
    places = (
        [(f"h.{i}.attn.proj", head) for i in (0, 1) for head in range(3)] if heads else [("h.0", None), ("h.1", None)]
    )
    rows = [Row("m", "d", "none", 0.0, None, "", None, 9, 0.5, 0.9, 2.0, 0.0)]
    for offset, method in enumerate(("zero", "mean")):
        for number, (part, head) in enumerate(places):
            rows.append(Row("m", "d", method, 1.0, None, part, head, 9, 0.4, 0.8, 2.0 + 0.1 * number - offset, 0.1))
    return Results(rows, 10)


def test_damage_is_the_cross_entropy_above_the_baseline():
    made = parts()
    assert made.parts == ["h.0.attn.proj", "h.1.attn.proj"] and not results().parts
    assert made.damage("zero", "h.1.attn.proj", 2) == pytest.approx(0.5)
    assert made.damage("mean", "h.0.attn.proj", 1) == pytest.approx(-0.9)
    assert parts(heads=False).damage("zero", "h.1") == pytest.approx(0.1)


def test_table_of_parts_shows_the_most_important_first():
    lines = parts().table().splitlines()
    zero = [line.split() for line in lines if line.startswith("zero")]
    assert [line[1:] for line in zero] == [
        [f"h.{i}.attn.proj", "head", str(head), f"{damage:+.4f}"]
        for i, head, damage in ((1, 2, 0.5), (1, 1, 0.4), (1, 0, 0.3), (0, 2, 0.2), (0, 1, 0.1))
    ]
    assert "h.1  " in parts(heads=False).table()


def test_rows_of_parts_read_back(tmp_path):
    write_whole(tmp_path / "results.csv", parts().csv())
    assert read_rows(tmp_path / "results.csv") == [
        replace(row, cross_entropy=pytest.approx(row.cross_entropy)) for row in parts().rows
    ]


def test_importance_draws_each_heads_damage_where_it_belongs(tmp_path, drawn):
    figure = report.figure(parts())
    maps = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in maps] == ["zero", "mean"]
    drawn = maps[0].images[0]
    assert drawn.get_array().tolist() == [pytest.approx([0, 0.1, 0.2]), pytest.approx([0.3, 0.4, 0.5])]
    assert drawn.norm.vmin == -drawn.norm.vmax == pytest.approx(-1.0)
    assert [label.get_text() for label in maps[0].get_yticklabels()] == ["0", "1"]
    assert (tmp_path / "importance.png") in report.save(parts(), tmp_path, {})
    assert report.tensorboard(parts(), tmp_path) == []
    lines = report.figure(parts(heads=False)).axes[0].lines
    assert list(lines[0].get_ydata()) == pytest.approx([0, 0.1]) and lines[1].get_label() == "mean"
