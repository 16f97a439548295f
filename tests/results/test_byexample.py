"""What examples score, which is held once."""

import numpy as np
import pandas as pd
import pytest

from lightning_ablate import Results
from lightning_ablate.errors import DataError
from lightning_ablate.results import byexample
from lightning_ablate.results.byexample import ByExample


@pytest.fixture
def frame(made):
    return made(examples=7).examples


def test_a_table_in_pieces_is_the_table(made, frame, tmp_path):
    conditions = [len(made().table)]
    (known,) = byexample.of_frame(frame, conditions)
    assert known.sums.shape == (conditions[0], 4, 7)
    for rows in (1, 7, 20, 10_000):
        pd.testing.assert_frame_equal(pd.concat(known.pieces(0, rows), ignore_index=True), frame)
    with (tmp_path / "file.parquet").open("wb") as file:
        byexample.write(known.pieces(0, 14), file)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "file.parquet"), frame)
    (again,) = byexample.read(tmp_path / "file.parquet", conditions)
    assert all(np.array_equal(one, other) for one, other in zip(known, again, strict=True))


def test_data_sets_with_other_examples_and_without_any_lie_one_below_the_other(made, frame):
    count = len(made().table)
    other = made(examples=3).examples.assign(condition=lambda own: own["condition"] + 2 * count)
    first, none, last = byexample.of_frame(pd.concat([frame, other]), [count, count, count])
    assert (len(first.n), none, len(last.n)) == (7, None, 3)
    pd.testing.assert_frame_equal(pd.concat(last.pieces(2 * count), ignore_index=True), other)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda own: own[1:], "every condition needs a row for each example"),
        (lambda own: own.assign(n=range(len(own))), "every condition needs a row for each example"),
        (
            lambda own: own.assign(condition=own["condition"] + 1),
            "every condition needs a row|conditions that the table",
        ),
        (lambda own: own.drop(columns="cluster"), "lacks the columns cluster"),
        (lambda own: pd.concat([own, own.tail(7).assign(condition=999)]), "conditions that the table lacks"),
    ],
)
def test_what_is_no_table_of_examples_is_refused(made, frame, change, match):
    with pytest.raises(DataError, match=match):
        Results(made().table, change(frame))


def test_results_hold_what_they_are_given_and_copy_nothing(made, frame):
    table = made().table
    known = ByExample(
        np.arange(7),
        np.arange(7),
        np.ones(7, int),
        ("top1", "top5", "cross_entropy", "kl"),
        np.zeros((len(table), 4, 7)),
    )
    assert Results(table, [known]).known[0].sums is known.sums


def test_an_empty_cell_where_a_whole_number_belongs_is_refused(tmp_path):
    frame = pd.DataFrame({"condition": [0, 0, 1, 1], "example": [0, 1] * 2, "cluster": [0, 1] * 2})
    frame["n"] = pd.array([None, 4] * 2, dtype="Int64")
    frame.assign(**dict.fromkeys(("top1", "top5", "cross_entropy", "kl"), 0.5)).to_parquet(
        tmp_path / "examples.parquet"
    )
    with pytest.raises(DataError, match="empty cells in the column n, expected whole numbers"):
        byexample.read(tmp_path / "examples.parquet", [2])
