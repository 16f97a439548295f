from itertools import chain

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict
from torch.utils.data import DataLoader

from lightning_ablate.data import Examples, TextData
from lightning_ablate.data.examples import joined
from lightning_ablate.data.text import passages, special_frame
from lightning_ablate.errors import ConfigError, DataError, loading
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
    streams = [list(chain(*owners))] if packing == "pack" else owners
    cut = [stream[start : start + 16] for stream in streams for start in range(0, len(stream), 16)]
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


def wordlevel(words, template=None, normalizer=None):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<none>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        special = [(word, words.index(word)) for word in ("<s>", "</s>")]
        made.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    if normalizer:
        made.normalizer = normalizers.Replace(normalizer, "")
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="</s>", eos_token="</s>", model_max_length=64)


WORDS = ["<s>", "</s>", "b", "c", "a"]


def python_tokenizer(kind):
    import transformers

    return getattr(transformers, kind)()


FRAMES = {
    "gpt2": (lambda: tiny.tokenizer(), ([], [])),
    "roberta": (lambda: tiny.tokenizer(masked=True), ([0], [2])),
    "template": (lambda: wordlevel(WORDS, "<s> $A </s> </s>"), ([0], [1, 1])),
    "bos alone": (lambda: wordlevel(WORDS, "<s> <s> $A"), ([0, 0], [])),
    "no a": (lambda: wordlevel(WORDS[:4], "<s> $A </s>"), ([0], [1])),
    "a is stripped": (lambda: wordlevel(WORDS, "<s> $A </s>", "a"), ([0], [1])),
    "a is a special token": (lambda: wordlevel(["a", "</s>", "<s>", "b", "c"], "</s> <s> $A </s>"), ([1, 2], [1])),
    "t5": (lambda: python_tokenizer("T5Tokenizer"), ([], [1])),
    "llama": (lambda: python_tokenizer("LlamaTokenizer"), ([], [])),
    "byt5, in Python": (lambda: python_tokenizer("ByT5Tokenizer"), ([], [1])),
    "canine, in Python": (lambda: python_tokenizer("CanineTokenizer"), ([57344], [57345])),
}


@pytest.mark.parametrize("name", FRAMES)
def test_special_tokens_stand_where_the_tokenizer_puts_them(name):
    make, expected = FRAMES[name]
    tokenizer = make()
    assert special_frame(tokenizer) == expected
    before, after = expected
    for text in ("b c b", "c"):
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer(text)["input_ids"] == [*before, *plain, *after]


def test_a_tokenizer_that_does_otherwise_than_it_says_is_refused():
    class Other(type(wordlevel(WORDS))):
        def __call__(self, text, **options):
            found = super().__call__(text, **options)
            found["input_ids"] = [3, *found["input_ids"]] if options.get("add_special_tokens", True) else [4]
            return found

    other = Other(tokenizer_object=wordlevel(WORDS).backend_tokenizer)
    for tokenizer in (other, wordlevel(WORDS, "<s> $A </s> $A")):
        with pytest.raises(DataError, match=r"bring another \(--data.tokenizer\)"):
            special_frame(tokenizer)


def test_a_length_above_the_tokenizers_is_lowered(parquet, gpt2_folder):
    made = data(parquet, gpt2_folder, max_length=1024)
    assert made.max_length == 64 == made.describe()["max_length"]
    assert rows(made, "evaluation") == rows(data(parquet, gpt2_folder, max_length=64), "evaluation")


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


def data_of(given, tokenizer, **options):
    budgets = {"max_length": 16, "calibration_tokens": 100, "evaluation_tokens": 200}
    made = TextData.of(given, tokenizer=tokenizer, **(budgets | options))
    made.setup("fit")
    return made


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
