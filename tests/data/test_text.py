"""Texts cut into sequences."""

from itertools import chain

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from lightning_ablate.data import Examples, TextData
from lightning_ablate.data.examples import joined
from lightning_ablate.data.text import _padded, passages
from lightning_ablate.errors import ConfigError, DataError
from tests import tiny
from tests.data.texts import data, data_of, rows


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
    texts = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in tiny.TEXTS]
    expected, stream = [], []
    for text in texts:
        stream += text
        if len(stream) >= 16:
            expected += [stream[start : start + 16] for start in range(0, len(stream) - 15, 16)]
            stream = []
    assert first == expected[: len(first)] and all(sequence in expected[len(first) :] for sequence in second)


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


def clusters(texts, tokenizer, **options):
    made = TextData.of(texts, tokenizer=tokenizer, **{"max_length": 16, "calibration_tokens": 1, **options})
    made.setup("fit")
    return made


@pytest.mark.parametrize("packing", ["pad", "pack"])
def test_sequences_of_one_document_are_a_cluster_and_so_are_those_that_packing_joins(gpt2_folder, packing):
    lengths = [16, 5, 9, 31, 15, 15, 1, 2, 10, 33, 4, 30]
    texts = [chr(ord("A") + number) * length for number, length in enumerate(lengths)]
    made, tokenizer = clusters(texts, gpt2_folder, packing=packing, evaluation_tokens=110), tiny.tokenizer()
    tokens = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] * (packing == "pack") for text in texts]
    owners = [[number] * len(ids) for number, ids in enumerate(tokens)][1:]  # the first document calibrates
    streams = [[]]
    for one in owners:  # a packed stream ends with the document that fills a sequence
        streams[-1] += one
        streams += [[]] if packing == "pad" or len(streams[-1]) >= 16 else []
    ends = [len(stream) - len(stream) % 16 if packing == "pack" else len(stream) for stream in streams]
    cut = [s[start : min(start + 16, end)] for s, end in zip(streams, ends, strict=True) for start in range(0, end, 16)]
    held = [set(one) for one in cut if len(one) > 1][: len(rows(made, "evaluation"))]
    assert (max(map(len, held)) > 1) == (packing == "pack") and len(held) == len(made.examples["evaluation"]) > 6
    groups = []  # by hand: sets that overlap are joined until none do
    for one in map(set, held):
        apart = [group for group in groups if not group & one]
        groups = [*apart, one.union(*(group for group in groups if group & one))]
    expected = [next(i for i, group in enumerate(groups) if one & group) for one in held]
    order = {group: number for number, group in enumerate(dict.fromkeys(expected))}
    assert made.examples["evaluation"].clusters == [order[group] for group in expected]
    assert made.describe()["evaluation"]["clusters"] == len(order) > 1


def test_documents_of_one_author_are_a_cluster_and_others_each_their_own(gpt2_folder):
    authors = {"A": 7, "B": 8, "C": 7, "D": None, "E": None, "F": 8}
    texts = [{"text": f"{letter} one", "author": author} for letter, author in authors.items()]
    lengths = [len(tiny.tokenizer()(row["text"])["input_ids"]) for row in texts[1:]]
    made = clusters(texts, gpt2_folder, evaluation_tokens=sum(lengths), cluster_column="author")
    shown = [tiny.tokenizer().decode(sequence)[0] for sequence in rows(made, "evaluation")]
    assert shown == ["B", "C", "D", "E", "F"] and made.examples["evaluation"].clusters == [0, 1, 2, 3, 0]
    with pytest.raises(DataError, match="no column 'writer', it has author, text"):
        clusters(texts, gpt2_folder, cluster_column="writer")


def test_joined_examples_share_documents_also_through_others():
    assert joined([["a"], ["b"], ["c", "d"], ["a"], ["d", "b"], ["e"]]) == [0, 1, 1, 0, 1, 2]
    assert Examples([1, 2], [b"", b""]).clusters == [0, 1]


def test_a_length_above_the_tokenizers_is_lowered(parquet, gpt2_folder):
    made = data(parquet, gpt2_folder, max_length=1024)
    assert made.max_length == 64 == made.describe()["max_length"]
    assert rows(made, "evaluation") == rows(data(parquet, gpt2_folder, max_length=64), "evaluation")


def test_a_single_document_is_cut_at_blank_lines_and_serves_both(gpt2_folder):
    paragraphs = [f"Paragraph {n} is about number {n * n}. " * 8 for n in range(120)]
    text = "\n\n".join(paragraphs)
    cut = passages(text)
    assert "".join(cut) == text and 20 < len(cut) <= 100
    assert all(one.endswith("\n\n") for one in cut[:-1]) and max(map(len, cut)) < 2 * len(text) / len(cut)
    made = data_of([text], gpt2_folder, calibration_tokens=500, evaluation_tokens=1500)
    shown = [tiny.tokenizer().decode(list(chain(*rows(made, p)))) for p in ("calibration", "evaluation")]
    assert text.startswith(shown[0]) and text[len(shown[0]) :].find(shown[1]) >= 0
    assert len(set(made.examples["evaluation"].clusters)) > 1
    # other budgets evaluate nothing that calibrated
    later = TextData.of([text], tokenizer=gpt2_folder, max_length=16, calibration_tokens=900, evaluation_tokens=3000)
    later.setup("validate")
    later.load_state_dict(made.state_dict())
    later.val_dataloader()
    assert rows(later, "evaluation")[: len(rows(made, "evaluation"))] == rows(made, "evaluation")
    for one in ("no blank line " * 500, "x" * 5000, "a\nb"):
        assert "".join(passages(one)) == one


def test_a_long_document_is_tokens_in_a_row(gpt2_folder):
    texts = [" ".join(map(str, range(20_000))), *tiny.TEXTS]
    made, tokenizer = data_of(texts, gpt2_folder, calibration_tokens=40_000, max_length=64), tiny.tokenizer()
    ids = tokenizer(texts[0], verbose=False)["input_ids"]
    assert list(chain(*rows(made, "calibration"))) == ids[: sum(map(len, rows(made, "calibration")))]


def test_workers_that_are_started_anew_give_the_same_sequences(parquet, gpt2_folder):
    examples = data(parquet, gpt2_folder).examples["evaluation"]
    loaded = DataLoader(examples, batch_size=len(examples), num_workers=1, multiprocessing_context="spawn")
    (batch,) = loaded
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(batch[name], torch.stack([examples[i][name] for i in range(len(examples))]))


def test_a_text_without_tokens_is_all_padding():
    made = _padded(7, 3, {"input_ids": [], "attention_mask": [], "span": [True], "label": 1})
    assert {name: value.tolist() for name, value in made.items()} == {
        "input_ids": [7, 7, 7],
        "attention_mask": [0, 0, 0],
        "span": [True, False, False],
        "label": 1,
    }
    assert made["span"].dtype == torch.bool and made["input_ids"].dtype == torch.int64
