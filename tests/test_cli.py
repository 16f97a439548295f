"""The command line, in this process: `main` as the console script calls it."""

import csv
import shutil
import sys

import pytest
import yaml
from datasets import Dataset

from lightning_ablate import files
from lightning_ablate.__main__ import main
from tests import tiny

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
# the embedded ViT on a few images
SHORT = ["--data.calibration_images=60", "--data.evaluation_images=40", "--data.batch_size=20"]
GPT2 = ["--model=CausalLM", "--model.name=demo:gpt2"]
FEW = ["--ablation.fractions=[0.5,1.0]", "--ablation.seeds=[1,2]"]


@pytest.fixture
def run(monkeypatch, tmp_path, capfd):
    """Runs the command in an empty folder; gives its exit code, what it printed, and what it said on stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["lightning_ablate", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        said = capfd.readouterr()
        return code, said.out, said.err

    return call


def rows(folder):
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_fit_without_a_config_runs_the_embedded_default(run, tmp_path):
    code, out, _ = run("fit", *SHORT, *FEW, *QUIET)
    folder = tmp_path / "lightning_logs" / "digits" / "version_0"
    assert code == 0 and "demo:vit on digits: 40 scored positions" in out
    assert {row["method"] for row in rows(folder)} == {"none", "zero", "mean", "peak", "resample-pixels"}
    for name in (
        "results.csv",
        "run.json",
        "comparisons.csv",
        "comparisons.png",
        "intervals.csv",
        "degradation.png",
        "neurons.parquet",
        "neurons.png",
        "ablation.ckpt",
        "curves",
    ):
        assert str(folder.relative_to(tmp_path) / name) in out and (folder / name).exists()
    assert (folder / "config.yaml").is_file() and (folder / "ablation.ckpt").stat().st_size < 5 * 2**20


def test_validate_with_the_checkpoint_alone_repeats_the_sweep(run, tmp_path):
    run("fit", *SHORT, *FEW, *QUIET)
    folder = tmp_path / "lightning_logs" / "digits"
    code, _, _ = run("validate", "--ckpt_path", folder / "version_0" / "ablation.ckpt")
    assert code == 0
    assert (folder / "version_1/results.csv").read_bytes() == (folder / "version_0/results.csv").read_bytes()
    moved = shutil.copy(folder / "version_0" / "ablation.ckpt", tmp_path / "elsewhere.ckpt")
    code, _, _ = run("validate", f"--ckpt_path={moved}", "--ablation.methods=[mean]", "--ablation.fractions=[0.25]")
    found = rows(folder / "version_2")
    assert code == 0 and [(r["method"], r["fraction"]) for r in found[1:]] == [("mean", "0.25")] * 2


def test_fit_on_ones_own_model_and_data_by_two_flags(run, tmp_path, gpt2_folder):
    Dataset.from_dict({"text": tiny.TEXTS}).to_parquet(tmp_path / "own.parquet")
    own = ["--model=CausalLM", f"--model.name={gpt2_folder}", "--data=TextData", f"--data.name={tmp_path}/own.parquet"]
    sizes = ["--data.length=32", "--data.calibration_tokens=300", "--data.evaluation_tokens=300"]
    methods = ["--ablation.methods=[zero,resample-ids,resample-generated]"]
    code, out, _ = run("fit", *own, *sizes, *methods, *FEW, *QUIET)
    assert code == 0 and f"{gpt2_folder} on {tmp_path}/own.parquet" in out


def test_a_method_of_ones_own_by_its_class_path(run, tmp_path, monkeypatch):
    (tmp_path / "own_method.py").write_text(
        "import torch\n"
        "from lightning_ablate.methods import AblationMethod, constant\n"
        "class Seven(AblationMethod):\n"
        "    name = 'seven'\n"
        "    def prepare(self, ablation):\n"
        "        return constant(torch.full((ablation.site.width,), 7.0))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    code, out, _ = run("fit", "--ablation.methods=[zero,own_method.Seven]", *SHORT, *FEW, *QUIET)
    assert code == 0 and "\nseven" in out


def test_sites_by_pattern(run, tmp_path):
    code, _, _ = run("fit", "--ablation.sites=blocks.[01].attn.proj", *SHORT, *FEW, *QUIET)
    assert code == 0
    facts = yaml.safe_load((tmp_path / "lightning_logs/digits/version_0/run.json").read_text())
    assert [site["name"] for site in facts["sites"]] == ["blocks.0.attn.proj", "blocks.1.attn.proj"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["fit", "--ablation.methods=[zero,maen]"],
            "unknown method 'maen'; expected one of conditional, conditional-optimal, conditional-per-head",
        ),
        (["fit", "--ablation.fractions=[0.5,1.5]"], "fractions holds 1.5, expected a share"),
        (["fit", "--ablation.sites=*.o_proj"], "the site pattern '*.o_proj' matches no module"),
        (["fit", "--model.dtype=fp16"], "could not load 'demo:vit'"),
        (["fit", "--model.name=some/typo"], "could not load 'some/typo'"),
        (["fit", "--data.evaluation_images=5000"], "digits gives 449 evaluation images, expected 5,000"),
        (["fit", *GPT2, "--data=TextData", "--data.name=none.parquet"], "the file 'none.parquet' does not exist"),
        (
            ["fit", "--ablation.methods=[{class_path: Optimal, init_args: {stesp: 2}}]"],
            "is a class path or the name of",
        ),
        (["fit", "--ablation.methods=[resample-ids]"], "resample-ids needs an unrelated input of the kind 'ids'"),
        (["validate"], "validate needs the statistics of a calibration"),
        (["validate", "--ckpt_path=none.ckpt"], "the checkpoint 'none.ckpt' does not exist"),
        (["validate", "--ckpt_path=garbage.ckpt"], "could not load 'garbage.ckpt'"),
        (["validate", "--ckpt_path=pickle.ckpt"], "could not load 'pickle.ckpt'"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_a_non_zero_exit(run, tmp_path, arguments, message):
    (tmp_path / "garbage.ckpt").write_bytes(b"no checkpoint")
    files.save({"callbacks": tiny.Own}, tmp_path / "pickle.ckpt")  # loading it would import a class
    code, _, err = run(*arguments, *QUIET)
    assert isinstance(code, str) and code.startswith("error: ") and message in code and "\n" not in code
    assert "Traceback" not in err


def test_a_target_without_attention_is_refused_in_one_line(run, tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=tiny.VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4)
    folder = tiny.save_language_model(tmp_path / "mamba", MambaForCausalLM(config))
    short = ["--data=PythonTexts", "--data.calibration_tokens=500", "--data.evaluation_tokens=500", "--data.length=32"]
    code, _, err = run("fit", "--model=CausalLM", f"--model.name={folder}", *short, *QUIET)
    assert code.startswith("error: found no attention in the target") and "\n" not in code and "Traceback" not in err


@pytest.mark.parametrize("choice", ["EachHead", "EachLayer", "ByImportance", "ByShape", "RandomNeurons"])
def test_choices_have_short_names(run, tmp_path, choice):
    code, out, _ = run("fit", f"--ablation.choice={choice}", "--ablation.methods=[zero]", *SHORT, *FEW, *QUIET)
    assert (code == 0 and "most important first" in out) or choice in ("ByImportance", "ByShape", "RandomNeurons")
    facts = yaml.safe_load((tmp_path / "lightning_logs/digits/version_0/run.json").read_text())
    assert facts["choice"]["class"] == choice
    code, out, _ = run("validate", f"--ckpt_path={tmp_path}/lightning_logs/digits/version_0/ablation.ckpt", *QUIET)
    first, second = (tmp_path / f"lightning_logs/digits/version_{i}/results.csv" for i in (0, 1))
    assert code == 0 and first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "--ablation.methds=[zero]"], "ablation.methds"),
        (["fit", "--config=none.yaml"], "none.yaml"),
        (["fit", "--model=NoSuchModel"], "NoSuchModel"),
        (["fit", *GPT2], "data"),
    ],
)
def test_what_the_parser_refuses_ends_in_its_error(run, arguments, message):
    code, _, err = run(*arguments)
    assert code == 2 and message in err and "Traceback" not in err


def test_a_checkpoint_of_another_target_is_refused(run, tmp_path):
    run("fit", *SHORT, *FEW, *QUIET)
    checkpoint = tmp_path / "lightning_logs/digits/version_0/ablation.ckpt"
    code, _, _ = run("validate", "--ckpt_path", checkpoint, "--model.dtype=bfloat16")
    assert "error: the checkpoint is of another target: 'demo:vit' with the weights" in code
    assert rows(tmp_path / "lightning_logs/digits/version_0")


def test_help_names_the_options(run):
    code, out, _ = run("fit", "--help")
    assert code == 0 and "--ablation.methods" in out and "--trainer.devices" in out


def test_a_second_run_in_the_same_folder_keeps_the_first(run, tmp_path):
    for _ in range(2):
        code, _, err = run("fit", "--trainer.logger=false", *SHORT, *FEW, *QUIET)
        assert code == 0, err
    names = {
        "results.csv",
        "run.json",
        "comparisons.csv",
        "comparisons.png",
        "intervals.csv",
        "degradation.png",
        "neurons.parquet",
        "neurons.png",
        "ablation.ckpt",
        "config.yaml",
    }
    assert names <= {path.name for path in tmp_path.iterdir()}
    assert names == {path.name for path in (tmp_path / "run-2").iterdir()}
