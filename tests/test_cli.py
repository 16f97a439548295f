"""The command line, in this process: `main` as the console script calls it."""

import json
import re
import shutil

import pytest
import torch

from lightning_ablate import Results
from lightning_ablate.methods import AblationMethod, constant
from tests.command import QUIET, assert_same_bytes, here

# the embedded ViT on a few images
SHORT = ["--data.calibration_images=60", "--data.evaluation_images=40", "--data.batch_size=20"]
GPT2 = ["--model=CausalLM", "--model.name=demo:gpt2"]
FEW = ["--ablation.fractions=[0.5,1.0]", "--ablation.seeds=[1,2]"]
FILES = {"report.html", "results.csv", "run.json", "examples.parquet", "degradation.png", "comparisons.png"}
FILES |= {"neurons.parquet", "neurons.png", "ablation.ckpt", "config.yaml"}


@pytest.fixture
def run(monkeypatch, tmp_path, capfd):
    """Runs the command in an empty folder; gives its exit code, what it printed, and what it said on stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        code = 0
        try:
            here(*arguments)
        except SystemExit as stop:
            code = stop.code
        said = capfd.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture
def digits(tmp_path):
    return tmp_path / "lightning_logs" / "digits"


def table(folder):
    return Results.load(folder).table


def test_fit_without_a_config_runs_the_embedded_default(run, digits):
    code, out, _ = run("fit", *SHORT, *FEW, *QUIET)
    folder = digits / "version_0"
    assert code == 0 and "demo:vit on digits: 40 scored positions" in out
    assert table(folder)[["model", "data"]].drop_duplicates().values.tolist() == [["demo:vit", "digits"]]
    assert set(table(folder)["method"]) == {"none", "zero", "mean", "peak", "resample-pixels"}
    left = {path.name for path in folder.iterdir() if not path.name.startswith(("events", "hparams"))}
    assert left == FILES | {"curves"}
    assert all(f"lightning_logs/digits/version_0/{name}" in out for name in left - {"config.yaml"})


def test_validate_repeats_the_sweep_from_the_checkpoint_alone_or_one_of_lightnings_own(run, tmp_path, digits):
    saving = ["--trainer.callbacks=ModelCheckpoint", f"--trainer.callbacks.dirpath={tmp_path / 'own'}"]
    run("fit", *SHORT, *FEW, *QUIET, "--trainer.enable_checkpointing=true", *saving)
    (theirs,), ours = (tmp_path / "own").glob("*.ckpt"), digits / "version_0" / "ablation.ckpt"
    torch.load(theirs, weights_only=True)
    trusting = ["--trust", "lightning.pytorch.callbacks.ModelCheckpoint"]
    moved = shutil.copy(ours, tmp_path / "elsewhere.ckpt")
    for number, checkpoint in enumerate((ours, theirs, moved), 1):
        code, _, err = run("validate", "--ckpt_path", checkpoint, *trusting)
        assert code == 0, err
        assert_same_bytes(digits / "version_0", digits / f"version_{number}")
    assert not (digits / "version_1" / "ablation.ckpt").exists()
    code, _, _ = run(
        "validate", f"--ckpt_path={moved}", "--ablation.methods=[mean]", "--ablation.fractions=[0.25]", *trusting
    )
    found = table(digits / "version_4").iloc[1:]
    assert code == 0 and found[["method", "fraction"]].values.tolist() == [["mean", 0.25]] * 2
    code, _, _ = run("validate", "--ckpt_path", ours, "--model.dtype=bfloat16", *trusting)
    assert code.startswith("error: the checkpoint is of another target, with the weights")


class Seven(AblationMethod):
    name = "seven"

    def prepare(self, ablation):
        return constant(torch.full((ablation.site.width,), 7.0))


def test_a_method_of_ones_own_by_its_class_path_and_sites_by_a_pattern(run, digits):
    own = ["--ablation.methods=[zero,tests.test_cli.Seven]", "--ablation.sites=blocks.[01].attn.proj"]
    code, out, _ = run("fit", *own, *SHORT, *FEW, *QUIET)
    assert code == 0 and "\nseven" in out
    facts = json.loads((digits / "version_0" / "run.json").read_text())
    assert [site["name"] for site in facts["sites"]] == ["blocks.0.attn.proj", "blocks.1.attn.proj"]


@pytest.mark.parametrize(
    ("choice", "options", "parts"),
    [
        ("Ranked", ["by=gap", "first=highest"], 1),
        ("EachHead", [], 5),
        ("EachLayer", [], 5),
        ("Only", ["heads={blocks.1.attn.proj: [0, 2]}"], 2),
    ],
)
def test_choices_have_short_names(run, digits, choice, options, parts):
    chosen = [f"--ablation.neurons={choice}", *(f"--ablation.neurons.{option}" for option in options)]
    code, out, _ = run("fit", *chosen, "--ablation.methods=[zero]", *SHORT, *FEW, *QUIET)
    assert code == 0 and ("largest first" in out) == (parts > 1)
    assert table(digits / "version_0")["part"].nunique() == parts
    assert json.loads((digits / "version_0/run.json").read_text())["neurons"]["class"] == choice
    code, _, err = run("validate", f"--ckpt_path={digits}/version_0/ablation.ckpt", *QUIET)
    assert code == 0, err
    assert_same_bytes(digits / "version_0", digits / "version_1")


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_help_shows_this_projects_options_before_the_trainers_in_plain_words(run, command):
    code, out, _ = run(command, "--help")
    places = [out.index(f"\n  --{name} ") for name in ("trust", "model", "data", "ablation", "trainer.devices")]
    assert code == 0 and places == sorted(places)
    assert (
        ("--ckpt_path" in out[: places[-1]]) == (command == "validate")
        and "``" not in out
        and not re.search(r":\w+:`", out)
    )


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("Peak", "most frequent value over the calibration data"),
        ("ResamplePartner", "an example's partner"),
        ("ConditionalMean", "--ablation.methods.ridge"),
    ],
)
def test_help_of_a_method_says_what_it_is(run, method, words):
    code, out, _ = run("fit", f"--ablation.methods.help={method}")
    assert code == 0 and words in " ".join(out.split()) and ">>>" not in out and ":class:" not in out


def test_a_second_run_in_the_same_folder_keeps_the_first(run, tmp_path):
    for _ in range(2):
        code, _, err = run("fit", "--trainer.logger=false", *SHORT, *FEW, *QUIET)
        assert code == 0, err
    logs = tmp_path / "lightning_logs"
    assert {path.name for path in tmp_path.iterdir()} == {"lightning_logs"}
    assert FILES | {"run-2"} == {path.name for path in logs.iterdir()}
    assert FILES == {path.name for path in (logs / "run-2").iterdir()}


def test_a_run_that_finds_nothing_leaves_its_folder_to_the_next(run, tmp_path):
    mine = [f"--ablation.dirpath={tmp_path / 'mine'}", "--trainer.logger=false", *SHORT, *FEW, *QUIET]
    code, _, _ = run("fit", *mine, "--ablation.sites=*.o_proj")
    assert code.startswith("error: the site pattern") and not list(tmp_path.iterdir())
    assert run("fit", *mine)[0] == 0
    assert {path.name for path in (tmp_path / "mine").iterdir()} == FILES
    assert run("validate", "--ckpt_path", tmp_path / "mine", *QUIET)[0] == 0  # a run's folder
    assert_same_bytes(tmp_path / "mine", tmp_path / "mine" / "run-2")
