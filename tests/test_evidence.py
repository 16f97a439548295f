"""Evidence of single units against plain hooks, and what it tells of a head whose work is known."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_ablate import (
    AblationCallback,
    Attribution,
    CausalLM,
    ConditionalMean,
    EachHead,
    EachLayer,
    Results,
    Site,
    difference,
)
from lightning_ablate.errors import ConfigError, DataError, SiteError
from lightning_ablate.results.evidence import Evidence, coloured
from lightning_ablate.shown import shown_text
from lightning_ablate.sites import attended
from tests import demos, reference, tiny
from tests.command import FEW, TWO, found, killed

RIDGE = 0.01
METHODS = ["zero", "mean", ConditionalMean(RIDGE)]
SITES = {
    "vit": "blocks.1.attn.proj",
    "gpt2": "transformer.h.1.attn.c_proj",
    "roberta": "roberta.encoder.layer.1.attention.output.dense",
    "mistral": "model.layers.1.self_attn.o_proj",
}


def prepared(name):
    """A module, batches of calibration and of evaluation."""
    if name == "mistral":
        module = tiny.built(tiny.Own(tiny.mistral()))
        return module, None, [tiny.loader(30, 6, seed) for seed in (1, 2)]
    module, data = demos.module_of(name), demos.data_of(name, 3000)
    if name == "vit":
        data.calibration_images, data.evaluation_images = 300, 60
    data.trainer = type("Trainer", (), {"lightning_module": module, "global_rank": 0, "world_size": 1})()
    return module, data, [demos.batches(module, data._loader(kind)) for kind in ("calibration", "evaluation")]


def change(x, mask, method):
    """What plain hooks put in a unit's place."""
    if isinstance(method, ConditionalMean):
        return reference.conditional_mean(x, mask, RIDGE)
    return reference.put(mask, torch.zeros(len(mask)) if method == "zero" else x.double().mean(0).float())


def at_scored(x, batch):
    """Activations where something is asked, or the mean over an image's tokens."""
    if "labels" in batch:
        return x[batch["labels"] != -100]
    if "label" in batch:
        return x.mean(1)
    real = batch["attention_mask"].bool()
    return x[:, :-1][real[:, :-1] & real[:, 1:]]


@pytest.mark.parametrize("name", SITES)
def test_changes_activations_and_classes_equal_those_of_plain_hooks(tmp_path, name):
    module, data, (calibration, evaluation) = prepared(name)
    path, model = SITES[name], module.target
    x = reference.raw_activations(model, calibration, [path])[path]
    units = [f"{path} head 1", f"{path} neuron 5"]
    callback = AblationCallback(METHODS, sites=[path], neurons=EachHead(), explain=units, explain_examples=10_000)
    trainer = tiny.trainer(tmp_path, callback)
    fitted = trainer.fit(module, datamodule=data) if data else trainer.fit(module, calibration, evaluation)
    assert fitted is None
    width, heads = x.shape[1], callback.run.calibration.sites[0].heads
    masks = [torch.arange(width) // (width // heads) == 1, torch.arange(width) == 5]
    gathered, rows = callback.results.gathered, callback.results.table
    for unit, mask in zip(units, masks, strict=True):
        for method in METHODS:
            own = gathered.evidence[(gathered.evidence["unit"] == unit)]
            own = own[own["method"] == (method if isinstance(method, str) else method.name)]
            before, after, told, activation = [], [], 0.0, []
            for batch in evaluation:
                seen = {}
                with torch.no_grad():
                    with reference.plain_hooks(model, {path: lambda a, seen=seen: seen.update(x=a)}):
                        clean, targets = reference.scored(model, batch)
                    with reference.plain_hooks(model, {path: change(x, mask, method)}):
                        ablated, _ = reference.scored(model, batch)
                before.append(functional.cross_entropy(clean.double(), targets, reduction="none"))
                after.append(functional.cross_entropy(ablated.double(), targets, reduction="none"))
                told = told + (clean.double().log_softmax(1) - ablated.double().log_softmax(1)).sum(0)
                mean = x.double().mean(0).float()
                norm = (
                    (seen["x"] - mean)[..., mask].norm(dim=-1, keepdim=True) if mask.sum() > 1 else seen["x"][..., mask]
                )
                activation.append(at_scored(norm, batch).squeeze(-1))
            before, after, activation = map(torch.cat, (before, after, activation))
            assert np.abs(own["clean"].to_numpy() - before.numpy()).max() < 1e-5
            assert np.abs(own["change"].to_numpy() - (after - before).numpy()).max() < 1e-5
            assert np.abs(
                own["activation"].to_numpy() - activation.numpy()
            ).max() < 1e-6 * activation.abs().max().clamp_min(1)
            promoted = gathered.promoted[
                (gathered.promoted["unit"] == unit) & (gathered.promoted["method"] == own["method"].iloc[0])
            ]
            expected = (told / len(before)).numpy()
            assert np.abs(promoted["change"].to_numpy() - expected[promoted["class"]]).max() < 1e-5
            assert promoted["change"].max() == pytest.approx(expected.max(), abs=1e-5)
            assert promoted["change"].min() == pytest.approx(expected.min(), abs=1e-5)
            if "head" in unit:  # the sweep ablated it as well
                (row,) = rows[(rows["method"] == own["method"].iloc[0]) & (rows["head"] == 1)].itertuples()
                base = callback.results.baseline["cross_entropy"]
                assert own["clean"].mean() + own["change"].mean() == pytest.approx(row.cross_entropy, abs=1e-9)
                assert own["clean"].mean() == pytest.approx(base, abs=1e-9) and len(own) == row.n


VOCABULARY, FIRST, LENGTH = 24, 12, 24


def recalled(count, seed):
    """Twelve different tokens, then six pairs of one of them and the token that came after it."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.stack([torch.randperm(VOCABULARY, generator=generator)[:FIRST] for _ in range(count)])
    places = torch.stack([torch.randperm(FIRST - 1, generator=generator)[:6] for _ in range(count)])
    pairs = torch.stack([first.gather(1, places), first.gather(1, places + 1)], 2).flatten(1)
    return torch.cat([first, pairs], 1)


class Induction(nn.Module):
    """Two layers made by hand: the first tells each place the token before it, the second copies what came after.

    A place holds its token, its position, the token before it, and what it predicts. A head that finds no earlier
    occurrence looks at the first place, and gets nothing there.
    """

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, attention_mask=None):
        token, places = (
            functional.one_hot(input_ids, VOCABULARY).float(),
            torch.eye(LENGTH).expand(len(input_ids), -1, -1),
        )
        before = self.layers[0](places, places.roll(-1, 1), token)  # a place asks for the one before it
        sink = torch.zeros(*token.shape[:2], 1)
        sink[:, 0] = 0.5
        ones, real = torch.ones_like(sink), (torch.arange(LENGTH) > 0).view(1, -1, 1)
        found = self.layers[1](torch.cat([token, ones], 2), torch.cat([before * real, sink], 2), token * real)
        return SimpleNamespace(logits=10 * found)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(VOCABULARY, VOCABULARY, bias=False)
        with torch.no_grad():
            self.out.weight.copy_(torch.eye(VOCABULARY))

    def forward(self, query, key, value):
        query, key, value = (one.unsqueeze(1) for one in (query, key, value))
        made = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=200.0)
        return self.out(made.squeeze(1))


class Recall(tiny.Own):
    ahead = 1

    def shown(self, batch):
        return [{"tokens": [f" {token}" for token in row]} for row in batch["input_ids"].tolist()]

    def repeated(self, batch):
        ids = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(1))[:FIRST].repeat(1, 2)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "index": torch.zeros(1, dtype=torch.int64)}

    def hidden(self, batch):
        return [self.logits(batch)]


def explained(folder, model, **options):
    rows = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "index": i} for i, ids in enumerate(recalled(40, 5))
    ]
    callback = AblationCallback(["zero", "mean"], neurons=EachHead(), explain_examples=30, **options)
    tiny.fit(folder, Recall(model), DataLoader(rows[20:], 8), DataLoader(rows, 8), callback)
    return callback.results


def assert_found(results, induction, previous):
    """The head's evidence lies where a token comes again, for the better where a pair asks for what came after it."""
    own = results.evidence(induction).table
    asked, again = (own["place"] > FIRST) & (own["place"] % 2 == 1), own["position"] >= FIRST
    assert len(own) == 2 * 30 * (LENGTH - 1) and own.loc[asked, "change"].min() > 2
    assert own.loc[~again & (own["method"] == "zero"), "change"].abs().max() < 1e-6
    assert own.loc[~again, "change"].abs().mean() < 0.1 * own.loc[asked, "change"].mean()
    top = results.evidence(induction).contexts(20)
    assert ((top["position"] >= FIRST) & (top["position"] % 2 == 0)).all()
    reads = results.gathered.reads.set_index("unit")
    assert reads.loc[induction, "induction"] > 0.8 and reads.loc[previous, "previous"] > 0.4
    for one in results.gathered.attention[results.gathered.attention["unit"] == induction].itertuples():
        ids = recalled(40, 5)[one.example]
        earlier = int((ids[: one.position] == ids[one.position]).nonzero()[0])
        assert int(np.argmax(one.weights)) == earlier + 1


def test_an_induction_head_is_found_at_repeated_tokens_and_nowhere_else(tmp_path):
    results = explained(tmp_path, Induction(), explain=2)
    heads = ["layers.1.out head 0", "layers.0.out head 0"]
    assert sorted(results.gathered.units, reverse=True) == heads
    assert_found(results, *heads)
    reads = results.gathered.reads.set_index("unit")
    assert reads.loc[heads[1], "previous"] == pytest.approx(1, abs=1e-6)
    assert reads.loc[heads[0], "first"] > 0.4  # where nothing came before
    loaded = Results.load(tmp_path)
    for name, table in results.gathered.tables.items():
        pd.testing.assert_frame_equal(loaded.gathered.tables[name], table, check_dtype=False)


def test_two_processes_and_a_run_that_died_find_the_same(tmp_path):
    small = ["fit", *FEW, "--data.calibration_images=43", "--data.evaluation_images=37", "--ablation.neurons=EachHead"]
    small += ["--ablation.methods=[mean]", "--ablation.explain=2", "--ablation.explain_examples=20"]
    one = found(tmp_path / "one", *small)
    assert len(one.gathered.evidence) == 2 * 20 and set(one.gathered.contexts["picture"].map(type)) == {bytes}
    died = [*small, "--ablation.save_every=0"]
    killed(tmp_path / "died", *died, batch=3)
    assert (tmp_path / "died" / "ablation.ckpt").exists() and not (tmp_path / "died" / "results.csv").exists()
    for other, within in ((found(tmp_path / "two", *small, *TWO), 1e-6), (found(tmp_path / "died", *died), 0)):
        for name in ("evidence", "promoted"):
            pd.testing.assert_frame_equal(one.gathered.tables[name], other.gathered.tables[name], atol=within, rtol=0)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (
            {"explain": ["transformer.h.1.attn.c_prj head 0"]},
            SiteError,
            "did you mean 'transformer.h.1.attn.c_proj head 0'",
        ),
        ({"explain": "transformer.h.1.attn.c_proj head 9"}, SiteError, "c_proj has 4 heads"),
        ({"explain": 3}, ConfigError, "the run ranks no single units"),
        ({"explain": 99, "neurons": EachHead()}, ConfigError, "expected at most 8"),
        ({"explain": -1}, ConfigError, "expected at least 0"),
        ({"explain": 1, "explain_examples": 0}, ConfigError, "at least 1"),
    ],
)
def test_units_that_can_not_be_explained_are_refused_in_a_line(tmp_path, options, error, said):
    with pytest.raises(error) as caught:
        tiny.fit(tmp_path, callback=AblationCallback(["zero"], fractions=[0.5], **options))
    assert said in str(caught.value) and len(str(caught.value)) < 300


def test_evidence_that_is_missing_or_of_another_run_is_refused(tmp_path):
    callback = AblationCallback(["zero"], neurons=EachLayer(), explain=2, dirpath=tmp_path / "one")
    tiny.fit(tmp_path, callback=callback)
    assert callback.results.gathered.units == sorted(
        callback.results.gathered.units, key=lambda unit: -mean_of(callback, unit)
    )
    with pytest.raises(ConfigError, match=r"did you mean 'transformer.h.[01]'"):
        callback.results.evidence("transformer.h.7")
    callback.results.gathered.tables["evidence"]["change"] += 1.0
    callback.results.gathered.save(tmp_path / "one")
    with pytest.raises(DataError, match="of another run"):
        Results.load(tmp_path / "one")
    with pytest.raises(ConfigError, match="--ablation.explain 12"):
        tiny.fit(tmp_path, callback=AblationCallback(["zero"], fractions=[0.5]))[1].results.evidence("head 0")


def mean_of(callback, unit):
    return callback.results.evidence(unit).table["change"].mean()


def test_the_largest_of_an_attribution_are_explained_as_many_heads_as_neurons(tmp_path):
    options = {"attribution": Attribution(["mean"]), "explain": 2}
    _, callback = tiny.fit(tmp_path, callback=AblationCallback(["zero"], fractions=[0.5], **options))
    table, gathered = callback.attributions, callback.results.gathered
    for level in ("head", "neuron"):
        largest = table[table["level"] == level].nlargest(2, {"head": "verified", "neuron": "estimate"}[level])
        names = {f"{one.site} {level} {one.unit}" for one in largest.itertuples()}
        assert names == {unit for unit in gathered.units if f" {level} " in unit}
    assert gathered.methods == ["mean"]


def test_colours_and_pieces_of_text_are_readable():
    html = coloured([("<script>", 2.0), ("\n", np.nan), ("שלום", -1.0)])
    assert "&lt;script&gt;" in html and "rgba(213,94,0,0.85)" in html and "rgba(0,114,178,0.42)" in html
    assert 'title="+2.000 nats"' in html and "↵\n" in html and 'dir="auto"' in html
    tokenizer = CausalLM("demo:gpt2").tokenizer
    text = "naïve 😀 שלום"
    ids = torch.tensor([0, *tokenizer(text)["input_ids"]])
    tokens = shown_text(tokenizer, ids, torch.arange(len(ids)) > 0)["tokens"]
    assert tokens[0] is None and "".join(tokens[1:]) == text and "" in tokens  # of a character in several tokens


def test_a_difference_is_that_of_plain_hooks_and_shows_as_coloured_text():
    module, path = demos.module_of("gpt2"), SITES["gpt2"]
    text = "def parse(text):\n    return text"
    found = difference(module.target, module.tokenizer, text, heads={path: [1]})
    ids = module.tokenizer(text, return_tensors="pt")["input_ids"]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    width = module.target.get_submodule(path).weight.shape[0]
    mask = torch.arange(width) // (width // module.target.config.n_head) == 1
    with torch.no_grad():
        before = reference.losses(module.target, batch, 0, {})
        after = reference.losses(module.target, batch, 0, {path: reference.put(mask, torch.zeros(width))})
    assert "".join(found["token"]) == text and np.isnan(found["change"][0])
    assert np.abs(found["change"][1:] - (after - before).numpy()).max() < 1e-5
    assert found._repr_html_().count("nats") == len(found)  # one for each token but the first, and the mean
    with pytest.raises(DataError, match="at least 2"):
        difference(module.target, module.tokenizer, "x", heads={path: [1]})


def test_a_named_unit_needs_no_sweep_and_is_told_in_the_terminal_and_on_its_page(tmp_path, capsys):
    unit = "transformer.h.1.attn.c_proj head 0"
    _, callback = tiny.fit(tmp_path, callback=AblationCallback([], explain=unit, dirpath=tmp_path / "run"))
    assert len(callback.results.table) == 1 and callback.results.gathered.methods == ["mean"]
    change = callback.results.evidence(unit).table["change"]
    assert f"  {unit}: mean {change.mean():+.4f}, at " in capsys.readouterr().out
    assert unit in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_evidence_that_can_not_be_had_leaves_the_results_and_says_why(tmp_path):
    class Reversed(tiny.Own):
        def examples_of(self, batch, batch_idx):
            return super().examples_of(batch, batch_idx) + 3

    callback = AblationCallback(["zero"], fractions=[1.0], explain="transformer.h.1", explain_examples=9)
    with pytest.warns(UserWarning, match="there is no evidence: Scored's `example` names examples that aren't in the"):
        tiny.fit(tmp_path, Reversed(tiny.gpt2()), callback=callback)
    assert callback.results.gathered is None and len(callback.results.table) == 2
    assert any("there is no evidence" in note for note in callback.results.facts["notes"])


def test_an_answer_behind_the_padding_is_shown_after_the_text():
    contexts = pd.DataFrame([{"example": 0, "label": None, "tokens": ["a", " b", None], "picture": None}])
    row = {"unit": "h", "method": "zero", "example": 0, "target": 7, "text": " c", "clean": 1.0, "activation": 0.0}
    for position, place, shown in ((1, 2, ["a", " b", " c"]), (-1, -1, ["a", " b", " → c"])):
        table = pd.DataFrame([{**row, "position": position, "place": place, "change": 0.5}])
        unit = Evidence(table, pd.DataFrame(columns=["unit", "method", "class", "text", "change"]), contexts).of("h")
        pieces = unit.around(table.iloc[0], table)
        assert [text for text, _ in pieces] == [s.replace("→ c", "→  c") for s in shown] and pieces[-1][1] == 0.5


def test_evidence_that_one_process_can_not_have_is_had_by_none(tmp_path, monkeypatch):
    """Or those that went on would wait for the other."""
    monkeypatch.setattr(tiny.Own, "gathered", lambda self, own: ["", "no logits"] if isinstance(own, str) else [own])
    with pytest.warns(UserWarning, match="there is no evidence: no logits"):
        _, callback = tiny.fit(tmp_path, callback=AblationCallback([], explain="transformer.h.1"))
    assert callback.results.gathered is None and callback.results.baseline["n"] > 0


def test_evidence_belongs_to_the_first_data_set(tmp_path):
    callback = AblationCallback([], explain="transformer.h.1")
    tiny.fit(tmp_path, val={"one": tiny.loader(seed=2), "two": tiny.loader(seed=3)}, callback=callback)
    assert callback.results.on("one").gathered is callback.results.gathered is not None
    assert callback.results.on("two").gathered is None


def test_a_gate_is_not_taken_for_attention_and_queries_that_share_keys_are_read_right():
    site, generator = Site("out", 8, heads=2), torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, heads, 4, 4, generator=generator) for heads in (2, 1, 1))

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(8, 8)

        def forward(self):
            made = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            return self.out((made * query.softmax(-1)).transpose(1, 2).flatten(2))

    model = Gated()
    with torch.no_grad(), attended(model, {site: [1]}) as weights:
        model()
    scores = (query[:, 1] @ key[:, 0].transpose(1, 2) / 2).masked_fill(~torch.ones(4, 4).tril().bool(), -torch.inf)
    assert list(weights) == [(site, 1)] and torch.allclose(weights[site, 1], scores.softmax(-1), atol=1e-6)
