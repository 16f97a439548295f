"""Text classifiers and encoder-decoders."""

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F

from lightning_ablate import AblationCallback, Seq2SeqLM, SequenceClassifier
from lightning_ablate.data import LabelledTexts, TextPairs
from lightning_ablate.errors import ConfigError, DataError
from lightning_ablate.statistics import Moments
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import GPT2Config, GPT2ForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

    folder = tmp_path_factory.mktemp("others")
    torch.manual_seed(0)
    small = {"vocab_size": tiny.VOCABULARY, "num_labels": 3, "initializer_range": 0.4}
    options = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    roberta = RobertaConfig(**small, **options, max_position_embeddings=66, type_vocab_size=1, pad_token_id=1)
    tiny.save_language_model(folder / "roberta", RobertaForSequenceClassification(roberta), masked=True)
    gpt2 = GPT2Config(**small, n_positions=64, n_embd=16, n_layer=2, n_head=4)
    tiny.save_language_model(folder / "gpt2", GPT2ForSequenceClassification(gpt2))
    tiny.save_language_model(folder / "t5", tiny.t5(), masked=True)
    m2m = tiny.m2m()
    assert not hasattr(m2m, "prepare_decoder_input_ids_from_labels")
    tiny.save_language_model(folder / "m2m", m2m, masked=True)
    labels = [i % 3 for i in range(len(tiny.TEXTS))]
    columns = {"text": tiny.TEXTS, "label": labels, "second": [text[: 8 + i % 9] for i, text in enumerate(tiny.TEXTS)]}
    Dataset.from_dict(columns).to_parquet(folder / "train.parquet")
    return folder


def texts(folder, **options):
    budgets = {"calibration_examples": 20, "evaluation_examples": 21, "length": 40, "batch_size": 8}
    return LabelledTexts(str(folder / "train.parquet"), evaluation_split="train", **(budgets | options))


def pairs(folder, **options):
    budgets = {"calibration_examples": 10, "evaluation_examples": 11, "length": 40, "batch_size": 4}
    columns = {"source_column": "text", "target_column": "second", "evaluation_split": "train"}
    return TextPairs(str(folder / "train.parquet"), **(columns | budgets | options))


def fitted(tmp_path, module, data, methods=("zero", "mean"), **options):
    callback = AblationCallback(methods, [0.5, 1.0], [1], **options)
    tiny.trainer(tmp_path, callback).fit(module, datamodule=data)
    return callback.results


def batches(data, purpose):
    return list(data.train_dataloader() if purpose == "calibration" else data.val_dataloader())


@pytest.mark.parametrize("name", ["roberta", "gpt2"])
def test_a_classifiers_baseline_equals_plain_pytorch(folder, tmp_path, name):
    module, data = SequenceClassifier(str(folder / name)), texts(folder)
    results = fitted(tmp_path, module, data)
    loss, hits = 0.0, 0
    with torch.no_grad():
        for batch in batches(data, "evaluation"):
            for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["label"], strict=True):
                logits = module.target(ids[mask.bool()].unsqueeze(0)).logits  # one at a time: no padding
                loss += F.cross_entropy(logits, label.unsqueeze(0)).item()
                hits += int(logits.argmax() == label)
    base = results.baseline
    assert base.n == 21 and base.top1 == pytest.approx(hits / 21) and results.classes == 3
    assert base.cross_entropy == pytest.approx(loss / 21, abs=1e-5)
    assert len(module.calibration.sites) == 2


def test_a_classifier_resamples_and_generates_no_text(folder, tmp_path):
    results = fitted(tmp_path, SequenceClassifier(str(folder / "roberta")), texts(folder), ["resample-ids"])
    assert len(results.rows) == 3
    with pytest.raises(ConfigError, match="resample-generated needs a text .* which a SequenceClassifier doesn't"):
        fitted(tmp_path, SequenceClassifier(str(folder / "roberta")), texts(folder), ["resample-generated"])


def test_pairs_of_texts_are_classified_together(folder):
    module, data = SequenceClassifier(str(folder / "roberta")), texts(folder, second_text_column="second", length=60)
    tiny.trainer(folder, AblationCallback(["zero"], [1.0], [1])).fit(module, datamodule=data)
    first = data.examples["calibration"][0]
    ids = first["input_ids"][first["attention_mask"].bool()].tolist()
    end = module.tokenizer.eos_token_id
    assert ids.count(end) == 3  # <s> one </s></s> another </s>


@pytest.mark.parametrize("name", ["t5", "m2m"])
def test_an_encoder_decoders_baseline_equals_plain_pytorch(folder, tmp_path, name):
    module, data = Seq2SeqLM(str(folder / name)), pairs(folder)
    results = fitted(tmp_path, module, data)
    loss, n, hits = 0.0, 0, 0
    start = module.target.config.decoder_start_token_id
    with torch.no_grad():
        for batch in batches(data, "evaluation"):
            for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
                labels = labels[labels >= 0]
                fed = torch.cat([torch.tensor([start]), labels[:-1]]).unsqueeze(0)
                logits = module.target(ids[mask.bool()].unsqueeze(0), decoder_input_ids=fed).logits[0]
                loss += F.cross_entropy(logits, labels, reduction="sum").item()
                hits += int((logits.argmax(-1) == labels).sum())
                n += len(labels)
    base = results.baseline
    assert base.n == n and base.top1 == pytest.approx(hits / n)
    assert base.cross_entropy == pytest.approx(loss / n, abs=1e-5)


def test_an_encoder_decoders_statistics_take_each_site_at_its_own_positions(folder, tmp_path):
    module, data = Seq2SeqLM(str(folder / "t5")), pairs(folder)
    fitted(tmp_path, module, data)
    read = sum(int(batch["attention_mask"].sum()) for batch in batches(data, "calibration"))
    predicted = sum(int((batch["labels"] >= 0).sum()) for batch in batches(data, "calibration"))
    assert read != predicted
    seen = {site.name: int(module.calibration[site][Moments].count) for site in module.calibration.sites}
    assert {count for name, count in seen.items() if name.startswith("encoder")} == {read}
    assert {count for name, count in seen.items() if name.startswith("decoder")} == {predicted}
    # one mean by hand, of a site that sees the encoder from the decoder
    name = "decoder.block.1.layer.1.EncDecAttention.o"
    total = 0.0
    handle = module.target.get_submodule(name).register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    with torch.no_grad():
        for batch in batches(data, "calibration"):
            kept = []
            module.target(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
            total = total + kept[0][batch["labels"] >= 0].double().sum(0)
    handle.remove()
    site = next(site for site in module.calibration.sites if site.name == name)
    torch.testing.assert_close(module.calibration[site][Moments].mean, total / predicted, rtol=1e-6, atol=1e-9)


def test_an_encoder_decoder_ablates_cross_attention_alone_and_resamples(folder, tmp_path):
    module, data = Seq2SeqLM(str(folder / "t5")), pairs(folder)
    results = fitted(tmp_path, module, data, ["zero", "resample-characters"], sites="cross-attention")
    assert [site.kind for site in module.calibration.sites] == ["cross-attention"] * 2
    with torch.no_grad():
        for block in module.target.decoder.block:
            torch.nn.init.zeros_(block.layer[1].EncDecAttention.o.weight)
        losses, n = 0.0, 0
        for batch in batches(data, "evaluation"):
            output = module.target(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
            losses += output.loss.item() * int((batch["labels"] >= 0).sum())
            n += int((batch["labels"] >= 0).sum())
    whole = next(row for row in results.rows if row.method == "zero" and row.fraction == 1.0)
    assert whole.cross_entropy == pytest.approx(losses / n, abs=1e-5)


def test_a_prefix_stands_before_each_text(folder):
    module, data = Seq2SeqLM(str(folder / "t5")), pairs(folder, prefix="The cat says ")
    tiny.trainer(folder, AblationCallback(["zero"], [1.0], [1])).fit(module, datamodule=data)
    first = data.examples["calibration"][0]
    assert module.tokenizer.decode(first["input_ids"]).startswith("<s>The cat says The")
    assert bool((first["labels"] == -100).any())


def test_every_row_calibrates_or_is_evaluated_once(folder):
    data = texts(folder)
    module = SequenceClassifier(str(folder / "roberta"))
    tiny.trainer(folder, AblationCallback(["zero"], [1.0], [1])).fit(module, datamodule=data)
    contents = {purpose: set(data.examples[purpose].contents) for purpose in ("calibration", "evaluation")}
    assert len(contents["calibration"]) == 20 and len(contents["evaluation"]) == 21
    assert not contents["calibration"] & contents["evaluation"]
    assert data.describe()["evaluation_examples"] == 21


def test_pairs_tell_a_bert_which_text_is_which(folder, tmp_path):
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"the cat dog of number is as every knows".split()]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)}, model_max_length=64)
    config = BertConfig(
        vocab_size=len(words),
        num_labels=3,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
    )
    tokenizer.save_pretrained(tmp_path / "bert")
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    module, data = SequenceClassifier(str(tmp_path / "bert")), texts(folder, second_text_column="second")
    base = fitted(tmp_path, module, data).baseline
    loss = 0.0
    with torch.no_grad():
        for index in range(21):
            first, second, label = (
                data.examples["evaluation"].contents[index].decode().split("\0")[i] for i in (0, 1, 2)
            )
            inputs = module.tokenizer(first, second, return_tensors="pt")
            assert bool(inputs["token_type_ids"].any())
            loss += F.cross_entropy(module.target(**inputs).logits, torch.tensor([int(label)])).item()
    assert base.cross_entropy == pytest.approx(loss / 21, abs=1e-5)


def test_a_missing_text_is_refused(tmp_path):
    for column in ("source", "target"):
        row = {"source": "the cat", "target": "the dog"} | {column: None}
        data = TextPairs("pairs", length=8)
        with pytest.raises(DataError, match=f"pairs holds None in '{column}', expected text"):
            data.example(row, tiny.tokenizer())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluation_examples": 10**5}, "evaluation examples, expected 100,000; bring more"),
        ({"calibration_examples": 0}, "calibration_examples is 0, expected at least 1"),
        ({"text_column": "body"}, "has no column 'body', it has label, second, text"),
        ({"label_column": "second"}, "holds 'The .*' in 'second', expected a class index"),
        ({"text_column": "label"}, "holds 0|holds 1|holds 2"),
        ({"length": 65}, "length is 65, expected above 3 and at most 64"),
    ],
)
def test_rows_that_cannot_be_examples_are_refused(folder, tmp_path, options, message):
    from lightning_ablate.errors import AblationError

    with pytest.raises(AblationError, match=message):
        fitted(tmp_path, SequenceClassifier(str(folder / "roberta")), texts(folder, **options))
