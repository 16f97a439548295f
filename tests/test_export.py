"""Smaller models: what they compute, where they load, and what is refused."""

import json
import re

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_ablate import AblationCallback, CausalLM, ConditionalMean, Only, Random
from lightning_ablate.conditions import Selection
from lightning_ablate.errors import ConfigError, SiteError, TargetError
from lightning_ablate.export import shrink
from lightning_ablate.export.shrink import BiasError, shrunk
from lightning_ablate.methods import Ablation, Affine, Edit
from lightning_ablate.sites import find_sites, hooked
from tests import coverage, reference, tiny
from tests.command import FEW, found, module, python

pytestmark = pytest.mark.filterwarnings("ignore")  # as the libraries are
SHORT = (
    "gpt2 gpt_neo gptj opt llama mistral qwen2 qwen3 gemma2 phi3 olmo2 stablelm starcoder2 gpt_neox cohere "
    "bert roberta distilbert electra deberta-v2 modernbert bart t5 m2m_100 vit beit deit vit_tiny_patch16_224 "
    "vit_small_patch14_reg4_dinov2 eva02_tiny_patch14_224 swin_tiny_patch4_window7_224"
).split()
NO_MLP = (  # no option, several uses of a module, a norm over the neurons; cpmant has no cache
    "albert bitnet bloom cpmant falcon moshi mpt openai-gpt dinov2 dinov2_with_registers swin "
    "vit_base_patch16_siglip_224 cait_xxs24_224"
).split()
HEADS = "llama qwen3 phi3 mistral olmo t5 vit gemma".split()  # of the kinds that can lose heads
FRESH = """
import json, sys
sys.modules["lightning_ablate"] = None
import timm, torch, transformers
for folder in json.load(sys.stdin):
    saved = torch.load(f"{folder}/expected.pt")
    kind = saved["class"]
    if kind == "timm":
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    else:
        model = getattr(transformers, kind).from_pretrained(folder).eval()
    with torch.no_grad():
        output = model(**saved["probe"])
    said = output if isinstance(output, torch.Tensor) else output["logits"] if "logits" in output else output[0]
    torch.testing.assert_close(said, saved["said"], rtol=1e-4, atol=1e-4)
    if "generated" in saved:
        for cache in (True, False):
            tokens = model.generate(saved["probe"]["input_ids"][:1], max_new_tokens=6, do_sample=False, use_cache=cache)
            assert tokens.tolist() == saved["generated"], folder
    print(folder)
"""


def edits_for(sites, unit="neuron", fraction=0.5, added=True):
    """Regressions of no meaning on what is kept."""
    generator, edits = torch.Generator().manual_seed(0), {}
    for site in sites:
        mask = Random(unit).mask(Selection(fraction, 1), site)
        kept, ablated = (~mask).nonzero().squeeze(1), mask.nonzero().squeeze(1)
        offset = torch.randn(site.width, generator=generator) if added else torch.zeros(site.width)
        slope = 0.1 * torch.randn(len(kept), len(ablated), generator=generator)
        edits[site] = Edit(mask, Affine(offset, slope, torch.zeros(len(kept)), kept, ablated))
    return edits


def made(case, sites, unit="neuron"):
    """A tiny target, edits, and the smaller model; without anything added where nothing can hold it."""
    target = coverage.tiny(case)
    model, run = target
    if case.kind == "decoder":
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(model.config).eval()

        def run(number):
            return model(torch.arange(12)[None])

    model.requires_grad_(False)
    found = find_sites(model, lambda: run(0), [sites])
    try:
        edits = edits_for(found, unit)
        return model, edits, *shrunk(model, edits)
    except BiasError:
        edits = edits_for(found, unit, added=False)
        return model, edits, *shrunk(model, edits)


@pytest.fixture
def loads(tmp_path):
    """Saves smaller models, and loads them where this package isn't."""
    folders = []

    def save(case, model, edits, form, small):
        folder = tmp_path / case.name
        form.save(small, folder)
        probe = form.probe()
        with hooked(model, edits), torch.no_grad():
            output = model(**probe)
            said = output if isinstance(output, torch.Tensor) else output["logits"] if "logits" in output else output[0]
            saved = {"class": "timm" if case.kind == "timm" else type(model).__name__, "probe": probe, "said": said}
            if case.kind == "decoder":
                ids = probe["input_ids"][:1]
                saved["generated"] = model.generate(ids, max_new_tokens=6, do_sample=False).tolist()
        torch.save(saved, folder / "expected.pt")
        folders.append(str(folder))

    yield save
    ran = python("-c", FRESH, input=json.dumps(folders))
    assert ran.stdout.split() == folders, ran.stderr[-2000:]


def test_half_of_the_mlp_neurons_leave_every_kind_of_architecture(loads, request):
    """``--full``: every one that is covered, whose MLP sites are projections that run once."""
    cases = [c for c in coverage.COVERED if isinstance(c.mlps, int) and not c.experts and c.name not in NO_MLP]
    if not request.config.getoption("--full"):
        cases = [case for case in cases if case.name in SHORT]
    for case in cases:
        model, edits, form, small = made(case, "mlp")
        sizes = [sum(parameter.numel() for parameter in one.parameters()) for one in (model, small)]
        gone = sum(int(edit.mask.sum()) for edit in edits.values())
        assert sizes[0] - sizes[1] >= 2 * 16 * gone, case.name  # a row and a column each
        loads(case, model, edits, form, small)
    assert len(cases) >= 20


def test_heads_leave_with_the_key_and_value_heads_they_share(loads):
    for case in coverage.COVERED:
        if case.name in HEADS and not (case.kind == "encoder-decoder"):
            model, edits, form, small = made(case, "attention", 16)
            assert small.num_parameters() < model.num_parameters()
            loads(case, model, edits, form, small)


REFUSED = {
    "single attention neurons go at": (tiny.mistral, "attention", "neuron", 0.5),
    "no option that makes transformer.h.0.attn.c_proj narrower": (tiny.gpt2, "attention", "head", 0.5),
    "no option that makes blocks.0.attn.proj narrower": (tiny.vit, "attention", "head", 0.5),
    "not as many everywhere: take them together": (tiny.mistral, "attention", "head", 0.75),
    "nothing is kept at": (tiny.gpt2, "mlp", "neuron", 1.0),
    "can't be folded": (tiny.albert, "mlp", "neuron", 0.5),
    "no option that gives .*wo.bias.* to hold what takes": (tiny.t5, "mlp", "neuron", 0.5),
    "doesn't compute what the ablated one does": (tiny.t5, "attention", "head", 0.5),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_no_smaller_model_can_be_is_refused_in_a_line(words):
    make, sites, unit, fraction = REFUSED[words]
    model = make()
    edits = edits_for(tiny.sites(model, sites), unit, fraction, added="bias" in words)
    with pytest.raises(SiteError, match=words) as error:
        shrunk(model, edits)
    assert "\n" not in str(error.value)
    own = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(SiteError, match="can't be built again: expected a model of transformers or timm"):
        shrunk(own, {})


def test_layers_that_keep_different_numbers_are_refused():
    model = tiny.gpt2()
    first, second = tiny.sites(model, "mlp")
    edits = edits_for([first], fraction=0.5) | edits_for([second], fraction=0.25)
    with pytest.raises(SiteError, match=r"not as much is kept everywhere, .*h\.0\.mlp\.c_proj differ"):
        shrunk(model, edits)
    with pytest.raises(SiteError, match="has no option that makes .* as many of every layer"):
        shrunk(model, edits_for([first]))


def test_a_run_is_exported_with_its_card_whole_or_not_at_all(tmp_path, monkeypatch):
    """A grouped-query model without a bias, so that the conditional mean is fitted without an intercept."""
    saved = tiny.save_language_model(tmp_path / "model", tiny.mistral())
    module = CausalLM(saved)
    callback = AblationCallback(["mean", "conditional-mean"], [0.5], [1, 2], sites="mlp", dirpath=tmp_path / "run")
    tiny.fit(tmp_path, module, callback=callback)
    with pytest.raises(ConfigError, match="there is no run to export yet"):
        AblationCallback().export(module, tmp_path / "out", "zero")
    with pytest.raises(TargetError, match="of another target"):
        callback.export(tiny.Own(tiny.gpt2()), tmp_path / "out", "conditional-mean", 0.5)
    with pytest.raises(ConfigError, match="the run has no zero at fraction 0.5.*expected one of mean 50% seed 1"):
        callback.export(module, tmp_path / "out", "zero", 0.5)
    with pytest.raises(SiteError, match="no option that gives"):
        callback.export(module, tmp_path / "out", "mean", 0.5)
    with monkeypatch.context() as patched:
        patched.setattr(CausalLM, "save_processor", lambda self, folder: 1 / 0)
        with pytest.raises(Exception, match="division by zero"):
            callback.export(module, tmp_path / "out", "conditional-mean", 0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]
    folder = callback.export(module, tmp_path / "out", "conditional-mean", 0.5, seed=2)
    with pytest.raises(ConfigError, match="is there already"):
        callback.export(module, folder, "conditional-mean", 0.5)
    card = (folder / "README.md").read_text(encoding="utf-8")
    for words in (
        "intermediate_size 16",
        "fitted without an intercept",
        "base_model",
        "top-1",
        "| cross-entropy, nats |",
    ):
        assert words in card
    small = tiny.built(CausalLM(str(folder)))
    # what is exported is scored: by plain forward passes, not by the run's own conditional mean with an intercept
    loss, top1, n = reference.evaluation(small.target, tiny.loader(seed=2))
    row = callback.results.table.query("method == 'conditional-mean' and seed == 2").iloc[0]
    said = re.search(r"cross-entropy, nats \| [\d.]+ \[.*?\] \| ([\d.]+) ", card)[1]
    assert float(said) == pytest.approx(loss, abs=1e-4) and abs(row["cross_entropy"] - loss) > 1e-3
    assert f"{n} positions" in card and f"| {top1:.4f} [" in card and "95% interval over 6 examples" in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "run"]
    assert small.tokenizer("cat")["input_ids"] == module.tokenizer("cat")["input_ids"]
    edits, batch = {}, tiny.tokens()
    for site in callback.run.calibration.sites:
        mask = Random().mask(Selection(0.5, 2), site)
        ablation = Ablation(site, mask, callback.run.calibration[site], 2)
        edits[site] = Edit(mask, ConditionalMean(centred=False).prepare(ablation))
    with hooked(module.target, edits), torch.no_grad():
        expected = module.logits(batch)
    with torch.no_grad():
        torch.testing.assert_close(small.logits(batch), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_is_kept_and_wrong_rows_are_noticed_in_it(dtype, monkeypatch):
    model = tiny.gpt2().to(dtype)
    edits = edits_for(tiny.sites(model, "mlp"))
    _, small = shrunk(model, edits)
    assert small.dtype == dtype and next(model.parameters()).dtype == dtype
    rows = shrink._kept_rows
    monkeypatch.setattr(
        shrink, "_kept_rows", lambda name, *more: rows(name, *more).roll(int("0.mlp.c_fc.weight" in name))
    )
    with pytest.raises(SiteError, match="doesn't compute what the ablated one does"):
        shrunk(model, edits)


def test_a_target_whose_frequencies_were_rounded_is_refused_with_the_reason():
    model = tiny.mistral().to(torch.bfloat16)
    with pytest.raises(SiteError, match="original_inv_freq aren't as the class makes them"):
        shrunk(model, edits_for(tiny.sites(model, "mlp"), added=False))


def test_what_generates_and_exactly_these_neurons_go_along(tmp_path, gpt2_folder):
    module = tiny.built(CausalLM(gpt2_folder))
    module.target.generation_config.repetition_penalty = 1.3
    sites = tiny.sites(module.target, "mlp")
    choice = Only(neurons={site.name: [1, 5, 7] for site in sites})
    callback = AblationCallback(["conditional-mean"], neurons=choice, sites="mlp", dirpath=tmp_path / "run")
    tiny.fit(tmp_path, module, callback=callback)
    folder = callback.export(module, tmp_path / "out", "conditional-mean")
    assert json.loads((folder / "config.json").read_text())["n_inner"] == 61
    assert json.loads((folder / "config.json").read_text())["use_cache"]
    assert json.loads((folder / "generation_config.json").read_text())["repetition_penalty"] == 1.3
    assert module.target.config.use_cache


def test_the_command_exports_a_run_of_the_command_line(tmp_path):
    """Of the embedded ViT, by timm's own way; it scores what the sweep said."""
    run, out = tmp_path / "run", tmp_path / "out"
    some = [*FEW, "--data.evaluation_images=99"]
    few = [
        *some,
        "--data.calibration_images=299",
        "--ablation.sites=mlp",
        "--ablation.methods=[conditional-mean]",
        "--ablation.fractions=[0.5]",
    ]
    results = found(run, "fit", *few, "--ablation.seeds=[3,4]")
    export = "-m", "lightning_ablate.export"
    ran = python(*export, run, out, "--method=conditional-mean", "--fraction=0.5", "--seed=4", cwd=tmp_path)
    assert ran.stdout.splitlines()[-1] == str(out), ran.stderr
    again = found(tmp_path / "again", "fit", "--model=ImageClassifier", f"--model.name={out}", "--data=Digits", *some)
    row = results.table[results.table["seed"] == 4].iloc[0]
    assert f"| {row['cross_entropy']:.4f} [" in (out / "README.md").read_text()  # of this seed alone
    assert again.baseline["cross_entropy"] == pytest.approx(row["cross_entropy"], abs=1e-5)
    for folder, words in ((run, "error: the run has no x at fraction None"), (tmp_path / "no", "does not exist")):
        with pytest.raises(SystemExit, match=words):  # which Python says, with exit status 1
            module("lightning_ablate.export", folder, tmp_path / "other", "--method=x")
