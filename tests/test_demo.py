"""The three embedded targets: what they are, their sites, and a run of each shipped config."""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from lightning_ablate import AblationCallback, CausalLM, ImageClassifier, MaskedLM
from lightning_ablate.cli import AblationCLI
from lightning_ablate.data.demo import ROLES, Digits, PythonTexts, digits, python_texts, role_of
from lightning_ablate.demo import resolve
from lightning_ablate.masks import EachHead
from lightning_ablate.results import Results, read_rows
from lightning_ablate.sites import find_sites, hooked
from lightning_ablate.statistics import RangeHistogram
from tests import tiny
from tests.statistics.test_statistics import peak_by_numpy

ROOT = Path(__file__).parent.parent
NAMES = ["vit", "gpt2", "roberta"]
WIDTH = {"vit": 64, "gpt2": 128, "roberta": 128}


def module_of(name):
    kind = {"vit": ImageClassifier, "gpt2": CausalLM, "roberta": MaskedLM}[name]
    module = kind(f"demo:{name}")
    module.configure_model()
    return module


def sites_of(name, target):
    inputs = {"pixel_values": torch.randn(2, 1, 8, 8), "input_ids": torch.randint(5, 1000, (2, 20))}
    return find_sites(target, lambda: last_hidden(name, target, inputs))


def data_of(name, **options):
    if name == "vit":
        return Digits(batch_size=225, **options)
    tokens = {"calibration_tokens": 10_000, "evaluation_tokens": 8_000}
    return PythonTexts(length=128, batch_size=16, **(tokens | options))


def batches(name, module, loader):
    for batch in loader:
        yield module.on_before_batch_transfer(batch, 0) if name == "roberta" else batch


def plainly(name, target, batch):
    """Logits and targets of the scored positions, in plain PyTorch."""
    if name == "vit":
        return target(batch["pixel_values"]), batch["label"]
    ids, mask = batch["input_ids"], batch["attention_mask"]
    logits = target(input_ids=ids, attention_mask=mask).logits
    if name == "gpt2":
        scored = mask[:, 1:].bool()
        return logits[:, :-1][scored], ids[:, 1:][scored]
    scored = batch["labels"] != -100
    return logits[scored], batch["labels"][scored]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One ``fit`` of each target with a few conditions, made when first asked for."""
    made = {}

    def run(name):
        if name not in made:
            callback = AblationCallback(["zero", "mean", "peak"], [0.1, 0.5, 0.9], [42, 123, 456])
            trainer = tiny.trainer(tmp_path_factory.mktemp(name), callback)
            module, data = module_of(name), data_of(name)
            trainer.fit(module, datamodule=data)
            made[name] = module, data, callback.results
        return made[name]

    return run


def test_roles_share_no_name_and_no_text():
    names = [f"module {i}" for i in range(1000)]
    shares = Counter(map(role_of, names))
    assert shares["train"] == pytest.approx(800, abs=60) and set(shares) == set(ROLES)
    texts = {role: set(python_texts(role)) for role in ROLES}
    assert not texts["train"] & texts["calibration"] and not texts["train"] & texts["evaluation"]
    assert not texts["calibration"] & texts["evaluation"]


def test_digits_are_the_images_as_they_are():
    import numpy as np
    from sklearn.datasets import load_digits

    source = load_digits()
    evaluation, train = digits("evaluation"), digits("train")
    assert (len(evaluation), len(train)) == (449, 1348)
    for row, index in ((0, 3), (1, 7), (448, 1795)):
        assert np.array_equal(np.array(evaluation[row]["image"]) / 15, source.images[index])
        assert evaluation[row]["label"] == source.target[index]
    assert digits("calibration")["label"] == train["label"]


def test_embedded_targets_are_small_and_in_their_libraries_formats():
    folders = [Path(resolve(f"demo:{name}")) for name in NAMES]
    files = [path for folder in folders for path in folder.iterdir()]
    assert sum(path.stat().st_size for path in files) < 12 * 2**20
    assert all((folder / "model.safetensors").is_file() and (folder / "config.json").is_file() for folder in folders)


def test_vit_classifies_held_out_digits(runs):
    base = runs("vit")[2].baseline
    assert base.n == 449 and base.top1 >= 0.97


@pytest.mark.parametrize(("name", "gain"), [("gpt2", 2.0), ("roberta", 1.0)])
def test_language_models_know_more_than_token_frequencies(runs, name, gain):
    module, data, results = runs(name)
    counts = Counter()
    for batch in batches(name, module, data.val_dataloader()):
        with torch.no_grad():
            counts.update(plainly(name, module.target, batch)[1].tolist())
    n = sum(counts.values())
    unigram = -sum(count / n * math.log(count / n) for count in counts.values())
    assert results.baseline.n == n and results.baseline.cross_entropy <= unigram - gain


def evaluated(name, module, target, data):
    """Summed cross-entropy, hits and number of scored positions, in plain PyTorch."""
    loss, hits, n = 0.0, 0, 0
    for batch in batches(name, module, data.val_dataloader()):
        with torch.no_grad():
            logits, targets = plainly(name, target, batch)
        loss += F.cross_entropy(logits.double(), targets, reduction="sum").item()
        hits += int((logits.argmax(1) == targets).sum())
        n += len(targets)
    return loss, hits, n


@pytest.mark.parametrize("name", NAMES)
def test_baseline_equals_plain_pytorch(runs, name):
    module, data, results = runs(name)
    loss, hits, n = evaluated(name, module, module.target, data)
    base = results.baseline
    assert base.n == n and base.top1 == hits / n and base.cross_entropy == pytest.approx(loss / n, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_more_ablation_does_more_damage(runs, name):
    results = runs(name)[2]
    for method in ("zero", "mean", "peak"):
        _, tenth, half, most = (point.mean for point in results.curve(method, "top1"))
        assert tenth > half > most


@pytest.mark.parametrize("name", NAMES)
def test_peak_equals_the_papers_on_raw_activations(runs, name):
    module, data, _ = runs(name)
    raw = {site.name: [] for site in module.calibration.sites}
    handles = [
        module.target.get_submodule(site).register_forward_pre_hook(
            lambda _, inputs, s=site: kept.append((s, inputs[0]))
        )
        for site in raw
    ]
    for batch in batches(name, module, data.train_dataloader()):
        kept = []
        with torch.no_grad():
            plainly(name, module.target, batch)
        for site, x in kept:
            raw[site].append(x.flatten(0, 1) if name == "vit" else x[batch["attention_mask"].bool()])
    for handle in handles:
        handle.remove()
    assert len(raw) == 4
    for site in module.calibration.sites:
        rows = torch.cat(raw[site.name]).numpy()
        assert rows.shape[1] == WIDTH[name] == site.width
        expected = torch.tensor([peak_by_numpy(rows[:, neuron]) for neuron in range(site.width)])
        found = module.calibration[site][RangeHistogram].peak()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def last_hidden(name, target, batch):
    if name == "vit":
        return target.forward_features(batch["pixel_values"])
    body = target.transformer if name == "gpt2" else target.roberta
    return body(input_ids=batch["input_ids"], attention_mask=torch.ones_like(batch["input_ids"])).last_hidden_state


def mixing(name, module, sites, side="input"):
    """How far one place's last hidden state moves when all other places change and the sites are constant."""
    loader = data_of(name)
    loader.trainer = tiny.trainer(".", AblationCallback())
    loader.trainer.strategy.connect(module)
    loader.setup("validate")
    batch = next(iter(loader.val_dataloader()))
    pair = [{key: value[i : i + 1].clone() for key, value in batch.items()} for i in (1, 2)]
    if name == "vit":
        pair[1]["pixel_values"][..., :2, 2:4] = pair[0]["pixel_values"][..., :2, 2:4]
        place = 2  # after the class token, the second patch of 2 x 2
    else:
        place = 9
        pair[1]["input_ids"][:, place] = pair[0]["input_ids"][:, place]
    with torch.no_grad(), hooked(module.target, sites, lambda _, x: torch.full_like(x, 0.1)):
        first, second = (last_hidden(name, module.target, one)[0, place] for one in pair)
    return (first - second).abs().max().item()


@pytest.mark.parametrize("name", NAMES)
def test_with_every_site_constant_nothing_mixes_and_with_one_left_out_it_does(name):
    module = module_of(name)
    sites = sites_of(name, module.target)
    assert len(sites) == 4 and mixing(name, module, sites) < 1e-4
    for left_out in range(4):
        assert mixing(name, module, sites[:left_out] + sites[left_out + 1 :]) > 1e-2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head", [0, 3])
def test_a_heads_value_rows_change_only_its_slice_of_the_site(name, head):
    """The projection's input has a slice for each head; its output, taken for the site by mistake, has not."""
    module = module_of(name)
    target, site = module.target, sites_of(name, module.target)[1]
    size = WIDTH[name] // 4
    rows = slice(head * size, (head + 1) * size)
    value = {
        "vit": lambda: target.blocks[1].attn.qkv.weight[2 * 64 :][rows],
        "gpt2": lambda: target.transformer.h[1].attn.c_attn.weight[:, 2 * 128 :][:, rows],
        "roberta": lambda: target.roberta.encoder.layer[1].attention.self.value.weight[rows],
    }[name]()
    inputs = {"pixel_values": torch.randn(2, 1, 8, 8), "input_ids": torch.randint(5, 1000, (2, 20))}

    def read():
        seen = {}
        projection = target.get_submodule(site.name)
        handles = [
            projection.register_forward_pre_hook(lambda _, args: seen.update(input=args[0])),
            projection.register_forward_hook(lambda _, args, output: seen.update(output=output)),
        ]
        with torch.no_grad():
            last_hidden(name, target, inputs)
        for handle in handles:
            handle.remove()
        return seen

    before = read()
    with torch.no_grad():
        value += torch.randn_like(value)
    after = read()
    moved = {side: (after[side] - before[side]).abs().flatten(0, -2).amax(0).view(4, size).amax(1) for side in before}
    others = [h for h in range(4) if h != head]
    assert moved["input"][head] > 1e-2 and bool((moved["input"][others] == 0).all())
    assert bool((moved["output"] > 1e-3).all())


@pytest.mark.parametrize("name", ["vit", "gpt2"])
def test_the_map_of_heads_equals_a_loop_of_plain_hooks(name, tmp_path):
    budgets = {} if name == "vit" else {"calibration_tokens": 2000, "evaluation_tokens": 2000}
    module, data, callback = module_of(name), data_of(name, **budgets), AblationCallback(["mean"], choice=EachHead())
    tiny.trainer(tmp_path, callback).fit(module, datamodule=data)
    found = {(row.part, row.head): row for row in callback.results.rows}
    assert len(found) == 1 + 4 * 4
    target, size = module_of(name).target, WIDTH[name] // 4
    places = {"vit": "blocks.{}.attn.proj", "gpt2": "transformer.h.{}.attn.c_proj"}[name]
    for layer in range(4):
        path = places.format(layer)
        projection, kept = target.get_submodule(path), []
        handle = projection.register_forward_pre_hook(lambda _, inputs, kept=kept: kept.append(inputs[0]))
        for batch in batches(name, module, data.train_dataloader()):
            with torch.no_grad():
                last_hidden(name, target, batch)
            kept[-1] = kept[-1][batch["attention_mask"].bool()] if name == "gpt2" else kept[-1].flatten(0, 1)
        handle.remove()
        mean = torch.cat(kept).double().mean(0).float()
        for head in range(4):

            def replace(_, inputs, here=slice(head * size, (head + 1) * size), mean=mean):
                changed = inputs[0].clone()
                changed[..., here] = mean[here]
                return (changed,)

            handle = projection.register_forward_pre_hook(replace)
            loss, hits, n = evaluated(name, module, target, data)
            handle.remove()
            row = found[path, head]
            assert row.n == n and row.top1 == pytest.approx(hits / n, abs=1 / n)
            assert row.cross_entropy == pytest.approx(loss / n, abs=2e-6)


@pytest.mark.parametrize("config", sorted(path.name for path in (ROOT / "configs").glob("demo_*.yaml")))
def test_shipped_config_runs(config, tmp_path, monkeypatch, pytestconfig):
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", f"--config={ROOT / 'configs' / config}", "--trainer.enable_progress_bar=false"]
    full = pytestconfig.getoption("--full")
    if not full:
        arguments += ["--ablation.fractions=[0.5]", "--ablation.seeds=[42]"]
        small = ["images=60"] if "vit" in config else ["tokens=3000"]
        arguments += [f"--data.{purpose}_{size}" for purpose in ("calibration", "evaluation") for size in small]
    AblationCLI([*arguments, "--trainer.accelerator=cpu"])
    (results,) = tmp_path.glob("lightning_logs/*/version_0/results.csv")
    counts = Counter(row.method for row in read_rows(results))
    assert counts["none"] == 1
    for method in ("zero", "mean", "peak"):
        assert counts[method] == (28 if full else 1)
    assert {counts[method] for method in counts if method.startswith("resample")} == {30 if full else 1}
    assert (results.parent / "ablation.ckpt").stat().st_size < 5 * 2**20


@pytest.mark.parametrize("config", sorted(path.name for path in (ROOT / "configs").glob("replacements_*.yaml")))
def test_replacements_past_the_paper_hurt_less(config, tmp_path, monkeypatch, full):
    """In short form in test_readme.py."""
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", f"--config={ROOT / 'configs' / config}", "--trainer.enable_progress_bar=false"]
    AblationCLI([*arguments, "--ablation.fractions=[0.1,0.5,0.9]", "--trainer.accelerator=cpu"])
    (folder,) = tmp_path.glob("lightning_logs/*/version_0")
    results = Results.load(folder)
    assert len(results.methods) == 12 and len(results.rows) == 1 + 12 * 9
    loss = {
        method: {p.fraction: p.mean - results.baseline.cross_entropy for p in results.curve(method, "cross_entropy")}
        for method in results.methods
    }
    for fraction in (0.1, 0.5, 0.9):
        here = {method: curve[fraction] for method, curve in loss.items()}
        print(config, fraction, {method: round(damage, 4) for method, damage in here.items()})
        assert here["conditional-optimal"] <= min(here["conditional"], here["optimal"]) + 0.005
        assert here["conditional"] <= 0.45 * here["mean"] or "gpt2" not in config or fraction != 0.5
        assert here["optimal"] < min(here["zero"], here["mean"], here["peak"]) or fraction < 0.5


def test_the_default_is_the_shipped_vit_config():
    default = ROOT / "lightning_ablate" / "demo" / "default.yaml"
    assert default.read_text().split("\n", 1)[1] == (ROOT / "configs" / "demo_vit.yaml").read_text().split("\n", 1)[1]
