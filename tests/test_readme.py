"""Every command and example of every README, with stand-ins for the hub, for GPUs and for long runs."""

import contextlib
import os
import re
import shlex
import shutil
import sys
import types
from importlib.util import find_spec
from unittest import mock

import pandas as pd
import pytest
import timm
import torch
import yaml
from datasets import Dataset
from safetensors.torch import save_file

from lightning_ablate import AblationCallback, LearnedMethod, Results
from tests import demos, reference, tiny
from tests.command import ROOT, module, several
from tests.test_bases import autoencoder
from tests.test_pairs import words_tokenizer

PAGES = [
    ROOT / "README.md",
    *sorted({*ROOT.glob("*/README.md"), *ROOT.glob("lightning_ablate/*/README.md")}),
    ROOT / ".github/CONTRIBUTING.md",
]
SHORT_IMAGES = ["--data.calibration_images=60", "--data.evaluation_images=37", "--data.batch_size=20"]  # 37 is odd
SHORT_TEXT = ["--data.calibration_tokens=600", "--data.evaluation_tokens=400", "--data.max_length=32"]
PAIRS = "calibration_examples: 20, evaluation_examples: 20, max_length: 24, reverse: true, spans: [subject, object]"
SHORT_PAIRS = ["--data.calibration_examples=20", "--data.evaluation_examples=20"]
SHORT_PAIRS += [f"--data.evaluation=[{{class_path: IndirectObjects, init_args: {{{PAIRS}}}}}]"]
STAND_INS = {
    "facebook/opt-125m": "opt",
    "[conditional-tuned]": "[{class_path: ConditionalTuned, init_args: {lr: 0.01}}]",  # as it takes two steps only
    "max_length: 128, evaluation_tokens: 5000": "max_length: 32, evaluation_tokens: 400",
    "--ablation.attribution.verify 8": "--ablation.attribution.verify 2 --ablation.attribution.draws 1",
}
FEW = ["--ablation.fractions=[0.5]", "--ablation.seeds=[42]", "--trainer.accelerator=cpu"]
PIP = 'pip install -e ".[test]" && '
# python examples that have a test of their own; the one with a Trainer is in test_notebook.py
TESTED = ("(AblationModule)", "(CausalLM)", "DataModule)", "(ActivationStatistic)", "(ConstantMethod)", "(Choice)")
TESTED += ("lm_eval", "Trainer(")

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # runpy runs a module again


def blocks(language):
    """The code blocks of all pages, each distinct one once, with continued lines joined."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    found = (block for page in PAGES for block in pattern.findall(page.read_text(encoding="utf-8")))
    return list(dict.fromkeys(found))


def example(word):
    (found,) = [block for block in blocks("python") if word in block]
    return found


def lines(language):
    """The commands in these blocks, each once; comments are none."""
    joined = "".join(blocks(language)).replace("\\\n", " ").splitlines()
    return list(dict.fromkeys(" ".join(line.split()) for line in joined if line.strip() and line[0] != "#"))


COMMANDS = lines("bash")
ELSEWHERE = re.compile("configs/(paper|claims)_|lightning_logs/claims_")  # test_paper.py
RUNNABLE = [command for command in COMMANDS if "lightning_ablate" in command and not ELSEWHERE.search(command)]


def test_the_readme_is_short_and_every_command_of_every_page_is_known_here():
    text = PAGES[0].read_text(encoding="utf-8").splitlines()
    assert len(text) <= 150 and max(len(line) for line in text if line[:1] != "|") <= 200
    assert COMMANDS[0] == PIP + "python -m lightning_ablate fit"
    others = {command for command in COMMANDS if "lightning_ablate" not in command}
    assert others == {"python -m pytest", "python -m pytest --full"}
    named = {word for command in COMMANDS for word in command.split() if word.startswith("configs/")}
    assert named >= {f"configs/{path.name}" for path in (ROOT / "configs").glob("[cp]*_*.yaml")}
    assert len(RUNNABLE) > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(page):
    text = page.read_text(encoding="utf-8")
    for path, heading in re.findall(r'(?:\]\(|src=")(?!http)([^)#"]*)#?([^)"]*)[)"]', text):
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), path
        headings = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.MULTILINE) if heading else []
        slugs = [re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings]
        assert not heading or heading in slugs, f"{path}#{heading}"


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Local models and data for the names on the hub, in a folder with the files that commands name."""
    folder = tmp_path_factory.mktemp("readme")
    Dataset.from_dict({"text": tiny.TEXTS * 5}).to_parquet(folder / "texts.parquet")
    tiny.save_language_model(folder / "opt", tiny.opt())
    (folder / "configs").symlink_to(ROOT / "configs")
    tiny.save_language_model(folder / "mixtral", tiny.mixtral())
    tiny.gpt2().save_pretrained(folder / "gpt2")
    save_file({"directions": torch.randn(2, demos.WIDTH["gpt2"])}, folder / "directions.safetensors")
    autoencoder(folder / "features", "topk", features=demos.WIDTH["gpt2"])
    words_tokenizer().save_pretrained(folder / "gpt2")
    return folder


@pytest.fixture(scope="module")
def alone():
    """What one process finds with the default command, to be filled by the first test that needs it."""
    return []


@pytest.mark.parametrize("command", RUNNABLE, ids=lambda command: command.split("lightning_ablate", 1)[-1][:80])
def test_command_runs(command, stand_ins, alone, monkeypatch, capfd):
    folder = stand_ins
    monkeypatch.chdir(folder)
    monkeypatch.setattr(LearnedMethod, "steps", property(lambda self: 2, lambda self, steps: None), raising=False)
    for there, here in STAND_INS.items():
        command = command.replace(there, here)
    python, _, name, *words = shlex.split(command.removeprefix(PIP))
    assert python == "python"
    if name != "lightning_ablate":
        shutil.rmtree(folder / "smaller", ignore_errors=True)
        given = [path for word in words for path in (sorted(folder.glob(word)) if "*" in word else [word])]
        module(name, *given)
        said = capfd.readouterr().out
        if name == "lightning_ablate.export":
            assert timm.create_model(f"local-dir:{folder}/smaller", pretrained=True)
        else:
            assert "scored positions" in said and (folder / words[words.index("--out") + 1] / "joined.csv").is_file()
        return
    if "configs/pairs_gpt2.yaml" in words:
        words += ["--model.name", "gpt2", *SHORT_PAIRS]
    elif "--data.name" in words or re.search("gpt2|roberta", command):
        words += SHORT_TEXT
    elif "validate" not in words:
        words += SHORT_IMAGES
    if "BitsandbytesPrecision" in words and not (torch.cuda.is_available() and find_spec("bitsandbytes")):
        with pytest.raises(SystemExit, match="(?i)bitsandbytes"):  # as far as it goes without a GPU
            module(name, *words)
        return
    words += [*FEW, "--trainer.enable_progress_bar=false"]
    if "--trainer.devices" in words:
        said = several(2, [name, *words, "--ablation.figures=[]"], folder)
        the_same_by_one_process(said, alone, capfd)
    else:
        module(name, *words)
        said = capfd.readouterr().out
    assert "results.csv" in said and "scored positions" in said


def the_same_by_one_process(said, alone, capfd):
    """What one process finds, against what several have said."""
    if not alone:
        module("lightning_ablate", "fit", *SHORT_IMAGES, *FEW, "--trainer.enable_progress_bar=false")
        alone.append(table_of(capfd.readouterr().out))
    assert len(alone[0]) == 1 + 4 and alone[0]["n"][0] == 37
    pd.testing.assert_frame_equal(alone[0], table_of(said), rtol=0, atol=1e-6)


def table_of(said):
    return Results.load(os.path.dirname(re.search(r"\S+results\.csv", said)[0])).table


def test_tensorboard_finds_the_runs(stand_ins):
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    runs = EventMultiplexer().AddRunsFromDirectory(str(stand_ins / "lightning_logs")).Reload().Runs()
    assert any(name.endswith("curves/peak") for name in runs)


def test_the_other_python_examples_run_beside_the_runs_that_the_commands_left(stand_ins, monkeypatch):
    monkeypatch.chdir(stand_ins)
    for block in blocks("python"):
        if not any(word in block for word in TESTED):
            exec(block, {})


def test_the_sbatch_file_starts_as_many_processes_as_the_trainer_expects(stand_ins, monkeypatch, capfd):
    (script,) = [block for block in blocks("sh") if "#SBATCH" in block]
    asked = dict(re.findall(r"#SBATCH --([\w-]+)=(\S+)", script))
    (command,) = lines("sh")
    srun, python, _, name, *words = shlex.split(command)
    assert (srun, python) == ("srun", "python")
    monkeypatch.chdir(stand_ins)
    with pytest.raises(SystemExit):
        module(name, *words, "--print_config")
    trainer = yaml.safe_load(capfd.readouterr().out)["trainer"]
    assert asked["nodes"] == str(trainer["num_nodes"])
    assert asked["ntasks-per-node"] == asked["gpus-per-node"] == str(trainer["devices"])


def test_the_model_and_the_data_run_as_they_stand(tmp_path):
    own = example("(AblationModule)")
    body = own[own.index("class ") :].strip().splitlines()
    assert len([line for line in body if line.strip()]) <= 15
    names = {}
    exec(own + example("DataModule)"), names)
    patches = {"patch_size": 8, "frequency_stride": 8, "time_stride": 8, "max_length": 32, "num_mel_bins": 16}
    sizes = {**tiny.SMALL, **patches, "intermediate_size": 32, "num_labels": 5}
    target = tiny.made(0, "ASTForAudioClassification", "ASTConfig", **sizes)
    target.save_pretrained(tmp_path / "ast")
    sounds = torch.randn(20, 32, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % 5
    torch.save((sounds, labels), tmp_path / "sounds.pt")
    callback = AblationCallback(["zero", "mean", "peak"], [0.5, 1.0], [1])
    model = names["AudioClassifier"](str(tmp_path / "ast"))
    tiny.trainer(tmp_path, callback).fit(model, datamodule=names["Spectrograms"](tmp_path / "sounds.pt"))
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(target(sounds[8:]).logits, labels[8:])
    base = callback.results.baseline
    assert base["n"] == 12 and base["cross_entropy"] == pytest.approx(loss.item(), abs=1e-6)
    assert len(callback.run.calibration.sites) == 2 and len(callback.results.table) == 1 + 3 * 2


def test_the_statistic_the_method_and_the_choice_run_as_they_stand(tmp_path):
    names = {}
    exec("".join(map(example, ("(ActivationStatistic)", "(ConstantMethod)", "(Choice)"))), names)
    callback = AblationCallback(["zero", names["LargestValue"]()], seeds=[1], neurons=names["EveryOther"]())
    tiny.fit(tmp_path, callback=callback)
    batches, model = list(tiny.loader(seed=1)), tiny.gpt2()
    paths = [site.name for site in tiny.sites(model)]
    highest = {path: x.amax(0) for path, x in reference.raw_activations(model, batches, paths).items()}
    mask = torch.arange(16) % 2 == 1
    put = {path: reference.put(mask, values) for path, values in highest.items()}
    loss, _, n = reference.evaluation(model, tiny.loader(seed=2), put)
    row = callback.results.table.iloc[2]
    assert row["method"] == "largest" and row["n"] == n and row["cross_entropy"] == pytest.approx(loss, abs=2e-6)


def test_the_metric_runs_as_it_stands(tmp_path, gpt2_folder):
    own = example("(CausalLM)")
    assert len([line for line in own[own.index("class ") :].splitlines() if line.strip()]) <= 6
    names = {}
    exec(own, names)
    callback = AblationCallback(["zero"], [0.5], [1])
    model = names["Confident"](gpt2_folder)
    tiny.fit(tmp_path, model, callback=callback)
    batch = next(iter(tiny.loader(6, 6, seed=2)))
    with torch.no_grad():
        scored = model.evaluate(batch)
    sure = scored.logits.softmax(1).amax(1)[scored.example >= 0]
    assert callback.results.baseline["confidence"] == pytest.approx(sure.mean().item())


def test_the_harness_example_runs_as_it_stands(tmp_path, capsys):
    """With a stand-in for the package; tests/test_harness.py has the real one."""
    own = example("lm_eval")
    assert len(own.splitlines()) <= 15
    model = tiny.gpt2()
    tiny.fit(tmp_path, tiny.Own(model), callback=AblationCallback(["mean"], [0.5], [1], dirpath=tmp_path))
    masks = {"transformer.h.0.attn.c_proj": torch.ones(16, dtype=torch.bool)}

    def simple_evaluate(lm, tasks):
        logits = tiny.run(lm["pretrained"])
        return {"samples": {tasks[0]: [{"acc": float(one.argmax() % 2)} for one in logits.flatten(0, 1)]}}

    fakes = {name: types.ModuleType(name) for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface")}
    fakes["lm_eval"].simple_evaluate = simple_evaluate
    fakes["lm_eval.models.huggingface"].HFLM = dict
    with contextlib.chdir(tmp_path), mock.patch.dict(sys.modules, fakes):
        exec(own, {"model": model, "tokenizer": None, "masks": masks})
    assert float(capsys.readouterr().out.splitlines()[-1]) != 0
    assert reference.hooks(model) == 0
