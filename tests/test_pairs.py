"""Pairs of texts between two answers: patching by plain hooks, in both directions, and what can't be aligned."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import default_collate
from transformers import PreTrainedTokenizerFast

from lightning_ablate import AblationCallback, Attribution, EachHead, EachLayer, IndirectObjects, PairedLM, PairedTexts
from lightning_ablate.data.pairs import _FRAMES, _NAMES, _OBJECTS, _PLACES
from lightning_ablate.errors import ConfigError, DataError
from tests import reference, tiny

ROWS = [
    {
        "clean": f"the {'cat' * (n % 2)} {n} is a",
        "corrupt": f"the {'dog' * (n % 2)} {9 - n} is a",
        "answer": "c",
        "foil": "d",
    }
    for n in range(10)
]
METHODS = ["zero", "mean", "resample-partner"]


def paired(rows=ROWS, **options):
    sizes = {"calibration_examples": 4, "evaluation_examples": 6, "batch_size": 4, "shuffle_seed": None}
    return PairedTexts.of(rows, **{**sizes, **options})


def run(tmp_path, data, methods=METHODS, tokenizer=None, **options):
    module = PairedLM.of(tiny.gpt2(), tokenizer=tokenizer or tiny.tokenizer())
    callback = AblationCallback(methods, **{"neurons": EachHead(), **options})
    tiny.trainer(tmp_path, callback).fit(module, datamodule=data)
    return module, callback


def plain(module, batch, values, head, site):
    """The logit difference with a head's activations set by plain hooks; and what the site does."""
    seen = {}

    def change(x):
        seen["x"] = x.clone()
        if values is None:
            return None
        own = slice(4 * head, 4 * head + 4)
        x = x.clone()
        x[..., own] = values[..., own] if values.ndim == 3 else values[own]
        return x

    with reference.plain_hooks(module.target, {site: change}), torch.no_grad():
        logits = module.target(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    rows = torch.arange(len(logits))
    last = logits[rows, batch["last"]]
    return last[rows, batch["answer"]] - last[rows, batch["foil"]], seen["x"]


@pytest.mark.parametrize("reverse", [False, True])
def test_zero_mean_and_partner_are_what_plain_hooks_do_in_both_directions(tmp_path, reverse):
    data = paired(reverse=reverse)
    module, callback = run(tmp_path, data)
    calibrating, batch = (default_collate(list(data._examples(p))) for p in ("calibration", "evaluation"))
    partner = {**batch, **{n: batch[f"partner_{n}"] for n in ("input_ids", "attention_mask")}}
    assert reverse == (ROWS[4]["clean"] != module.tokenizer.decode(batch["input_ids"][0][: batch["last"][0] + 1]))
    table = callback.results.table
    base, _ = plain(module, batch, None, 0, "transformer.h.0.attn.c_proj")
    assert table["logit_difference"][0] == pytest.approx(base.mean().item(), abs=1e-5)
    assert table["preferred"][0] == (base > 0).float().mean()
    for row in table.iloc[1:].itertuples():
        _, seen = plain(module, calibrating, None, 0, row.part)
        mean = seen[calibrating["attention_mask"].bool()].mean(0)
        _, other = plain(module, partner, None, 0, row.part)
        values = {"zero": torch.zeros(16), "mean": mean, "resample-partner": other}[row.method]
        expected, _ = plain(module, batch, values, row.head, row.part)
        assert row.logit_difference == pytest.approx(expected.mean().item(), abs=1e-5)
        assert row.preferred == pytest.approx((expected > 0).float().mean().item())
    assert len(table) == 1 + 3 * 8  # partners know no seeds


def test_both_directions_in_one_run_give_the_share_that_is_kept(tmp_path):
    data = paired(evaluation=[paired(reverse=True)])
    _, callback = run(tmp_path, data)
    clean, corrupt = callback.results.each
    assert corrupt.data == ["given reversed"]
    ends = clean.baseline["logit_difference"], corrupt.baseline["logit_difference"]
    kept = clean.kept("logit_difference", ends[1])
    assert kept["kept"][0] == 1 and kept["kept"].between(kept["kept_low"], kept["kept_high"]).all()
    third = clean.table["logit_difference"][3]
    assert kept["kept"][3] == pytest.approx((third - ends[1]) / (ends[0] - ends[1]))
    assert corrupt.kept("logit_difference", ends[0])["kept"][0] == 1
    both = callback.results.kept("logit_difference", ends[1] - 1)  # each by its own intact inputs
    assert both[both["method"] == "none"]["kept"].tolist() == [1, 1] and set(both["data"]) == set(callback.results.data)


def test_files_are_read_in_both_directions(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    sizes = {"calibration_examples": 4, "evaluation_examples": 6, "evaluation_split": "train"}
    data = PairedTexts(str(path), **sizes, evaluation=[PairedTexts(str(path), **sizes, reverse=True)])
    _, callback = run(tmp_path, data)
    assert callback.results.data == [str(path), f"{path} reversed"]
    assert callback.results.labels == ["pairs.jsonl", "pairs.jsonl reversed"]


def test_the_loss_of_the_metric_is_attributed_to_first_order_and_verified(tmp_path):
    data = paired()
    options = {"attribution": Attribution(["zero", "resample-partner"], metric="logit_difference", verify=3)}
    module, callback = run(tmp_path, data, **options)
    batch = default_collate(list(data._examples("calibration")))
    partner = {**batch, **{n: batch[f"partner_{n}"] for n in ("input_ids", "attention_mask")}}
    heads = callback.attributions[lambda t: t["level"] == "head"]
    assert callback.attributions.attrs["of"] == "loss of logit_difference"
    assert (callback.attributions["second"] == 0).all()
    for site in callback.run.calibration.sites:
        kept = {}

        def keep(x, kept=kept):
            kept["x"] = x.detach().requires_grad_()
            return kept["x"]

        with reference.plain_hooks(module.target, {site.name: keep}):
            logits = module.target(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        rows = torch.arange(4)
        last = logits[rows, batch["last"]]
        (last[rows, batch["answer"]] - last[rows, batch["foil"]]).mean().backward()
        _, other = plain(module, partner, None, 0, site.name)
        for method, values in (("zero", torch.zeros(())), ("resample-partner", other)):
            expected = -(kept["x"].grad * (values - kept["x"].detach())).view(4, -1, 4, 4).sum((0, 1, 3))
            own = heads[(heads["method"] == method) & (heads["site"] == site.name)]
            torch.testing.assert_close(torch.tensor(own["estimate"].to_numpy()).float(), expected, rtol=1e-4, atol=1e-6)
    one = heads[heads["picked"] == "largest"].iloc[0]
    assert one["method"] == "zero"
    zeros = torch.zeros(16)
    truth = plain(module, batch, None, 0, one["site"])[0] - plain(module, batch, zeros, one["unit"], one["site"])[0]
    assert one["verified"] == pytest.approx(truth.mean().item(), abs=1e-5)
    for options, words in (
        ({"attribution": Attribution(["zero"], metric="x")}, r"no metric 'x' .*it has logit_difference, preferred"),
        ({"attribution": Attribution(["zero"], metric="preferred")}, "needs gradients of the preferred"),
    ):
        with pytest.raises(ConfigError, match=words):
            run(tmp_path, paired(), **options)


WRONG = {
    "the row 'the  8 is a': clean has 11 tokens and corrupt 12, expected as many": {"corrupt": "the  1 is ab"},
    "answer 'cd' is 2 tokens, expected 1": {"answer": "cd"},
    "foil '' is 0 tokens": {"foil": ""},
    "has no column 'foil'": {"foil": None},
    "are the same token": {"foil": "c"},
    "from 1 to 32": {"clean": "", "corrupt": ""},
    "clean has 40 tokens and corrupt 40, expected as many, from 1 to 32": {"clean": "c" * 40, "corrupt": "d" * 40},
    "clean has 32 tokens and corrupt 40": {"clean": "c" * 32, "corrupt": "d" * 40},
    "expected text": {"clean": 3},
}


@pytest.mark.parametrize("words", WRONG)
def test_pairs_that_cannot_be_aligned_are_told_in_a_line_with_their_row(tmp_path, words):
    rows = [dict(row) for row in ROWS]
    rows[8] |= WRONG[words]
    if rows[8]["foil"] is None:
        rows = [{key: value for key, value in row.items() if key != "foil"} for row in rows]
    if rows[8]["clean"] == 3:
        rows = [{**row, "clean": 3} for row in rows]
    with pytest.raises(DataError, match=words) as error:
        run(tmp_path, paired(rows))
    assert "\n" not in str(error.value)


def test_other_texts_are_sources_but_no_pairs(tmp_path):
    options = {"neurons": None, "fractions": [0.5], "seeds": [1]}
    module, callback = run(tmp_path, paired(), ["resample-ids", "resample-same-position"], **options)
    assert len(callback.results.table) == 3
    with pytest.raises(ConfigError, match="no metric 'x' here; those there are: top1"):
        callback.results.kept("x", 0)
    with pytest.raises(DataError, match="PairedLM needs pairs of texts"):
        tiny.fit(tmp_path, module)


def words_tokenizer():
    known = f"{_NAMES} {_OBJECTS} {' '.join(_PLACES)} {' '.join(_FRAMES)}".replace(",", " ,").split()
    vocabulary = {word: place for place, word in enumerate(dict.fromkeys(["<unk>", *known]))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", model_max_length=64)


def test_indirect_objects_are_balanced_and_of_single_tokens(tmp_path):
    data = IndirectObjects(calibration_examples=20, evaluation_examples=200, batch_size=50)
    _, callback = run(tmp_path, data, ["resample-partner"], words_tokenizer())
    assert callback.results.baseline["n"] == 200
    rows = data.rows("evaluation")
    assert len({row["clean"] for row in rows[:220]}) > 210
    first = 0
    for row in rows[:200]:
        names = [word.strip(",") for word in row["clean"].split()[1:4:2]]
        assert row["answer"].strip() in names and row["foil"].strip() in names
        assert row["clean"].count(row["foil"].strip()) == 2 and row["corrupt"].count(row["answer"].strip()) == 2
        first += names[0] == row["answer"].strip()
    assert first == 100
    assert IndirectObjects(seed=1).name == "indirect-objects"
    with pytest.raises(DataError, match=r"has 0 of our names and 0 of our objects as single tokens"):
        run(tmp_path, IndirectObjects(calibration_examples=2, evaluation_examples=2))


@pytest.mark.parametrize("positions", ["subject", "last", (4,)])
def test_the_residual_stream_is_patched_at_a_position_as_plain_hooks_would(tmp_path, positions):
    data = IndirectObjects(calibration_examples=4, evaluation_examples=12, batch_size=6, spans=["subject", "object"])
    options = {"neurons": EachLayer(), "sites": "residual", "positions": positions}
    module, callback = run(tmp_path, data, ["resample-partner"], words_tokenizer(), **options)
    batch = default_collate(list(data._examples("evaluation")))
    names = {
        name: [module.tokenizer.decode(ids[at]) for ids, at in zip(batch["input_ids"], batch[name], strict=True)]
        for name in data.spans
    }
    asked = [module.tokenizer.decode(batch[name].unsqueeze(1)[row]) for name in ("foil", "answer") for row in range(12)]
    assert names["subject"] + names["object"] == asked
    assert (batch["subject"].int().argmax(1) > 8).all()  # where it is said again
    partner = {**batch, **{n: batch[f"partner_{n}"] for n in ("input_ids", "attention_mask")}}
    places = {"subject": batch["subject"].nonzero()[:, 1], "last": batch["last"], (4,): torch.full((12,), 4)}[positions]
    rows, table = torch.arange(12), callback.results.table.set_index("part")
    for layer in ("transformer.h.0", "transformer.h.1"):
        seen, scores = {}, []
        with (
            torch.no_grad(),
            reference.plain_hooks(module.target, {f"{layer}:output": lambda x, s=seen: s.update(x=x)}),
        ):
            reference.forward(module.target, partner)

        def patched(x, other=seen["x"]):
            x = x.clone()
            x[rows, places] = other[rows, places]
            return x

        with torch.no_grad(), reference.plain_hooks(module.target, {f"{layer}:output": patched}):
            last = reference.forward(module.target, batch)[rows, batch["last"]]
        scores = last[rows, batch["answer"]] - last[rows, batch["foil"]]
        assert table.loc[layer, "logit_difference"] == pytest.approx(scores.mean().item(), abs=1e-5)


def test_a_span_that_is_no_part_of_the_text_is_refused(tmp_path):
    rows = [{**row, "about": "cat" if n % 2 else str(n)} for n, row in enumerate(ROWS)]
    run(tmp_path, paired(rows, spans=["about"]), positions="about")
    rows[8]["about"] = "dog"
    with pytest.raises(DataError, match="about 'dog' isn't a part of the clean text"):
        run(tmp_path, paired(rows, spans=["about"]))
