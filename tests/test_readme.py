"""Every command and example of the README but the notebook's, as it stands, with stand-ins for hub and long runs."""

import contextlib
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
from datasets import Dataset
from torch.utils.data import DataLoader

from lightning_ablate import AblationCallback, LearnedMethod, Results
from tests import reference, tiny
from tests.command import ROOT, here, python
from tests.test_pairs import words_tokenizer

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT_IMAGES = ["--data.calibration_images=60", "--data.evaluation_images=40", "--data.batch_size=20"]
SHORT_TEXT = ["--data.calibration_tokens=1000", "--data.evaluation_tokens=1000"]
FEW = ["--ablation.fractions=[0.5]", "--ablation.seeds=[42]", "--trainer.enable_progress_bar=false"]
SEVERAL = {"ddp", "sharded"}
PIP = 'pip install -e ".[test]" && '


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


COMMANDS = [
    line.strip() for block in blocks("bash") for line in block.replace("\\\n", "").strip().split("\n") if line.strip()
]


def runnable():
    """Those of the paper's configs are run by tests/test_paper.py."""
    return [command for command in COMMANDS if "lightning_ablate" in command and "configs/paper_" not in command]


def test_every_command_is_known_here_the_first_installs_and_runs_and_the_second_tests():
    assert COMMANDS[:2] == [PIP + "python -m lightning_ablate fit", "python -m pytest"]
    others = {command for command in COMMANDS if "lightning_ablate" not in command}
    assert others == {"python -m pytest", "tensorboard --logdir lightning_logs"}
    assert len(runnable()) == 26
    papers = [command.split()[-1] for command in COMMANDS if "configs/paper_" in command]
    assert sorted(papers) == sorted(f"configs/{path.name}" for path in (ROOT / "configs").glob("paper_*.yaml"))


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Local models and data for the names on the hub, in a folder with the files that commands name."""
    folder = tmp_path_factory.mktemp("readme")
    Dataset.from_dict({"text": tiny.TEXTS * 5}).to_parquet(folder / "texts.parquet")
    opt = tiny.save_language_model(folder / "opt", tiny.opt())
    (folder / "configs").symlink_to(ROOT / "configs")
    tiny.gpt2().save_pretrained(folder / "gpt2")
    words_tokenizer().save_pretrained(folder / "gpt2")
    tuned = "{class_path: ConditionalTuned, init_args: {steps: 2, lr: 0.01}}"  # as the export's own process reads it
    words = "[conditional-sequential, conditional-tuned]"
    return folder, {"facebook/opt-125m": opt, words: words.replace("conditional-tuned", tuned)}


@pytest.mark.parametrize("command", runnable())
def test_command_runs(command, stand_ins, monkeypatch, capfd):
    """The first one and those that start processes in a process of their own, the others in this one."""
    folder, names = stand_ins
    monkeypatch.setattr(LearnedMethod, "steps", property(lambda self: 2, lambda self, steps: None), raising=False)
    if "lightning_ablate.results" in command:
        words = [
            name for word in command.split()[1:] for name in (sorted(folder.glob(word)) if "*" in word else [word])
        ]
        done = python(*words, cwd=folder, check=True)
        assert (folder / "lightning_logs/joined.png").is_file() and done.stdout.count("scored positions") == 3
        assert not done.stderr
        return
    words = [names.get(word, word) for word in shlex.split(command.removeprefix(PIP))]
    if "export" in command:
        shutil.rmtree(folder / "smaller", ignore_errors=True)
        done = python(*words[1:], cwd=folder)
        assert done.returncode == 0, done.stderr[-3000:]
        assert timm.create_model(f"local-dir:{folder}/smaller", pretrained=True)
        return
    if "smollm2" in command:
        words += ["--model.name", names["facebook/opt-125m"], "--data.name", "texts.parquet", "--data.subset=null"]
    if "--ckpt_path" in words:
        words[words.index("--ckpt_path") + 1] = str(min(folder.glob("lightning_logs/digits/version_*/ablation.ckpt")))
    elif "--data.name" in words:
        words += [*SHORT_TEXT, "--data.max_length=32"]
    elif "pairs" in command:
        words += ["--model.name", str(folder / "gpt2")]
    else:
        words += SHORT_TEXT if "--config" in words and "vit" not in command else SHORT_IMAGES
        words += ["--data.evaluation_images=37"] * bool(SEVERAL & set(words))  # which two processes can't share evenly
    if "BitsandbytesPrecision" in words and not (torch.cuda.is_available() and find_spec("bitsandbytes")):
        with pytest.raises(SystemExit, match="(?i)bitsandbytes"):  # as far as it goes without a GPU
            here(*words[3:])
        return
    if command.startswith(PIP) or "--trainer.devices" in words:
        done = python(*words[1:], *FEW, cwd=folder)
        assert done.returncode == 0, done.stderr[-3000:]
        said = done.stdout
        if SEVERAL & set(words):
            the_same_by_one_process(words, said, folder, monkeypatch, capfd)
    else:
        assert words[:3] == ["python", "-m", "lightning_ablate"]
        monkeypatch.chdir(folder)
        here(*words[3:], *FEW, "--trainer.accelerator=cpu")
        said = capfd.readouterr().out
    assert "results.csv" in said and "scored positions" in said


def the_same_by_one_process(words, said, folder, monkeypatch, capfd):
    """What one process finds, against what several have said."""
    alone = [word for word in words[3:] if not word.startswith("--trainer.") and word not in {"2", "cpu"} | SEVERAL]
    monkeypatch.chdir(folder)
    here(*alone, *FEW, "--trainer.accelerator=cpu")
    paths = [re.search(r"\S+results\.csv", text)[0] for text in (said, capfd.readouterr().out)]
    several, one = (Results.load((folder / path).parent).table for path in paths)
    assert len(one) == 1 + 4 and one["n"][0] == 37
    pd.testing.assert_frame_equal(one, several, rtol=0, atol=1e-6)


def test_tensorboard_finds_the_runs(stand_ins):
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    runs = EventMultiplexer().AddRunsFromDirectory(str(stand_ins[0] / "lightning_logs")).Reload().Runs()
    assert any(name.endswith("curves/peak") for name in runs)


def test_the_models_subclass_runs_as_it_stands(tmp_path):
    (own,) = [block for block in blocks("python") if "AblationModule" in block]
    body = own[own.index("class ") :].strip().splitlines()
    assert len([line for line in body if line.strip()]) <= 15
    names = {}
    exec(own, names)
    patches = {"patch_size": 8, "frequency_stride": 8, "time_stride": 8, "max_length": 32, "num_mel_bins": 16}
    sizes = {**tiny.SMALL, **patches, "intermediate_size": 32, "num_labels": 5}
    target = tiny.made(0, "ASTForAudioClassification", "ASTConfig", **sizes)
    target.save_pretrained(tmp_path / "ast")
    sounds = torch.randn(12, 32, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12) % 5
    rows = [{"input_values": x, "label": labels[i], "index": torch.tensor(i)} for i, x in enumerate(sounds)]
    loader, calibration = DataLoader(rows, batch_size=4), DataLoader(rows[:8], batch_size=4)
    callback = AblationCallback(["zero", "mean", "peak"], [0.5, 1.0], [1])
    module = names["AudioClassifier"](str(tmp_path / "ast"))
    tiny.trainer(tmp_path, callback).fit(module, calibration, loader)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(target(sounds).logits, labels)
    base = callback.results.baseline
    assert base["n"] == 12 and base["cross_entropy"] == pytest.approx(loss.item(), abs=1e-6)
    assert len(callback.run.calibration.sites) == 2 and len(callback.results.table) == 1 + 3 * 2


def test_the_own_method_and_choice_run_as_they_stand(tmp_path):
    (example,) = [block for block in blocks("python") if "ConstantMethod" in block]
    names = {}
    exec(example, names)
    callback = AblationCallback(["zero", names["Largest"]()], seeds=[1], neurons=names["EveryOther"]())
    tiny.fit(tmp_path, callback=callback)
    batches, model = list(tiny.loader(seed=1)), tiny.gpt2()
    paths = [site.name for site in tiny.sites(model)]
    highest = {path: x.amax(0) for path, x in reference.raw_activations(model, batches, paths).items()}
    mask = torch.arange(16) % 2 == 1
    put = {path: reference.put(mask, values) for path, values in highest.items()}
    loss, _, n = reference.evaluation(model, tiny.loader(seed=2), put)
    row = callback.results.table.iloc[2]
    assert row["method"] == "largest" and row["n"] == n and row["cross_entropy"] == pytest.approx(loss, abs=2e-6)


def test_the_own_metric_runs_as_it_stands(tmp_path, gpt2_folder):
    (example,) = [block for block in blocks("python") if "metrics =" in block]
    assert len([line for line in example[example.index("class ") :].splitlines() if line.strip()]) <= 6
    names = {}
    exec(example, names)
    callback = AblationCallback(["zero"], [0.5], [1])
    module = names["Confident"](gpt2_folder)
    tiny.fit(tmp_path, module, callback=callback)
    batch = next(iter(tiny.loader(6, 6, seed=2)))
    with torch.no_grad():
        scored = module.evaluate(batch)
    sure = scored.logits.softmax(1).amax(1)[scored.example >= 0]
    assert callback.results.baseline["confidence"] == pytest.approx(sure.mean().item())


def test_the_harness_example_runs_as_it_stands(tmp_path, capsys):
    """With a stand-in for the package; tests/test_harness.py has the real one."""
    (example,) = [block for block in blocks("python") if "lm_eval" in block]
    assert len(example.splitlines()) <= 15
    model = tiny.gpt2()
    tiny.fit(tmp_path, tiny.Own(model), callback=AblationCallback(["mean"], [0.5], [1], dirpath=tmp_path))
    masks = {"transformer.h.0.attn.c_proj": torch.ones(16, dtype=torch.bool)}

    def simple_evaluate(lm, tasks):
        logits = tiny.run(lm["pretrained"])
        return {"samples": {tasks[0]: [{"acc": float(one.argmax() % 2)} for one in logits.flatten(0, 1)]}}

    stand_ins = {name: types.ModuleType(name) for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface")}
    stand_ins["lm_eval"].simple_evaluate = simple_evaluate
    stand_ins["lm_eval.models.huggingface"].HFLM = dict
    with contextlib.chdir(tmp_path), mock.patch.dict(sys.modules, stand_ins):
        exec(example, {"model": model, "tokenizer": None, "masks": masks})
    assert float(capsys.readouterr().out.splitlines()[-1]) != 0
    assert reference.hooks(model) == 0
