"""Results of several runs, joined."""

import csv
import shutil

import pytest

from lightning_ablate import AblationCallback, join
from lightning_ablate.errors import DataError
from lightning_ablate.masks import EachHead
from lightning_ablate.results import Results
from tests import tiny


def run(folder, *methods, module=None, val=None, **options):
    made = AblationCallback(methods=methods, fractions=[0.5, 1.0], seeds=[1, 2], folder=folder, **options)
    tiny.fit(folder.parent, module, val=val, callback=made)
    return made.results


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    made = [run(folder / "first", "zero", "mean"), run(folder / "second", "mean", "peak")]
    made.append(run(folder / "vit", "zero", module=tiny.Own(tiny.mistral(), "another")))
    return folder, made


def test_results_load_as_they_were(runs):
    folder, made = runs
    loaded = Results.load(folder / "first")
    assert loaded.table() == made[0].table() and loaded.csv() == made[0].csv() and loaded.classes == 300
    assert len(loaded.intervals) == 2 * (1 + 2 * 3) and all(i.low <= i.mean <= i.high for i in loaded.intervals)


def test_runs_of_one_target_are_joined_and_those_of_another_stand_beside(runs):
    folder, made = runs
    one, other = join.load([folder / "first", folder / "second", folder / "vit"])
    assert one.methods == ["zero", "mean", "mean (second)", "peak"] and other.methods == ["zero"]
    assert one.baseline == Results.load(folder / "first").baseline
    for method, metric in (("peak", "top1"), ("peak", "cross_entropy")):
        assert one.curve(method, metric)[1].mean == pytest.approx(made[1].curve(method, metric)[1].mean)
        assert one.area(method, metric).interval == Results.load(folder / "second").area(method, metric).interval


def test_the_command_prints_and_draws_them(runs, tmp_path, capsys, drawn):
    folder, _ = runs
    join.main([str(folder / "second"), str(folder / "vit"), "--out", str(tmp_path / "joined")])
    printed = capsys.readouterr().out
    assert (
        "own on data" in printed and "another on data" in printed and str(tmp_path / "joined" / "joined.png") in printed
    )
    with (tmp_path / "joined" / "joined.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [sum(row["model"] == name for row in rows) for name in ("own", "another")] == [1 + 2 * 3, 1 + 3]
    assert (tmp_path / "joined" / "joined.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_joined_is_one_line(runs, tmp_path, capsys):
    folder, _ = runs
    run(tmp_path / "less", "zero", val=tiny.loader(4, seed=2))
    with pytest.raises(DataError, match="less has 58 scored positions .* evaluated on other data"):
        join.load([folder / "first", tmp_path / "less"])
    run(tmp_path / "heads", "zero", choice=EachHead())
    with pytest.raises(DataError, match="single sites, layers or heads"):
        join.load([tmp_path / "heads"])
    shutil.copytree(folder / "first", tmp_path / "changed")
    (tmp_path / "changed" / "results.csv").write_text((folder / "vit" / "results.csv").read_text())
    for bad in (tmp_path / "nothing", tmp_path / "changed"):
        with pytest.raises(SystemExit) as ended:
            join.main([str(bad)])
        assert str(ended.value).startswith("error: ") and "\n" not in str(ended.value)


def test_every_run_keeps_a_name_of_its_own(runs, tmp_path):
    folder, _ = runs
    for name in ("a", "b", "c"):
        shutil.copytree(folder / "first", tmp_path / name / "run")
    (joined,) = join.load([tmp_path / name / "run" for name in ("a", "b", "c")])
    assert len(joined.methods) == 6 and len(joined.rows) == 1 + 6 * 3


def test_areas_of_other_ranges_are_said_and_stand_apart(runs, tmp_path):
    folder, _ = runs
    made = AblationCallback(methods=["median"], fractions=[0.2], seeds=[1], folder=tmp_path / "short")
    tiny.fit(tmp_path, callback=made)
    (joined,) = join.load([folder / "first", tmp_path / "short"])
    ranks = joined.table().partition("mean over 0 to 100%")[2].splitlines()
    assert ranks[-1].startswith("median, 0 to 20%") and joined.area("zero", "top1").fraction == 1.0
