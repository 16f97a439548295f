"""Text classifiers and encoder-decoders."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from lightning_ablate import AblationCallback, CausalLM, MaskedLM, Seq2SeqLM, SequenceClassifier, Site
from lightning_ablate.data import LabelledTexts, TextPairs
from lightning_ablate.errors import AblationError, ConfigError, TargetError
from lightning_ablate.statistics import Moments
from tests import reference, tiny


def classifier(name, **options):
    small = {**tiny.SMALL, "num_labels": 3}
    return tiny.made(0, f"{name}ForSequenceClassification", f"{name}Config", **(small | options))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("others")
    gpt2 = {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 4, "initializer_range": 0.4}
    roberta = {**tiny.WIDE, "max_position_embeddings": 66, "type_vocab_size": 1, "initializer_range": 0.4}
    tiny.save_language_model(folder / "roberta", classifier("Roberta", **roberta, pad_token_id=1), masked=True)
    tiny.save_language_model(folder / "gpt2", classifier("GPT2", **gpt2))
    for name in ("t5", "m2m"):
        tiny.save_language_model(folder / name, getattr(tiny, name)(), masked=True)
    labels = [i % 3 for i in range(len(tiny.TEXTS))]
    columns = {"text": tiny.TEXTS, "label": labels, "second": [text[: 8 + i % 9] for i, text in enumerate(tiny.TEXTS)]}
    Dataset.from_dict(columns).to_parquet(folder / "train.parquet")
    return folder


def texts(folder, **options):
    budgets = {"calibration_examples": 20, "evaluation_examples": 21, "max_length": 40, "batch_size": 8}
    return LabelledTexts(str(folder / "train.parquet"), **(budgets | options))  # whose only split is "train"


def pairs(folder, **options):
    budgets = {"calibration_examples": 10, "evaluation_examples": 11, "max_length": 40, "batch_size": 4}
    columns = {"source_column": "text", "target_column": "second", "evaluation_split": "train"}
    return TextPairs(str(folder / "train.parquet"), **(columns | budgets | options))


def fitted(tmp_path, module, data, methods=("zero", "mean"), **options):
    callback = AblationCallback(methods, [0.5, 1.0], [1], **options)
    tiny.trainer(tmp_path, callback).fit(module, datamodule=data)
    return callback


def one_by_one(loader):
    for batch in loader:
        for number, mask in enumerate(batch["attention_mask"].bool()):
            whole = {name: value[number, None] for name, value in batch.items()}
            yield whole | {name: whole[name][:, mask] for name in ("input_ids", "attention_mask")}


def translated(target, batch):
    """Summed cross-entropy, hits and number of the tokens of the second text of one example without padding."""
    labels = batch["labels"][batch["labels"] >= 0]
    fed = torch.tensor([[target.config.decoder_start_token_id, *labels[:-1]]])
    with torch.no_grad():
        logits = target(batch["input_ids"], decoder_input_ids=fed).logits[0]
    loss = F.cross_entropy(logits.double(), labels, reduction="sum").item()
    return np.array([loss, (logits.argmax(-1) == labels).sum(), len(labels)])


@pytest.mark.parametrize("name", ["roberta", "gpt2"])
def test_a_classifiers_baseline_equals_plain_pytorch(folder, tmp_path, name):
    module, data = SequenceClassifier(str(folder / name)), texts(folder)
    callback = fitted(tmp_path, module, data)
    loss, hits, n = reference.evaluation(module.target, one_by_one(data.val_dataloader()))
    base = callback.results.baseline
    assert base["n"] == n == 21 and base["top1"] == pytest.approx(hits) and callback.results.facts["classes"] == 3
    assert base["cross_entropy"] == pytest.approx(loss, abs=1e-5)
    assert len(callback.run.calibration.sites) == 2
    evaluated, calibrated = (set(data.examples[purpose].contents) for purpose in ("evaluation", "calibration"))
    assert len(evaluated) == 21 and len(calibrated) == 20 and not evaluated & calibrated
    assert data.describe()["evaluation"]["examples"] == 21


def test_a_classifier_resamples_and_generates_no_text(folder, tmp_path):
    callback = fitted(tmp_path, SequenceClassifier(str(folder / "roberta")), texts(folder), ["resample-ids"])
    assert len(callback.results.table) == 3
    with pytest.raises(ConfigError, match="an input of the kind 'generated', which SequenceClassifier doesn't make"):
        fitted(tmp_path, SequenceClassifier(str(folder / "roberta")), texts(folder), ["resample-generated"])


PATHS = {"t5": "decoder.block.{}.layer.1.EncDecAttention.o", "m2m": "model.decoder.layers.{}.encoder_attn.out_proj"}


@pytest.mark.parametrize("name", PATHS)
def test_an_encoder_decoder_equals_plain_pytorch_also_without_cross_attention(folder, tmp_path, name):
    module, data, paths = Seq2SeqLM(str(folder / name)), pairs(folder), [PATHS[name].format(layer) for layer in (0, 1)]
    callback = fitted(tmp_path, module, data, ["zero", "resample-characters"], sites="cross-attention")
    found = [(site.path, site.kind) for site in callback.run.calibration.sites]
    assert found == [(path, "cross-attention") for path in paths]
    for row, replace in ((0, {}), (2, dict.fromkeys(paths, torch.zeros_like))):
        with reference.plain_hooks(module.target, replace):
            loss, hits, n = sum(translated(module.target, batch) for batch in one_by_one(data.val_dataloader()))
        scores = callback.results.table.iloc[row]
        assert scores["n"] == n and scores["top1"] == pytest.approx(hits / n)
        assert scores["cross_entropy"] == pytest.approx(loss / n, abs=1e-5)


def test_an_encoder_decoders_statistics_take_each_site_at_its_own_positions(folder, tmp_path):
    module, data = Seq2SeqLM(str(folder / "t5")), pairs(folder)
    calibration = fitted(tmp_path, module, data).run.calibration
    loaded = list(data.train_dataloader())
    read = sum(int(batch["attention_mask"].sum()) for batch in loaded)
    predicted = sum(int((batch["labels"] >= 0).sum()) for batch in loaded)
    assert read != predicted
    seen = {site.name: int(calibration[site][Moments].count) for site in calibration.sites}
    assert {count for name, count in seen.items() if name.startswith("encoder")} == {read}
    assert {count for name, count in seen.items() if name.startswith("decoder")} == {predicted}
    # one mean by hand, of a site that sees the encoder from the decoder
    site = next(site for site in calibration.sites if site.name == PATHS["t5"].format(1))
    kept = []
    with reference.plain_hooks(module.target, {site.path: kept.append}):
        for batch in one_by_one(data.train_dataloader()):
            translated(module.target, batch)
    mean = torch.cat(kept, 1).double().mean((0, 1))
    torch.testing.assert_close(calibration[site][Moments].mean, mean, rtol=1e-5, atol=1e-7)


def test_keys_and_values_of_cross_attention_are_at_the_first_texts_positions(folder, tmp_path):
    module, data = Seq2SeqLM(str(folder / "t5")), pairs(folder)
    words = [
        "key",
        "value",
        "query",
        "decoder.block.1.layer.1.EncDecAttention.k",
        "*.1.layer.1.EncDecAttention.v:output",
    ]
    calibration = fitted(tmp_path, module, data, sites=words).run.calibration
    loaded = list(data.train_dataloader())
    read = sum(int(batch["attention_mask"].sum()) for batch in loaded)
    for site in calibration.sites:
        first = site.name.startswith("encoder") or (("EncDec" in site.name) and not site.name.endswith("query"))
        assert (int(calibration[site][Moments].count) == read) == first, site.name
    site = next(site for site in calibration.sites if site.name == "decoder.block.1.layer.1.EncDecAttention.k:key")
    kept = []
    with reference.plain_hooks(module.target, {f"{site.path}:output": kept.append}):
        for batch in one_by_one(data.train_dataloader()):
            translated(module.target, batch)
    mean = torch.cat(kept, 1).double().mean((0, 1))
    torch.testing.assert_close(calibration[site][Moments].mean, mean, rtol=1e-5, atol=1e-7)


def test_a_prefix_stands_before_each_text(folder):
    module, data = Seq2SeqLM(str(folder / "t5")), pairs(folder, prefix="The cat says ")
    fitted(folder, module, data)
    first = data.examples["calibration"][0]
    assert module.tokenizer.decode(first["input_ids"]).startswith("<s>The cat says The")
    assert bool((first["labels"] == -100).any())


def test_pairs_tell_a_bert_which_text_is_which(folder, tmp_path):
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"the cat dog of number is as every knows".split()]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)}, model_max_length=64)
    tokenizer.save_pretrained(tmp_path / "bert")
    classifier("Bert", vocab_size=len(words), intermediate_size=32).save_pretrained(tmp_path / "bert")
    module, data = SequenceClassifier(str(tmp_path / "bert")), texts(folder, second_text_column="second")
    base = fitted(tmp_path, module, data).results.baseline
    loss = 0.0
    with torch.no_grad():
        for content in data.examples["evaluation"].contents:
            first, second, label = content.decode().split("\0")
            inputs = tokenizer(first, second, return_tensors="pt")
            assert bool(inputs["token_type_ids"].any())
            loss += F.cross_entropy(module.target(**inputs).logits, torch.tensor([int(label)])).item()
    assert base["cross_entropy"] == pytest.approx(loss / 21, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluation_examples": 10**5}, "evaluation examples, expected 100,000; bring more"),
        ({"label_column": "second"}, "holds 'The .*' in 'second', expected a class index"),
        ({"text_column": "label"}, "holds 0|holds 1|holds 2"),
        ({"max_length": 3}, "max_length is 3, expected above 3"),
    ],
)
def test_rows_that_cannot_be_examples_are_refused(folder, tmp_path, options, message):
    with pytest.raises(AblationError, match=message):
        fitted(tmp_path, SequenceClassifier(str(folder / "roberta")), texts(folder, **options))


KNOWN = ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_a_targets_class_names_are_known_before_and_after_its_weights(folder, tmp_path):
    model = classifier("Roberta", **tiny.WIDE, id2label=dict(enumerate(KNOWN)))
    tiny.save_language_model(tmp_path / "named", model, masked=True)
    module = SequenceClassifier(str(tmp_path / "named"))
    assert module.class_names == tiny.built(module).class_names == KNOWN == SequenceClassifier.of(model).class_names
    assert SequenceClassifier(str(folder / "roberta")).class_names is None  # LABEL_0, LABEL_1, LABEL_2
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    adapted = get_peft_model(tiny.built(SequenceClassifier(str(tmp_path / "named"))).target, lora)
    adapted.save_pretrained(tmp_path / "adapter")
    tiny.tokenizer(masked=True).save_pretrained(tmp_path / "adapter")
    module = SequenceClassifier(str(tmp_path / "adapter"))
    assert module.class_names == tiny.built(module).class_names == KNOWN
    weights = load_file(file := tmp_path / "adapter" / "adapter_model.safetensors")
    save_file({name: weight for name, weight in weights.items() if "out_proj" not in name}, file)
    with pytest.raises(TargetError, match=r"lacks weights of .*: classifier\..*out_proj.bias, .*out_proj.weight; "):
        tiny.built(SequenceClassifier(str(tmp_path / "adapter")))


@pytest.mark.parametrize("name", ["Bart", "T5"])
def test_an_encoder_decoder_that_classifies_equals_plain_pytorch_and_both_halves_are_probed(name, tmp_path):
    special = {"pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0, "decoder_start_token_id": 2, "num_labels": 3}
    bart = {"vocab_size": 300, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32}
    bart |= {"decoder_ffn_dim": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "init_std": 0.4}
    t5 = {"vocab_size": 300, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    made = tiny.made(
        0, f"{name}ForSequenceClassification", f"{name}Config", **(bart if name == "Bart" else t5), **special
    )
    module = SequenceClassifier.of(made, tokenizer=tiny.tokenizer(masked=True))
    rows = [{"text": text, "label": number % 3} for number, text in enumerate(tiny.TEXTS)]
    data = LabelledTexts.of(rows, calibration_examples=8, evaluation_examples=11, max_length=40, batch_size=4)
    table = fitted(tmp_path, module, data, ["zero"]).results.table
    paths = [name for name, _ in made.named_modules() if name.endswith(("attn.out_proj", "Attention.o"))]
    assert len(paths) == 6
    for row, replace in ((0, {}), (2, dict.fromkeys(paths, torch.zeros_like))):
        loss, hits, n = reference.evaluation(made, one_by_one(data.val_dataloader()), replace)
        assert table["n"][row] == n and table["top1"][row] == pytest.approx(hits)
        assert table["cross_entropy"][row] == pytest.approx(loss, abs=1e-5)
    batch = next(iter(data.val_dataloader()))
    both = module.hidden(batch)
    assert len(both) == 2 and both[0].shape == both[1].shape == (4, 40, made.config.d_model)
    torch.testing.assert_close(both[0], made.get_encoder()(**module.inputs(batch)).last_hidden_state)


def test_weights_that_a_checkpoint_lacks_are_refused_by_name(folder, tmp_path):
    encoder = tiny.roberta().roberta
    tiny.save_language_model(tmp_path / "encoder", encoder, masked=True)
    lacking = tmp_path / "encoder"
    for module, named in ((MaskedLM, "lm_head"), (SequenceClassifier, "classifier.dense.bias")):
        with pytest.raises(TargetError, match=f"lacks weights of a Roberta.*: {named}.*choose the --model") as raised:
            tiny.built(module(str(lacking)))
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 300 + len(str(lacking))
    tiny.save_language_model(tmp_path / "wide", tiny.gpt2())
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    (tmp_path / "wide" / "config.json").write_text(json.dumps(config | {"n_inner": 99}))
    with pytest.raises(TargetError, match=r"in other sizes: transformer\.h\.0\.mlp\.c_fc\.bias, .* and 1 more"):
        tiny.built(CausalLM(str(tmp_path / "wide")))
    assert tiny.built(CausalLM("demo:gpt2")).target.lm_head is not None  # whose head is tied


def test_which_text_a_module_reads_is_found_beside_other_inputs():
    from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

    sizes = {"vocab_size": tiny.VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    parts = [BertConfig(**sizes, intermediate_size=16) for _ in range(2)]
    config = EncoderDecoderConfig.from_encoder_decoder_configs(*parts, decoder_start_token_id=1, pad_token_id=0)
    module = tiny.built(Seq2SeqLM.of(EncoderDecoderModel(config).eval(), tokenizer=tiny.tokenizer()))
    ids, labels = torch.randint(5, 200, (2, 9)), torch.randint(5, 200, (2, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    batch |= {"labels": labels, "index": torch.arange(2)}
    module.on_train_batch_start(batch, 0)
    attention = "decoder.bert.encoder.layer.0.crossattention.self"
    for name, length in (("key", 9), ("value", 9), ("query", 6)):
        assert module.valid_at(Site(f"{attention}.{name}:output", 16), batch).shape == (2, length)
