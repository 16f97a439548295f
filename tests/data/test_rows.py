"""Rows in every form that they come in, and what is said of those that can't be read."""

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict
from jsonargparse import ArgumentParser

from lightning_ablate import (
    AblationDataModule,
    Digits,
    ImageData,
    IndirectObjects,
    LabelledTexts,
    PairedTexts,
    PythonTexts,
    TextData,
    TextPairs,
)
from lightning_ablate.data import Examples
from lightning_ablate.data.rows import MadeRows
from lightning_ablate.errors import DataError, loading
from tests import tiny
from tests.data.texts import data, data_of, rows


def texts_in_files(source, folder):
    for number, text in enumerate(source["text"]):
        (folder / f"{number:03}.txt").write_text(text)


FORMS = {
    "texts.jsonl": lambda source, folder: source.to_json(folder / "texts.jsonl"),
    "texts.csv": lambda source, folder: source.to_csv(folder / "texts.csv"),
    "*.txt": texts_in_files,
    ".": lambda source, folder: source.to_parquet(folder / "train.parquet"),
    "saved": lambda source, folder: source.save_to_disk(folder / "saved"),
}


@pytest.mark.parametrize("name", [*FORMS, "streamed"])
def test_every_local_form_gives_the_same_sequences(name, tmp_path, parquet, gpt2_folder):
    if name in FORMS:
        FORMS[name](Dataset.from_dict({"text": tiny.TEXTS}), tmp_path)
    found = data(tmp_path / name if name in FORMS else parquet, gpt2_folder, streaming=name == "streamed")
    expected = data(parquet, gpt2_folder)
    for purpose in ("calibration", "evaluation"):
        assert rows(found, purpose) == rows(expected, purpose)


def test_missing_and_empty_files_and_a_missing_tokenizer_are_refused(tmp_path, gpt2_folder):
    (tmp_path / "broken.jsonl").write_text('{"text": "one"\n{')
    for name, texts in (("blank", [" ", "\n"]), ("numbers", [1, 2])):
        Dataset.from_dict({"text": texts}).to_parquet(tmp_path / f"{name}.parquet")
    for name, message in (
        ("nowhere.parquet", r"nowhere.parquet' does not exist"),
        ("no/such-data", "could not load 'no/such-data'"),
        (tmp_path / "broken.jsonl", "could not load"),
        (tmp_path / "blank.parquet", "gives 0 calibration tokens, expected 100"),
        (tmp_path / "numbers.parquet", "holds 1 in 'text', expected text"),
    ):
        with pytest.raises(DataError, match=message):
            data(name, gpt2_folder)
    with pytest.raises(DataError, match="could not load 'no/such-tokenizer'"):
        TextData("x.parquet", tokenizer="no/such-tokenizer").setup("fit")


def test_blank_cells_are_passed_over_and_na_and_null_are_texts(tmp_path, gpt2_folder):
    lines = [*tiny.TEXTS[:3], "NA", "", "null", "nan", *tiny.TEXTS[3:]]
    csv = "\n".join(["number,text", *(f'{number},"{text}"' for number, text in enumerate(lines))])
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.csv").write_text(csv)
    expected, most = [text for text in lines if text], {"calibration_tokens": 250}
    given = data_of([*lines[:5], None, *lines[5:]], gpt2_folder, **most)
    names = tmp_path / "folder", tmp_path / "folder" / "train.csv"
    for made in (given, *(data(name, gpt2_folder, **most) for name in names)):
        shown = "".join(tiny.tokenizer().decode(ids) for ids in rows(made, "calibration"))
        assert "".join(expected).startswith(shown) and "NAnullnan" in shown


GIVEN = {
    "tuple": tuple,
    "generator": iter,
    "array": np.array,
    "series": pd.Series,
    "frame": lambda texts: pd.DataFrame({"text": texts}, index=range(5, 5 + len(texts))),
    "columns": lambda texts: {"text": texts},
    "stream": lambda texts: Dataset.from_dict({"text": texts}).to_iterable_dataset(),
    "splits": lambda texts: DatasetDict(train=Dataset.from_dict({"text": texts})),
    "with None": lambda texts: [*texts[:2], None, *texts[2:]],
    "with gaps": lambda texts: [{"text": texts[0]}, {"body": ""}, *({"text": text} for text in texts[1:])],
}


@pytest.mark.parametrize("form", GIVEN)
def test_rows_of_any_usual_form_give_the_same_sequences(form, parquet, gpt2_folder):
    found, expected = data_of(GIVEN[form](tiny.TEXTS), gpt2_folder), data(parquet, gpt2_folder)
    for purpose in ("calibration", "evaluation"):
        assert rows(found, purpose) == rows(expected, purpose)


def test_splits_are_taken_by_name_and_what_cannot_be_read_is_one_line(gpt2_folder):
    halves = DatasetDict(a=Dataset.from_dict({"text": tiny.TEXTS[:40]}), b=Dataset.from_dict({"text": tiny.TEXTS[40:]}))
    made = data_of(halves, gpt2_folder, calibration_split="a", evaluation_split="b")
    alone = data_of(tiny.TEXTS[40:], gpt2_folder)
    assert rows(made, "evaluation")[0] == rows(alone, "calibration")[0]
    for given, message in (
        (halves, "Unknown split 'train' of given, expected one of a, b"),
        (["odd \ud83d text"], "can't encode character"),
        ([], "gives 0 calibration tokens"),
        (3, "could not load 'given': 'int' object is not iterable"),
    ):
        with pytest.raises(DataError, match=message):
            data_of(given, gpt2_folder)


NAMES = ["a[1].csv", "b [x]*.CSV", "run [a]/train.csv", "C.TXT", "upper/D.Parquet", "glob [b]/E.JSONL"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("whole", [False, True])
def test_brackets_and_upper_case_endings_are_names_like_any_other(name, whole, tmp_path, gpt2_folder):
    file = tmp_path / "data" / name
    file.parent.mkdir(parents=True)
    frame = pd.DataFrame({"text": tiny.TEXTS})
    kind = file.suffix.lower().removeprefix(".")
    texts = tiny.TEXTS if kind != "txt" else ["\n\n".join(tiny.TEXTS)]
    if kind == "txt":
        file.write_text(texts[0])
    elif kind == "jsonl":
        frame.to_json(file, lines=True, orient="records")
    else:
        getattr(frame, f"to_{kind}")(file)
    found, expected = data(file.parent if whole else file, gpt2_folder), data_of(texts, gpt2_folder)
    for purpose in ("calibration", "evaluation"):
        assert rows(found, purpose) == rows(expected, purpose)


CAUSES = {
    "latin.csv": "text\ncafé\n".encode("cp1252"),
    "torn.parquet": b"PAR1 and no more",
    "ragged.csv": b"text,label\na,1\nb,1,2\n",
    "broken.jsonl": b'{"text": "a"}\n{"text": "no end\n',
}
SAID = {
    "latin.csv": "'utf-8' codec can't decode byte 0xe9",
    "torn.parquet": "Parquet magic bytes not found",
    "ragged.csv": "Expected 2 fields in line 3, saw 3",
    "broken.jsonl": "JSON parse error",
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", CAUSES)
def test_what_is_wrong_with_a_file_is_said(name, streaming, tmp_path, gpt2_folder):
    (tmp_path / name).write_bytes(CAUSES[name])
    with pytest.raises(DataError, match=SAID[name]) as raised:
        data(tmp_path / name, gpt2_folder, streaming=streaming)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300 + len(str(tmp_path))


def test_a_reason_is_not_cut_within_a_word():
    with pytest.raises(DataError) as raised, loading("it", DataError):
        raise ValueError("expected one of:\n" + "resample-characters " * 20)
    assert str(raised.value).endswith("resample-characters ...")


KINDS = [TextData, LabelledTexts, TextPairs, PairedTexts, IndirectObjects, ImageData, PythonTexts, Digits]


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_line_shows_what_each_option_is(kind):
    parser = ArgumentParser()
    parser.add_class_arguments(kind, "data")
    shown = {action.dest: action.help for action in parser._actions if action.dest.startswith("data.")}
    assert {"data.batch_size", "data.cluster_column"} <= set(shown)
    made = issubclass(kind, MadeRows)
    assert {"data.streaming", "data.name", "data.shuffle_seed"}.isdisjoint(shown) == made
    for name, words in shown.items():
        if not name.endswith((".help", "+")):
            assert words and not words.startswith("%(") and ":class:" not in words, name
    if made:
        with pytest.raises(TypeError, match="streaming"):
            kind(streaming=True)


class Numbers(AblationDataModule):
    """A data module as a user would write one."""

    def __init__(self, count, **options):
        super().__init__("numbers", batch_size=2, **options)
        self.count = count

    def load(self, purpose):
        kept = [n for n in range(3 if purpose == "calibration" else self.count) if self.may_use(bytes([n]), purpose)]
        return Examples([{"number": torch.tensor(n)} for n in kept], [bytes([n]) for n in kept])


def test_a_data_module_of_ones_own_needs_load_alone():
    made = Numbers(5, evaluation=[Numbers(4)])
    made.setup("fit")
    calibrating, (own, other) = made.train_dataloader(), made.val_dataloader()
    seen = [[n for batch in loader for n in batch["number"].tolist()] for loader in (calibrating, own, other)]
    assert seen == [[0, 1, 2], [3, 4], [3]]
    assert made.describe()["evaluation_of_others"][0]["evaluation"]["examples"] == 1
    with pytest.raises(DataError, match="numbers has no evaluation examples"):
        Numbers(3).setup("fit")
