"""Texts with a class, and pairs of texts."""

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from lightning_ablate.data import LabelledTexts, TextPairs
from lightning_ablate.errors import DataError
from tests import tiny

KNOWN = ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"]


def test_a_missing_text_is_refused(tmp_path):
    for column in ("source", "target"):
        row = {"source": "the cat", "target": "the dog"} | {column: None}
        data = TextPairs("pairs", max_length=8)
        with pytest.raises(DataError, match=f"pairs holds None in '{column}', expected text"):
            data.example(row, tiny.tokenizer())


def labels(own, column, known=KNOWN, **options):
    """The class indices that examples get for a column of labels, of data with these classes and a target's."""
    features = Features(text=Value("string"), label=ClassLabel(names=own)) if own else None
    rows = [{"text": f"text {number}", "label": label} for number, label in enumerate(column)]
    data = LabelledTexts.of(
        Dataset.from_list(rows, features=features),
        **{"calibration_examples": 1, "evaluation_examples": len(rows) - 1, "shuffle_seed": None, "max_length": 32},
        **options,
    )
    module = type("Module", (), {"tokenizer": tiny.tokenizer(), "class_names": known})()
    data.trainer = type("Trainer", (), {"lightning_module": module})()
    data.setup("fit")
    examples = data.examples["calibration"][0], *(data.examples["evaluation"][i] for i in range(len(rows) - 1))
    return [int(one["label"]) for one in examples]


def test_labels_are_mapped_by_the_names_of_the_classes():
    assert labels(["entailment", "neutral", "contradiction"], [0, 1, 2]) == [2, 1, 0]
    assert labels(["Entailment", "Contradiction"], [0, 1]) == [2, 0]  # some of the target's
    assert labels(None, ["neutral", "Contradiction", "ENTAILMENT"]) == [1, 0, 2]
    for own, known in ((["0", "1", "2"], KNOWN), (["a", "b", "c"], None), (None, KNOWN), (None, None)):
        assert labels(own, [2, 1, 0], known) == [2, 1, 0]  # where either has no names
    for own in (["entailment", "neutral", "hypothesis"], ["neutral", "Neutral", "entailment"]):
        with pytest.warns(UserWarning, match="given names its classes .*, and the target CONTRADICTION, NEUTRAL"):
            assert labels(own, [2, 1, 0]) == [2, 1, 0]
    with pytest.warns(UserWarning, match="the names don't agree"):
        assert labels(["yes", "no"], [1, 0], ["Yes", "yes", "no"]) == [1, 0]  # which "yes"?
    assert labels(None, [True, False, True]) == [1, 0, 1]
    assert labels(None, [1.0, 0.0, 2.0]) == [1, 0, 2]
    for column, message in ((["neutral", "maybe"], "'maybe' in 'label', expected a class of the target's: CONTRA"),):
        with pytest.raises(DataError, match=message):
            labels(None, column)
    for column in (["neutral", "maybe"], [0.5, 1.0]):
        with pytest.raises(DataError, match="expected a class index"):
            labels(None, column, None)


def test_blank_texts_and_missing_labels_are_passed_over():
    rows = [{"text": text, "label": label} for text, label in (("a", 0), (None, 1), ("", 1), (" ", 1), ("b", None))]
    options = {"calibration_examples": 1, "evaluation_examples": 1, "max_length": 8, "shuffle_seed": None}
    data = LabelledTexts.of([*rows, {"text": "c", "label": 1}], **options)
    data.trainer = type("Trainer", (), {"lightning_module": type("M", (), {"tokenizer": tiny.tokenizer()})})
    data.setup("fit")
    assert [data.examples[purpose].contents for purpose in ("calibration", "evaluation")] == [
        [b"a\x000"],
        [b"c\x001"],
    ]
