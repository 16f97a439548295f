import json
import shutil

import pytest
import torch

from lightning_ablate import CausalLM, MaskedLM
from lightning_ablate.errors import ConfigError, DataError, TargetError
from tests import reference, tiny


@pytest.fixture
def causal(gpt2_folder):
    return tiny.built(CausalLM(gpt2_folder))


@pytest.fixture
def masked(roberta_folder):
    return tiny.built(MaskedLM(roberta_folder))


def test_target_is_loaded_frozen_and_in_eval_mode_whatever_is_asked(causal):
    assert not any(parameter.requires_grad for parameter in causal.target.parameters())
    causal.train()
    assert causal.training and not any(module.training for module in causal.target.modules())
    own, target = tiny.gpt2().state_dict(), causal.target
    assert all(torch.equal(value, own[name]) for name, value in target.state_dict().items())
    causal.configure_model()
    assert causal.target is target


def test_options_reach_the_model(gpt2_folder):
    module = tiny.built(CausalLM(gpt2_folder, dtype="bfloat16", attn_implementation="eager"))
    assert next(module.target.parameters()).dtype == torch.bfloat16
    facts = module.describe()
    assert (facts["dtype"], facts["attn_implementation"], facts["name"]) == ("bfloat16", "eager", gpt2_folder)


def test_causal_scores_every_position_with_a_next_token_and_leaves_out_padding_and_filling_examples(causal):
    batch = tiny.tokens()
    batch["index"] = torch.tensor([4, -1, 6])  # the second example only fills the batch
    assert causal.valid(batch).sum(1).tolist() == [14, 0, 16]
    scored = causal.evaluate(batch)
    counted = scored.example >= 0
    # by hand: example 0 has 14 tokens and so 13 targets, example 2 has 16 and 15
    assert scored.example[counted].tolist() == [4] * 13 + [6] * 15
    with torch.no_grad():
        logits, targets = reference.scored(causal.target, {name: value[[0, 2]] for name, value in batch.items()})
    assert torch.equal(scored.targets[counted], targets)
    torch.testing.assert_close(scored.logits[counted], logits)


def test_masking_depends_on_seed_and_example_alone(masked):
    batch = tiny.tokens(3)
    whole = masked.on_before_batch_transfer(batch, 0)
    for row in (2, 0, 1):
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        again = masked.on_before_batch_transfer(alone, 0)
        assert torch.equal(again["input_ids"][0], whole["input_ids"][row])
        assert torch.equal(again["labels"][0], whole["labels"][row])
    assert "labels" not in batch
    masked.mask_seed = 1
    assert not torch.equal(masked.on_before_batch_transfer(batch, 0)["labels"], whole["labels"])


def test_masking_follows_the_protocol(roberta_folder):
    module = tiny.built(MaskedLM(roberta_folder, mlm_probability=0.15))
    tokenizer, examples, length = module.tokenizer, 400, 60
    ids = torch.randint(5, len(tokenizer), (examples, length))
    ids[:, 0], ids[:, -1] = tokenizer.bos_token_id, tokenizer.eos_token_id
    attention = torch.ones_like(ids)
    attention[:, 50:] = 0
    batch = {"input_ids": ids, "attention_mask": attention, "index": torch.arange(examples)}
    made = module.on_before_batch_transfer(batch, 0)
    chosen = made["labels"] != -100
    assert chosen.sum(1).tolist() == [round(0.15 * 49)] * examples  # 49 ordinary tokens before the padding
    assert not bool(chosen[:, 0].any()) and not bool(chosen[:, 50:].any())
    assert torch.equal(made["labels"][chosen], ids[chosen])
    assert torch.equal(made["input_ids"][~chosen], ids[~chosen])
    inputs, count = made["input_ids"][chosen], int(chosen.sum())
    share_masked = (inputs == tokenizer.mask_token_id).sum().item() / count
    share_kept = (inputs == ids[chosen]).sum().item() / count
    # 2,800 draws: three standard errors are 2.3 and 1.7 points
    assert share_masked == pytest.approx(0.8, abs=0.023) and share_kept == pytest.approx(0.1, abs=0.017)
    assert not bool(torch.isin(inputs, torch.tensor([0, 1, 2, 3])).any())


def test_masking_chooses_at_least_one_and_keeps_given_labels(masked):
    ids = torch.tensor([[0, 9, 2]])
    short = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "index": torch.arange(1)}
    assert (masked.on_before_batch_transfer(short, 0)["labels"] != -100).tolist() == [[False, True, False]]
    given = {**short, "labels": torch.tensor([[-100, 9, -100]])}
    kept = masked.on_before_batch_transfer(given, 0)
    assert kept.pop("chosen").tolist() == [[1]] and all(kept[name] is given[name] for name in given)


def test_masked_scores_the_chosen_positions(masked):
    batch = masked.on_before_batch_transfer(tiny.tokens(), 0)
    scored = masked.evaluate(batch)
    counts = scored.example >= 0
    assert scored.example[counts].tolist() == (batch["labels"] != -100).nonzero()[:, 0].tolist()
    with torch.no_grad():
        logits, targets = reference.scored(masked.target, batch)
    assert torch.equal(scored.targets[counts], targets)
    torch.testing.assert_close(scored.logits[counts], logits)
    # without what was made for the GPU, as for a source
    again = masked.evaluate({name: value for name, value in batch.items() if name != "chosen"})
    assert all(torch.equal(one, other) for one, other in zip(scored[:3], again[:3], strict=True))


@pytest.mark.parametrize("kind", ["characters", "ids", "generated"])
@pytest.mark.parametrize("which", ["causal", "masked"])
def test_source_is_as_long_as_the_batch_and_fixed_by_the_seed(which, kind, request):
    module = request.getfixturevalue(which)
    batch = tiny.tokens()
    state = torch.random.get_rng_state()
    made = module.source(kind, 42, batch)
    assert torch.equal(state, torch.random.get_rng_state())
    assert made["input_ids"].shape == (1, tiny.LENGTH) and bool(made["attention_mask"].all())
    again = tiny.built(type(module)(module.name))
    assert torch.equal(again.source(kind, 42, batch)["input_ids"], made["input_ids"])
    assert not torch.equal(module.source(kind, 123, batch)["input_ids"], made["input_ids"])
    assert module.evaluate(made).logits.shape[-1] == tiny.VOCABULARY
    text = module.tokenizer.decode(made["input_ids"][0], skip_special_tokens=True)
    assert kind != "characters" or (len(set(text)) > 10 and text.isascii() and text.isprintable())
    ordinary = made["input_ids"][0] if which == "causal" else made["input_ids"][0, 1:-1]
    special = torch.tensor(module.tokenizer.all_special_ids)
    assert int(torch.isin(ordinary, special).sum()) <= (kind == "generated" and which == "causal") * tiny.LENGTH


@pytest.mark.parametrize("name", ["some/typo", "demo:bert", "./nowhere"])
def test_a_name_that_does_not_load_is_one_error(name):
    with pytest.raises(TargetError, match=name.split(":")[0]):
        CausalLM(name).configure_model()


def test_remote_code_is_not_run(tmp_path, gpt2_folder):
    folder = tmp_path / "remote"
    shutil.copytree(gpt2_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "made-up", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(TargetError, match="could not load"):
        CausalLM(str(folder)).configure_model()
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_without_a_mask_is_refused(gpt2_folder):
    with pytest.raises(ConfigError, match="has no mask token; a causal model is a CausalLM"):
        tiny.built(MaskedLM.of(tiny.roberta(), tokenizer=CausalLM(gpt2_folder).tokenizer)).on_before_batch_transfer(
            tiny.tokens(), 0
        )


@pytest.mark.parametrize("make", [tiny.gpt2, tiny.roberta, tiny.opt, tiny.distilbert])
def test_text_that_is_too_long_or_of_another_vocabulary_is_refused(make, gpt2_folder, roberta_folder):
    kind, folder = (CausalLM, gpt2_folder) if make in (tiny.gpt2, tiny.opt) else (MaskedLM, roberta_folder)
    module = kind(folder)
    module.target = make()
    fits = tiny.tokens(length=64)
    module.on_validation_batch_start(fits, 0)
    with pytest.raises(DataError, match="sequences have 66 tokens, expected at most 64, which the target has pos"):
        module.on_train_batch_start(tiny.tokens(length=66), 0)
    fits["input_ids"][1, 3] = tiny.VOCABULARY
    with pytest.raises(DataError, match="token id 300, expected ids below 300"):
        module.on_before_batch_transfer(fits, 0)


@pytest.mark.parametrize("kind, make, expected", [(CausalLM, tiny.roberta, MaskedLM), (MaskedLM, tiny.gpt2, CausalLM)])
def test_a_target_of_the_other_kind_is_refused(kind, make, expected, roberta_folder):
    module = tiny.built(kind.of(make(), name="tiny", tokenizer=MaskedLM(roberta_folder).tokenizer))
    with pytest.raises(TargetError, match=f"predictions of tiny see .* expected --model {expected.__name__}"):
        module.on_train_batch_start(tiny.tokens(), 0)


@pytest.mark.parametrize("make", [tiny.gpt2, tiny.mistral, tiny.opt])
def test_padding_before_a_text_changes_no_score(make):
    """Invariant 13: neither side of a text is scored, and positions count from its first token."""
    module, texts = tiny.built(CausalLM.of(make())), [tiny.tokens(1, n, seed=n)["input_ids"][0] for n in (1, 7, 12)]
    for side in ("left", "right"):
        ids, mask = (
            torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
            for rows in (texts, [torch.ones_like(text) for text in texts])
        )
        batch = {"input_ids": ids, "attention_mask": mask, "index": torch.arange(3)}
        logits, targets, example, *_ = module.evaluate(module.on_before_batch_transfer(batch, 0))
        counts = example >= 0
        found = torch.nn.functional.cross_entropy(logits[counts].double(), targets[counts], reduction="sum")
        expected = sum(reference.losses(module.target, batch_of(text), 0, {}).sum() for text in texts[1:])
        assert int(counts.sum()) == 6 + 11
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_roberta_as_a_decoder_counts_positions_by_itself():
    config = {**tiny.SMALL, **tiny.WIDE, "max_position_embeddings": 66, "type_vocab_size": 1, "is_decoder": True}
    module = tiny.built(CausalLM.of(tiny.made(3, "RobertaForCausalLM", "RobertaConfig", **config)))
    text, pad = tiny.tokens(1, 6)["input_ids"][0], torch.full((3,), 1)
    for ids in (torch.cat([pad, text]), torch.cat([text, pad])):
        batch = {"input_ids": ids[None], "attention_mask": (ids != 1).long()[None], "index": torch.zeros(1).long()}
        with torch.no_grad():
            found = module.logits(module.on_before_batch_transfer(batch, 0))[0][ids != 1]
            torch.testing.assert_close(found, module.target(text[None]).logits[0], rtol=0, atol=1e-5)


def test_a_process_that_only_fills_tries_out_as_often_as_others(causal):
    passes = []
    causal.target.register_forward_pre_hook(lambda *_: passes.append(1))
    causal.on_train_batch_start(tiny.tokens(), 0)
    own = len(passes)
    causal.on_train_batch_start(tiny.tokens() | {"index": torch.full((3,), -1)}, 0)
    assert len(passes) == 2 * own


def batch_of(text):
    return {"input_ids": text.unsqueeze(0), "attention_mask": torch.ones_like(text).unsqueeze(0)}


def test_labels_at_padding_are_not_scored(masked):
    batch = tiny.tokens()
    batch["labels"] = torch.where(torch.arange(tiny.LENGTH) % 3 == 0, batch["input_ids"], -100)
    batch["attention_mask"][1, :4] = 0
    example = masked.evaluate(masked.on_before_batch_transfer(batch, 0)).example
    assert example[example >= 0].bincount().tolist() == [5, 4, 6]  # places 0 and 3, and 15, are padding


def test_probes_differ_in_the_first_token_of_one_example(causal, masked):
    for module in (causal, masked):
        batch = tiny.tokens()
        first, second = module.probes(batch)
        assert (first["input_ids"] != second["input_ids"]).nonzero().tolist() == [[0, 0]]
        assert int(second["input_ids"][0, 0]) not in module.tokenizer.all_special_ids
        assert torch.equal(first["index"], batch["index"][:1])
        assert torch.equal(module.hidden(first)[0], module.logits(first))
