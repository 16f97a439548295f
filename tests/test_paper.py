"""The paper's experiments and claims, from config to results.csv, on stand-ins of the same classes.

With ``--full`` only names are changed; otherwise the budgets and the conditions are cut.
"""

import json

import datasets
import pytest
import torch
import transformers
import yaml
from datasets import ClassLabel, Dataset, Features, Image

from lightning_ablate import Results
from lightning_ablate.cli import DEFAULT_CONFIG, AblationCLI
from lightning_ablate.data.demo import python_texts
from lightning_ablate.results.__main__ import main
from tests import tiny
from tests.command import CONFIGS

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
WIDE = {"intermediate_size": 48}
TEXT = {**SMALL, "vocab_size": tiny.VOCABULARY}


def opt():
    model = tiny.made(0, "OPTForCausalLM", "OPTConfig", **TEXT, ffn_dim=48, word_embed_proj_dim=32)
    return model, tiny.tokenizer(longest=2048), transformers.GPT2Tokenizer


def mistral():
    model = tiny.made(0, "MistralForCausalLM", "MistralConfig", **TEXT, **WIDE, num_key_value_heads=2, head_dim=12)
    texts, kind = python_texts("train")[:200], transformers.LlamaTokenizer
    return model, kind().train_new_from_iterator(texts, tiny.VOCABULARY, show_progress=False), kind


def roberta():
    options = {**TEXT, **WIDE, "max_position_embeddings": 514, "type_vocab_size": 1}
    model = tiny.made(0, "RobertaForMaskedLM", "RobertaConfig", **options)
    return model, tiny.tokenizer(masked=True, longest=512), transformers.RobertaTokenizer


def vit():
    kind = transformers.ViTImageProcessor
    model = tiny.made(0, "ViTForImageClassification", "ViTConfig", **SMALL, **WIDE, num_labels=10)
    return model, kind(image_mean=[0.5] * 3, image_std=[0.5] * 3), kind


PILE = "monology/pile-uncopyrighted"
NAMES = {
    "opt_1.3b": (opt, "facebook/opt-1.3b", PILE),
    "mistral_7b": (mistral, "mistralai/Mistral-7B-v0.1", PILE),
    "roberta_large": (roberta, "FacebookAI/roberta-large", PILE),
    "vit_b16": (vit, "google/vit-base-patch16-224", "ILSVRC/imagenet-1k"),
}
CLAIMS = {"causal": "opt_1.3b", "masked": "roberta_large", "image": "vit_b16"}  # and the stand-in of each
EXPERIMENTS = {f"paper_{name}": name for name in NAMES} | {f"claims_{kind}": name for kind, name in CLAIMS.items()}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper")
    for name, (make, *_) in NAMES.items():
        model, processor, kind = make()
        assert type(processor) is kind
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    (folder / "pile").mkdir()
    Dataset.from_dict({"text": python_texts("train")[:1000]}).to_parquet(folder / "pile" / "train.parquet")
    (folder / "imagenet").mkdir()
    images = torch.randint(256, (3000, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    columns = {"image": list(images.numpy()), "label": [i % 10 for i in range(3000)]}
    features = Features({"image": Image(), "label": ClassLabel(num_classes=10)})
    images = Dataset.from_dict(columns, features=features)
    images.to_parquet(folder / "imagenet" / "validation.parquet")
    (folder / "cifar").mkdir()
    images.rename_column("image", "img").to_parquet(folder / "cifar" / "test.parquet")  # as on the hub
    return folder


@pytest.mark.parametrize("path", [*sorted(CONFIGS.glob("*.yaml")), DEFAULT_CONFIG], ids=lambda path: path.stem)
def test_the_configs_have_the_papers_shares_and_seeds(path):
    ablation = yaml.safe_load(path.read_text())["ablation"]
    fractions, seeds = [step / 10 for step in range(1, 11)], [42, 123, 456]
    alone = ablation.get("neurons") == "EachHead"  # whatever the fractions and seeds
    assert alone or (ablation["fractions"], ablation["seeds"]) == (fractions, seeds)


def test_the_configs_name_what_the_paper_used():
    assert {path.stem for path in CONFIGS.glob("paper_*.yaml")} == {f"paper_{name}" for name in NAMES}
    for name, (_, model, data) in NAMES.items():
        config = yaml.safe_load((CONFIGS / f"paper_{name}.yaml").read_text())
        assert (config["model"]["init_args"]["name"], config["data"]["init_args"]["name"]) == (model, data)
        budgets = config["data"]["init_args"]
        if name == "vit_b16":
            assert (budgets["evaluation_images"], 197 * budgets["calibration_images"] // 1000) == (1000, 100)
        else:
            assert (budgets["evaluation_tokens"], budgets["calibration_tokens"]) == (100_000, 10_000)
            assert config["model"]["init_args"]["dtype"] == "float16"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_runs_on_a_stand_in(experiment, stand_ins, tmp_path, monkeypatch, pytestconfig, capsys):
    name = EXPERIMENTS[experiment]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 s for each stream that is closed
    data = {"paper_vit_b16": "imagenet", "claims_image": "cifar"}.get(experiment, "pile")
    more = ["--data.subset=null"] if "claims" in experiment and data == "pile" else []
    arguments = ["fit", f"--config={CONFIGS / f'{experiment}.yaml'}", *more, f"--model.name={stand_ins / name}"]
    arguments += [f"--data.name={stand_ins / data}"]
    full = pytestconfig.getoption("--full")
    if not full:
        arguments += ["--ablation.fractions=[0.5,1.0]", "--ablation.seeds=[42]", "--trainer.enable_progress_bar=false"]
        small = "images=24" if name == "vit_b16" else "tokens=1500"
        arguments += [f"--data.calibration_{small}", f"--data.evaluation_{small}"]
    AblationCLI(arguments)
    (run,) = tmp_path.glob("lightning_logs/*/version_0")
    counts = Results.load(run).table["method"].value_counts().to_dict()
    methods = yaml.safe_load((CONFIGS / f"{experiment}.yaml").read_text())["ablation"]["methods"]
    constant, drawn = (28, 30) if full else (2, 2)
    assert counts == {"none": 1} | {m: drawn if m.startswith("resample") else constant for m in methods}
    facts = json.loads((run / "run.json").read_text())
    assert facts["target"]["dtype"] == ("float32" if name == "vit_b16" or "claims" in experiment else "float16")
    assert [site["width"] for site in facts["sites"]] == [48 if name == "mistral_7b" else 32] * 2
    assert {site["heads"] for site in facts["sites"]} == {4}
    assert "scored positions" in capsys.readouterr().out
    if experiment.startswith("claims"):
        main([str(run), "--out", str(tmp_path / "claims")])
        assert (tmp_path / "claims" / "report.html").is_file()
        against = Results.load(run).ranking(other="peak").set_index("method")
        assert set(against.index) == set(methods) - {"peak"} and against[["cross_entropy", "q"]].notna().all(axis=None)
