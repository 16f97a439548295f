from itertools import chain

import pytest
import torch
from datasets import Dataset

from lightning_ablate.data import TextData
from lightning_ablate.errors import ConfigError, DataError
from tests import tiny


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "texts.parquet"
    Dataset.from_dict({"text": tiny.TEXTS}).to_parquet(path)
    return str(path)


def data(name, tokenizer, purpose="fit", **options):
    defaults = {"max_length": 16, "calibration_tokens": 100, "evaluation_tokens": 200, "batch_size": 4}
    made = TextData(str(name), tokenizer=tokenizer, **(defaults | options))
    made.setup(purpose)
    return made


def rows(made, purpose):
    examples = [made.examples[purpose][i] for i in range(len(made.examples[purpose]))]
    return [one["input_ids"][one["attention_mask"].bool()].tolist() for one in examples]


def test_sequences_hold_the_documents_tokens_calibration_first(parquet, gpt2_folder):
    made, tokenizer = data(parquet, gpt2_folder), tiny.tokenizer()
    tokens = [tokenizer(text)["input_ids"] for text in tiny.TEXTS]
    documents = [[ids[start : start + 16] for start in range(0, len(ids), 16)] for ids in tokens]
    calibrated, evaluated = rows(made, "calibration"), rows(made, "evaluation")
    begun = next(n for n in range(len(tiny.TEXTS)) if sum(map(len, documents[:n])) >= len(calibrated))
    # evaluation begins with the next document
    for used, following, budget in ((calibrated, documents, 100), (evaluated, documents[begun:], 200)):
        assert used == [ids for document in following for ids in document if len(ids) > 1][: len(used)]
        assert budget <= sum(map(len, used)) < budget + 16


def test_padding_is_masked(parquet, gpt2_folder):
    made = data(parquet, gpt2_folder)
    batch = next(iter(made.val_dataloader()))
    lengths = [len(ids) for ids in rows(made, "evaluation")[:4]]
    assert batch["attention_mask"].sum(1).tolist() == lengths and min(lengths) < 16
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    assert batch["index"].tolist() == [0, 1, 2, 3]


def test_special_tokens_frame_every_sequence(parquet, roberta_folder):
    tokenizer = tiny.tokenizer(masked=True)
    for packing in ("pad", "pack"):
        for sequence in rows(data(parquet, roberta_folder, packing=packing), "evaluation"):
            assert sequence[0] == tokenizer.bos_token_id and sequence[-1] == tokenizer.eos_token_id
            assert len(sequence) <= 16


def test_packing_fills_every_sequence_and_joins_with_the_end_token(parquet, gpt2_folder):
    made, tokenizer = data(parquet, gpt2_folder, packing="pack"), tiny.tokenizer()
    first, second = (rows(made, purpose) for purpose in ("calibration", "evaluation"))
    assert {len(sequence) for sequence in second} == {16}
    stream = [i for text in tiny.TEXTS for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    calibrated, evaluated = ([*chain.from_iterable(sequences)] for sequences in (first, second))
    assert calibrated == stream[: len(calibrated)]
    starts = range(len(calibrated), len(stream))
    assert any(stream[start : start + len(evaluated)] == evaluated for start in starts)


def test_no_text_is_used_for_both(tmp_path, gpt2_folder):
    Dataset.from_dict({"text": tiny.TEXTS + tiny.TEXTS}).to_parquet(tmp_path / "twice.parquet")
    made = data(tmp_path / "twice.parquet", gpt2_folder, evaluation_tokens=800, calibration_tokens=400, max_length=64)
    evaluated, calibrated = ([tuple(ids) for ids in rows(made, purpose)] for purpose in ("evaluation", "calibration"))
    assert max(map(len, evaluated)) < 64  # so a sequence is a whole text
    assert calibrated and not set(evaluated) & set(calibrated)


def test_validate_with_other_options_never_evaluates_what_calibrated(parquet, gpt2_folder):
    fitted = data(parquet, gpt2_folder, max_length=64)
    calibrated = {tuple(ids) for ids in rows(fitted, "calibration")}
    for options in ({}, {"shuffle_seed": 3}):
        later = data(parquet, gpt2_folder, purpose="validate", max_length=64, evaluation_tokens=1500, **options)
        later.load_state_dict(fitted.state_dict())  # as Lightning does, from the checkpoint, after setup
        later.val_dataloader()
        assert not calibrated & {tuple(ids) for ids in rows(later, "evaluation")}
    # without a checkpoint, the same options give the same evaluation data as `fit`
    alone = data(parquet, gpt2_folder, purpose="validate", max_length=64)
    alone.val_dataloader()
    assert rows(alone, "evaluation") == rows(fitted, "evaluation")


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


def test_shuffle_depends_on_its_seed_alone_and_describe_says_budgets_and_fingerprint(parquet, gpt2_folder):
    first, again, other = (data(parquet, gpt2_folder, shuffle_seed=seed) for seed in (1, 1, 2))
    assert rows(first, "evaluation") == rows(again, "evaluation") != rows(other, "evaluation")
    facts, same, different = (made.describe() for made in (first, again, other))
    first.shuffle_seed = 2
    first.setup("fit")  # reads anew
    assert rows(first, "evaluation") == rows(other, "evaluation")
    assert facts["evaluation_tokens"]["asked"] == 200 <= facts["evaluation_tokens"]["reached"] < 216
    assert facts["evaluation"]["sha256"] == same["evaluation"]["sha256"] != different["evaluation"]["sha256"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"evaluation_tokens": 10**6}, DataError, "evaluation tokens, expected 1,000,000; bring more"),
        ({"calibration_tokens": 10**6}, DataError, "calibration tokens, expected 1,000,000; bring more"),
        ({"text_column": "body"}, DataError, "no column 'body', it has text"),
        ({"max_length": 1}, ConfigError, "max_length is 1"),
        ({"evaluation_tokens": 0}, ConfigError, "evaluation_tokens is 0"),
        ({"batch_size": 0}, ConfigError, "batch_size is 0"),
        ({"evaluation_split": "test"}, DataError, "could not load"),
    ],
)
def test_what_does_not_fit_is_refused(parquet, gpt2_folder, options, error, message):
    with pytest.raises(error, match=message):
        data(parquet, gpt2_folder, **options)


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
