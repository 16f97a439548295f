"""Wrong inputs: each ends in one line that names the option or argument."""

import math
import shlex

import pandas as pd
import pytest
import torch

from lightning_ablate import (
    AblationCallback,
    Attribution,
    Calibration,
    ConditionalMean,
    ConstantMethod,
    MaskedLM,
    Only,
    Optimal,
    Ranked,
    Results,
    Scored,
    TextData,
    Zero,
    ablated,
    load,
)
from lightning_ablate.errors import ConfigError, DataError, SiteError, StatisticsError, TargetError
from tests import tiny
from tests.command import QUIET, here

GPT2 = "--model=CausalLM --model.name=demo:gpt2"
TEXT = f"fit {GPT2} --data=TextData --data.name=texts.parquet --data.max_length=64"
LABELS = "fit --model=SequenceClassifier --model.name=demo:roberta --data=LabelledTexts --data.name=texts.parquet"
ROBERTA = "fit --model=MaskedLM --model.name=demo:roberta --data=PythonTexts"
YAML = {"bad.yaml": "model: [1, 2\n", "near.yaml": "ablation: {method: [zero]}"}
ONLY = "fit --ablation.neurons=Only"

COMMANDS = [  # the command, and what its message names
    ("test", "'test', expected fit or validate"),
    ("fit extra", "extra"),
    ("fit --ablation.methds=[zero]", "no such option --ablation.methds (did you mean --ablation.methods?)"),
    ("fit --ablation.fraction=0.5", "no such option --ablation.fraction (did you mean --ablation.fractions?)"),
    ("fit --ablation.dirpth=x", "--ablation.dirpth (did you mean --ablation.dirpath?)"),
    ("fit --config=near.yaml", "no such option --ablation.method (did you mean --ablation.methods?)"),
    ("fit --ablation.methods=[zero,maen]", "--ablation.methods has no 'maen'; alike: mean"),
    ("fit --ablation.methods=[]", "expected at least one (--ablation.methods '[mean]'), an attribution ("),
    ("fit --ablation.methods=[zero,zero]", "--ablation.methods"),
    ("fit --ablation.methods=3", "--ablation.methods"),
    ("fit --ablation.methods='[{class_path: Optimal, init_args: {stesp: 2}}]'", "--ablation.methods"),
    ("fit --ablation.methods='[{class_path: Optimall}]'", "Optimall}] (--ablation.methods)"),
    ("fit --ablation.methods=[my_module.Largest]", "(--ablation.methods): No module named 'my_module'"),
    ("fit --ablation.methods=[torch.nn.Linear]", "torch.nn.Linear (--ablation.methods)"),
    ("fit --ablation.methods='[{class_path: Optimal, init_args: {steps: 0}}]'", "steps is 0"),
    ("fit --ablation.methods='[{class_path: ConditionalMean, init_args: {ridge: -1}}]'", "ridge is -1.0, expected"),
    ("fit --ablation.methods=[resample-ids]", "'ids', which ImageClassifier doesn't make"),
    ("fit --ablation.fractions=[1.5]", "--ablation.fractions"),
    ("fit --ablation.fractions=[]", "--ablation.fractions"),
    ("fit --ablation.fractions=half", "--ablation.fractions: expected Sequence or float, got half (--help"),
    ("fit --ablation.seeds=[]", "--ablation.seeds"),
    ("fit --ablation.seeds=[1.5]", "--ablation.seeds: expected int, got 1.5"),
    ("fit --ablation.sites=*.o_proj", "'*.o_proj' (--ablation.sites) matches no module"),
    ("fit --ablation.sites=cross-attention", "'cross-attention' (--ablation.sites), it has mlp, self-attention"),
    ("fit --ablation.sites=blocks.0.norm1", "--ablation.sites"),
    ("fit --ablation.sites=[]", "--ablation.sites"),
    (
        "fit --ablation.neurons=EachHed",
        "--ablation.neurons: no such class 'EachHed', expected EachExpert, EachHead, EachLayer, Only",
    ),
    (ONLY, "--ablation.neurons.heads"),
    (f"{ONLY} --ablation.neurons.heads='{{nowhere: [0]}}'", "'nowhere' (--ablation.neurons), expected one of blocks.0"),
    (f"{ONLY} --ablation.neurons.heads='{{blocks.0.attn.proj: [9]}}'", "(--ablation.neurons), expected 0 to 3"),
    ("fit --ablation.neurons=Ranked --ablation.neurons.by=size", "--ablation.neurons.by: expected 'sd', 'rms'"),
    ("fit --ablation.neurons=Random --ablation.neurons.unit=head --ablation.sites=mlp", "--ablation.sites"),
    ("fit --ablation.dirpath=file", "--ablation.dirpath"),
    ("fit --ablation.dirpath=file/below", "can't make 'file/below': Not a directory (--ablation.dirpath)"),
    ("fit --ablation.save_every=soon", "--ablation.save_every"),
    ("fit --model=NoSuchModel", "--model: no such class 'NoSuchModel', expected CausalLM, ImageClassifier"),
    ("fit --model=gpt-2", "--model: no such class 'gpt-2', expected CausalLM"),
    ("fit --model=./my.yaml", "'./my.yaml' (--model): there is no such file or folder"),
    ("fit --model=torch.nn.Linear", "--model: no such class 'torch.nn.Linear', expected CausalLM"),
    ("fit --model=broken.Model", "could not load 'broken.Model' (--model): division by zero"),
    (
        "fit --trainer.callbacks='[{class_path: ModelCheckpoint, init_args: {save_top_k: x}}]'",
        "save_top_k: expected int",
    ),
    ("fit --model.nme=x", "no such option --model.nme (did you mean --model.name?)"),
    ("fit --model.revison=x", "no such option --model.revison (did you mean --model.revision?)"),
    ("fit --model.name=demo:bert", "expected one of demo:gpt2, demo:roberta, demo:vit (--model.name)"),
    ("fit --model.name=./nowhere", "'./nowhere' (--model.name): there is no such file or folder"),
    ("fit --model.dtype=fp16", "--model.dtype"),
    ("fit --model.library=tmm", "--model.library: expected 'timm', 'transformers', got tmm"),
    (f"fit {GPT2}", "required: --data"),
    (f"fit {GPT2} --data=TextData", "required: --data.name"),
    (f"fit {GPT2} --data=Digits", "--data"),
    ("fit --data=NoData", "--data: no such class 'NoData', expected Digits, ImageData, IndirectObjects"),
    ("fit --data.evaluation_images=5000", "--data.evaluation_images"),
    ("fit --data.calibration_images=0", "--data.calibration_images"),
    (f"{TEXT} --data.name=none.parquet", "'none.parquet' does not exist (--data.name)"),
    (f"{TEXT} --data.name=no/such", "'no/such' (--data)"),
    (f"{TEXT} --data.text_column=body", "no column 'body', it has label, text (--data)"),
    (f"{TEXT} --data.text_column=label", "holds 1 in 'label', expected text"),
    (f"{TEXT} --data.max_length=1", "--data.max_length"),
    (f"{TEXT} --data.name=./nowhere", "'./nowhere' (--data): there is no such file or folder"),
    (f"{TEXT} --data.tokenizer=./nowhere", "(--data.tokenizer): there is no such file or folder"),
    (f"{TEXT} --data.cluster_column=author", "no column 'author', it has label, text (--data)"),
    (f"{TEXT} --data.calibration_tokens=99999", "--data.calibration_tokens"),
    (f"{TEXT} --data.packing=squeeze", "--data.packing: expected 'pad', 'pack', got squeeze"),
    (f"{TEXT} --data.batch_size=0", "--data.batch_size"),
    (f"{TEXT} --data.evaluation_split=test --data.calibration_tokens=99", 'Unknown split "test"'),
    (f"{TEXT} --data.tokenizer=nowhere", "--data.tokenizer"),
    (f"{LABELS} --data.label_column=text", "holds 'a text of"),
    (f"{ROBERTA} --model.mlm_probability=2", "--model.mlm_probability"),
    (ROBERTA.replace("roberta", "gpt2"), "--model.name"),
    ("fit --trainer.max_steps=5", "max_steps"),
    ("fit --trainer.val_check_interval=0.5", "--trainer.val_check_interval"),
    ("fit --trainer.val_check_interval=1", "--trainer.val_check_interval"),
    ("fit --trainer.limit_train_batches=0", "--trainer.limit_"),
    ("fit --trainer.limit_val_batches=0", "--trainer.limit_"),
    ("fit --trainer.accumulate_grad_batches=2", "accumulate_grad_batches"),
    ("fit --trainer.gradient_clip_val=1", "gradient_clip_val"),
    ("fit --trainer.devices=0", "Trainer(devices='0')"),
    ("fit --trainer.strategy=nonsense", "strategy='nonsense'"),
    ("fit --trainer.logger=NoLogger", "--trainer.logger"),
    ("fit --config=none.yaml", "--config"),
    ("fit --config=bad.yaml", "Problems parsing config"),
    ("fit --ckpt_path=garbage.ckpt", "--ckpt_path"),
    ("validate", "--ckpt_path"),
    ("validate --ckpt_path=none.ckpt", "--ckpt_path"),
    ("validate --ckpt_path=garbage.ckpt", "'garbage.ckpt' (--ckpt_path)"),
    ("validate --ckpt_path=pickle.ckpt", "'pickle.ckpt' (--ckpt_path)"),
    ("validate --ckpt_path=empty.ckpt", "(--ckpt_path): it lacks 'callbacks'"),
]


@pytest.mark.parametrize(("command", "named"), COMMANDS, ids=[command for command, _ in COMMANDS])
def test_a_wrong_command_ends_in_one_line(command, named, monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    rows = {"text": [f"a text of {n}" for n in range(300)], "label": [1] * 300}
    pd.DataFrame(rows).to_parquet("texts.parquet")
    monkeypatch.syspath_prepend(tmp_path)
    for name, content in {"file": "", "broken.py": "1 / 0", "garbage.ckpt": "no checkpoint", **YAML}.items():
        (tmp_path / name).write_text(content)
    torch.save({"callbacks": tiny.Own}, "pickle.ckpt")  # loading it would import a class
    torch.save({"state_dict": {}}, "empty.ckpt")
    quiet = [] if command in ("test", "fit extra") else QUIET
    with pytest.raises(SystemExit) as stopped:
        here(*shlex.split(command), *quiet)
    printed = capfd.readouterr().err
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    said = stopped.value.code if isinstance(stopped.value.code, str) else "\n".join(lines)
    assert said.startswith("error: ") and named in said and "\n" not in said and len(said) < 300
    assert "Traceback" not in printed
    for folder in (path.parent for path in tmp_path.rglob("config.yaml")):  # only beside what was found
        assert (folder / "ablation.ckpt").exists()


class Wrong(tiny.Own):
    """One that scores wrongly."""

    def __init__(self, make):
        super().__init__(tiny.gpt2())
        self.make = make

    def evaluate(self, batch):
        return self.make(batch, tiny.Own.evaluate(self, batch))


class Short(ConstantMethod):
    name = "short"

    def values(self, site, statistics):
        return torch.zeros(3)


def scored(make):
    return lambda folder: tiny.fit(folder, module=Wrong(make))


def under(masks, method="zero"):
    def run(folder):
        with ablated(tiny.gpt2(), masks, method):
            pass

    return run


HALF, PATH = torch.arange(16) < 8, "transformer.h.0.attn.c_proj"
CALLS = {  # what is called, and what its message names
    ConfigError: [
        (lambda folder: AblationCallback([Zero]), "got the class Zero; expected Zero()"),
        (lambda folder: AblationCallback(["maen"]), "--ablation.methods has no 'maen'"),
        (lambda folder: AblationCallback(["{'class_path': 'Peek'}"]), "is the class path, or an option's name, wrong"),
        (lambda folder: AblationCallback(["zero", "zero"]), "['zero'] more than once"),
        (lambda folder: AblationCallback(fractions=2), "fractions holds 2"),
        (lambda folder: AblationCallback(fractions=[math.nan]), "fractions holds nan, expected shares"),
        (lambda folder: AblationCallback(seeds=["a"]), "--ablation.seeds"),
        (lambda folder: AblationCallback(seeds=[]), "seeds is empty"),
        (lambda folder: AblationCallback(neurons="EachHead"), "neurons is 'EachHead', expected a Choice"),
        (lambda folder: Attribution(verify=3), "attribution names no methods"),
        (lambda folder: Attribution(["meen"]), "--ablation.attribution.methods has no 'meen'; alike: mean"),
        (lambda folder: Attribution(["mean", "mean"]), "attribution names mean, mean, expected each once"),
        (lambda folder: Attribution(["zero"], draws=0), "draws is 0"),
        (lambda folder: Attribution(["zero"], examples=0), "examples 0"),
        (lambda folder: ConditionalMean(0), "ridge is 0, expected"),
        (lambda folder: Optimal(steps=0), "steps is 0"),
        (lambda folder: Only(), "no heads and no neurons are named"),
        (lambda folder: Ranked("size"), "by is 'size', expected one of sd, rms"),
        (lambda folder: MaskedLM("masked", mlm_probability=0), "mlm_probability is 0"),
        (lambda folder: MaskedLM("masked", mlm_probability=1.5), "mlm_probability is 1.5"),
        (lambda folder: TextData("a", calibration_tokens=0), "calibration_tokens is 0"),
        (lambda folder: TextData("a").setup("fit"), "--data.tokenizer"),
        (under({PATH: HALF}, "resample-ids"), "resample-ids needs a `source`"),
        (
            lambda folder: tiny.fit(folder, callback=AblationCallback([Short()])),
            "short gives values (3,) at transformer",
        ),
    ],
    TargetError: [(lambda folder: Calibration.load(folder / "none.ckpt", tiny.gpt2()), "none.ckpt")],
    SiteError: [
        (under({"nowhere": HALF}), "no site 'nowhere'"),
        (under({"transformer.wte": HALF}), "no site 'transformer.wte'; it is named by"),
        (under({PATH: HALF[:3]}), "(3,) torch.bool, expected (16,)"),
        (under({PATH: HALF.float()}), "(16,) torch.float32, expected (16,) torch.bool, True for"),
    ],
    StatisticsError: [(under({PATH: HALF}, "mean"), "Moments")],
    DataError: [
        (lambda folder: Results.load(folder / "nowhere"), "nowhere/results.csv"),
        (lambda folder: load([folder]), "results.csv"),
        (scored(lambda batch, right: right.logits), "expected Scored(logits, targets, example)"),
        (scored(lambda batch, right: Scored(right.logits[0], *right[1:])), "expected (n, classes), (n,) and (n,)"),
        (scored(lambda batch, right: right._replace(targets=right.targets + 9999)), "expected targets from 0 to 299"),
        (scored(lambda batch, right: right._replace(example=right.example % 3)), "`example` must be its place"),
        (scored(lambda batch, right: right._replace(example=right.example + 6)), "beyond the 6 of the evaluation data"),
    ],
}
ROWS = [(kind, *row) for kind, rows in CALLS.items() for row in rows]


@pytest.mark.parametrize(("kind", "call", "named"), ROWS, ids=[named for *_, named in ROWS])
def test_a_wrong_call_raises_one_line(kind, call, named, tmp_path):
    with pytest.raises(kind) as raised:
        call(tmp_path)
    said = str(raised.value)
    assert named in said and "\n" not in said and len(said) < 300
