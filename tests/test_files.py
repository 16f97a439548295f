"""What is broken or forged ends in one line, and nothing that came in a file is run.

``--full`` tries 2,000 broken configurations and checkpoints, and real file systems that are full or read-only.
"""

import copy
import errno
import json
import os
import random
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from tempfile import mkdtemp

import lightning
import pytest
import torch
import yaml

from lightning_ablate import AblationCallback, Attribution, Calibration, Optimal
from lightning_ablate.__main__ import running
from lightning_ablate.errors import AblationError, TargetError
from lightning_ablate.export.__main__ import main as export
from lightning_ablate.files import write_whole
from tests import tiny
from tests.command import QUIET, ROOT, here, python

SMALL = ["--data.calibration_images=20", "--data.evaluation_images=20", "--ablation.fractions=[1.0]"]
RUN = ["fit", *SMALL, "--ablation.dirpath=run", "--ablation.save_every=0", "--trainer.logger=false"]
VALUES = [
    *("", "null", "-1", "1e400", ".nan", "true", "{}", "[[[]]]", "'\\0'", "999999999999999999999", "x y: z", "&a [*a]"),
    *("!!python/object/apply:os.system [touch ran]", "os.system", "__import__('os').system('touch ran')"),
    *("{class_path: os.system, init_args: {command: touch ran}}", "lightning_ablate.ImageClassifier", "../../x", "*x"),
]


def test_a_payload_in_a_checkpoint_is_refused_and_not_run(tmp_path, monkeypatch):
    class Payload:
        def __reduce__(self):
            return os.system, ("touch ran",)

    path = tmp_path / "file.ckpt"
    monkeypatch.chdir(tmp_path)
    torch.save({"callbacks": {"AblationCallback": Payload()}}, path)
    with pytest.raises(TargetError, match="could not load .*holds more than tensors and plain values"):
        Calibration.load(path, tiny.gpt2())
    with pytest.raises(SystemExit, match="error: could not load .*holds more than tensors and plain values"):
        here("validate", "--ckpt_path", path)
    with pytest.raises(Exception, match="Weights only load failed"):  # by Lightning
        tiny.validate(tmp_path, path)
    assert not (tmp_path / "ran").exists()


EVIL = """import os
from lightning.pytorch import Callback
from lightning_ablate import Digits, ImageClassifier, Zero
open(os.environ["MARK"], "w").close()
class Model(ImageClassifier): pass
class Data(Digits): pass
class Method(Zero): name = "evil"
class Writes(Callback): pass
"""
REMOTE = """import os
from transformers import ViTConfig, ViTForImageClassification
open(os.environ["MARK"], "w").close()
class C(ViTConfig): model_type = "evil"
class M(ViTForImageClassification): config_class = C
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a checkpoint of a small run of the command."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    with chdir(folder.parent):
        half = ["--ablation.methods=[zero]", "--ablation.fractions=[0.5]", "--ablation.sites=mlp"]
        here("fit", *SMALL, *half, "--ablation.seeds=[1]", f"--ablation.dirpath={folder}", *QUIET)
    return folder


@pytest.fixture
def hostile(saved, tmp_path, monkeypatch, capsys):
    """Runs the command on a checkpoint whose configuration was changed; whether what it names ran, and what was said.

    Each call has a folder of its own, as a module is imported once in a process.
    """
    state = torch.load(saved / "ablation.ckpt", weights_only=True)

    def call(change, *words, command=("validate", "--ckpt_path")):
        monkeypatch.chdir(folder := Path(mkdtemp(dir=tmp_path)))
        monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
        monkeypatch.delitem(sys.modules, "evil", raising=False)
        monkeypatch.setenv("MARK", str(folder / "ran"))
        monkeypatch.setenv("HF_MODULES_CACHE", str(folder / "modules"))
        shutil.copytree(saved, folder / "run")
        Path("evil.py").write_text(EVIL)
        Path("evil.yaml").write_text("class_path: evil.Writes")
        Path("model").mkdir()
        auto = {"AutoConfig": "remote.C", "AutoModelForImageClassification": "remote.M"}
        Path("model/config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
        Path("model/remote.py").write_text(REMOTE)
        kept = copy.deepcopy(state)
        config = yaml.safe_load(kept["callbacks"]["ConfigInCheckpoint"]["config"])
        change(config)
        kept["callbacks"]["ConfigInCheckpoint"]["config"] = yaml.safe_dump(config)
        torch.save(kept, "run/ablation.ckpt")
        before = set(folder.parent.rglob("*"))
        try:
            here(*command, "run", *words) if command[0] == "validate" else exported("run", "out", *words)
            said = ""
        except SystemExit as end:
            said = str(end.code) if isinstance(end.code, str) else capsys.readouterr().err.strip().splitlines()[-1]
        left = {path.relative_to(folder.parent) for path in set(folder.parent.rglob("*")) - before}
        return said, (folder / "ran").exists(), left

    def exported(*words):
        monkeypatch.setattr(sys, "argv", ["export", *words, "--method=zero", "--fraction=0.5"])
        running(export)

    return call


def put(path, value):
    """A change of a configuration."""

    def change(config):
        *parents, last = path.split(".")
        for name in parents:
            config = config[name]
        config[last] = value

    return change


def named(kind, **options):
    return {"class_path": kind, "init_args": options}


CALLBACKS, LOGGER = "trainer.callbacks", "trainer.logger"
HOSTILE = {
    "model": put("model.class_path", "evil.Model"),
    "data": put("data.class_path", "evil.Data"),
    "data beside": put("data.init_args.evaluation", [named("evil.Data")]),
    "a method": put("ablation.methods", [named("evil.Method")]),
    "a method by its name": put("ablation.methods", ["evil.Method"]),
    "methods by a name": put("ablation.methods", "evil.Method"),
    "a callback": put(CALLBACKS, [named("evil.Writes")]),
    "a callback by its name": put(CALLBACKS, "evil.Writes"),
    "in a file": put(CALLBACKS, "evil.yaml"),
    "a logger": put(LOGGER, [named("evil.Writes")]),
    "a strategy": put("trainer.strategy", "evil.Writes"),
    "callbacks as text": put(CALLBACKS, "[{class_path: evil.Writes}]"),
    "a callback between spaces": put(CALLBACKS, " evil.Writes "),
    "a model as text": put(
        "model",
        "{class_path: ImageClassifier, init_args: {name: model, library: transformers, trust_remote_code: yes}}",
    ),
    "a function": put(CALLBACKS, [named("LambdaCallback", on_validation_start="evil.Writes")]),
    "the rest of a package": put("data.class_path", "lightning_ablate.run.json.dumps"),
    "a callback of Lightning's": put(CALLBACKS, [named("ModelCheckpoint", dirpath="../elsewhere")]),
    "a profiler": put("trainer.profiler", named("SimpleProfiler", dirpath="../elsewhere", filename="x")),
    "a logger elsewhere": put(LOGGER, named("CSVLogger", save_dir="../elsewhere")),
    "a logger in a home": put(LOGGER, named("CSVLogger", save_dir="~/elsewhere")),
    "a logger on the net": put(LOGGER, named("CSVLogger", save_dir="s3://elsewhere")),
    "a logger's server": put(LOGGER, named("MLFlowLogger", tracking_uri="http://elsewhere")),
    "a root": put("trainer.default_root_dir", "/elsewhere"),
    "remote code": put("model.init_args", {"name": "model", "library": "transformers", "trust_remote_code": True}),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_what_a_checkpoint_names_is_refused_in_a_line_and_nothing_of_it_runs(change, hostile):
    exports = change in (HOSTILE["model"], HOSTILE["remote code"], HOSTILE["a callback"])  # which reads it in one way
    for command in (("validate", "--ckpt_path"), *([("export",)] if exports else [])):
        said, ran, left = hostile(change, command=command)
        assert said.startswith("error: the checkpoint ") and "\n" not in said and len(said) < 300, said
        assert "--trust" in said or "--model.trust_remote_code=true" in said
        assert not ran and not left


@pytest.mark.parametrize("case", ["model", "data", "a method", "a method by its name", "a callback", "in a file"])
def test_what_a_checkpoint_names_works_with_the_users_word(case, hostile):
    said, ran, left = hostile(HOSTILE[case], "--trust", "other", "--trust=evil", "--trust=evil.yaml")
    assert (said, ran) == ("", True) and any(path.match("run/run-2/results.csv") for path in left)


def test_remote_code_of_a_checkpoint_runs_if_it_is_asked_for_again(hostile):
    said, ran, _ = hostile(HOSTILE["remote code"], "--model.trust_remote_code=true")
    assert ran and "could not load 'model' (--model.name)" in said  # which holds no weights


def test_an_export_names_what_it_trusts(hostile):
    said, ran, left = hostile(HOSTILE["model"], "--trust", "evil.Model", command=("export",))
    assert (said, ran) == ("", True) and any(path.match("out/config.json") for path in left)


def test_a_checkpoint_moved_writes_its_results_beside_it(hostile):
    said, ran, left = hostile(put("ablation.dirpath", "/elsewhere"))
    assert (said, ran) == ("", False) and any(path.match("run/run-2/results.csv") for path in left)


@pytest.fixture
def many(request):
    return 2000 if request.config.getoption("--full") else 4


def mutated(content, draw):
    at, flipped = draw.randrange(len(content)), bytearray(content)
    flipped[at] ^= 1 << draw.randrange(8)
    to = min(len(content), at + draw.randrange(1, 200))
    start, middle, end, noise = content[:at], content[at:to], content[to:], draw.randbytes(to - at)
    return draw.choice([bytes(flipped), start + end, start + noise + middle + end, start + end + middle, start])


def mutated_config(text, draw):
    lines = text.splitlines()
    place = draw.randrange(len(lines))
    line, moved = lines.pop(place), " " * draw.randrange(6) + lines[place - 1].strip()
    lines[place:place] = draw.choice([[], [line, moved], [line.partition(":")[0] + ": " + draw.choice(VALUES)]])
    return draw.choice([mutated(text.encode(), draw), *4 * ["\n".join(lines).encode()]])


def test_a_mutated_configuration_is_taken_or_refused_in_a_line(tmp_path, monkeypatch, capsys, many):
    draw, refused = random.Random(0), 0
    texts = [(ROOT / "lightning_ablate/demo/default.yaml").read_text(), (ROOT / "configs/demo_gpt2.yaml").read_text()]
    monkeypatch.setattr(lightning.Trainer, "fit", lambda *args, **kwargs: None)
    monkeypatch.chdir(tmp_path)
    for _ in range(many):
        (tmp_path / "config.yaml").write_bytes(mutated_config(draw.choice(texts), draw))
        try:
            here("fit", "--config", "config.yaml")
        except SystemExit as end:
            refused += 1
            said = str(end.code) if isinstance(end.code, str) else capsys.readouterr().err.strip().splitlines()[-1]
            assert end.code != 0 and said.startswith("error: ") and "\n" not in said, said
        assert not (tmp_path / "ran").exists()
    assert many < 100 or 0.05 < refused / many < 0.95


def forged(state, draw):
    changed = part = copy.deepcopy(state)
    key = draw.choice(sorted(part, key=str))
    while isinstance(part[key], dict | list) and part[key] and draw.random() < 0.85:
        part = part[key]
        key = draw.choice(sorted(part, key=str) if isinstance(part, dict) else range(len(part)))
    kind, other = draw.randrange(3), torch.full((3, 2), torch.nan)
    if kind == 0:
        del part[key]
    elif kind == 1 and isinstance(part, dict):
        part[f"{key}x"] = part.pop(key)
    else:
        part[key] = draw.choice([None, -1, 10**30, "x", "../x", [], {}, other, other.long(), [None] * 3, True, 1e400])
    return changed


def test_a_forged_or_mutated_checkpoint_is_taken_or_refused_in_a_line(tmp_path, many):
    attribution = Attribution(["zero"], draws=1, verify=1)
    methods = ["zero", "mean", "peak", Optimal(steps=1)]
    tiny.fit(tmp_path, callback=AblationCallback(methods, [1.0], [1], attribution=attribution))
    path, draw, refused = tmp_path / "ablation.ckpt", random.Random(0), 0
    content, state = path.read_bytes(), torch.load(path, weights_only=True)
    ((name, ours),) = state["callbacks"].items()

    def validated(number):
        folder = tmp_path / str(number)
        callback = AblationCallback(["mean", "peak", Optimal(steps=1)], [1.0], [1], dirpath=folder)
        tiny.validate(tmp_path, path, callback)

    for number in range(many):
        for take in (validated, lambda _: Calibration.load(path, tiny.gpt2())):
            torch.save({**state, "callbacks": {name: forged(ours, draw)}}, path)
            if take is not validated and number % 2:
                path.write_bytes(mutated(content, draw))
            try:
                take(number)
            except AblationError as error:
                assert "\n" not in str(error)
                refused += 1
    assert many < 100 or 0.05 < refused / (2 * many) < 0.95


def last_line(folder, before="pass", earlier=True, begins="error: could not write"):
    code = f"import sys; {before}; from lightning_ablate.__main__ import main; main()"
    if earlier:
        (folder / "results.csv").write_text("earlier")
    run = python("-c", code, *RUN, cwd=folder.parent)
    assert run.returncode == 1 and "Traceback" not in run.stderr, run.stderr[-2000:]
    assert (folder / "results.csv").read_text() == "earlier" and not list(folder.rglob("*.part"))
    said = run.stderr.strip().splitlines()[-1]
    assert said.startswith(begins), said
    return said


@pytest.mark.skipif(os.name != "posix", reason="needs the limit of POSIX on the size of files")
def test_a_full_disk_ends_in_a_line_and_leaves_earlier_results(tmp_path):
    (tmp_path / "run").mkdir()
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)"
    limit += "; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))"
    assert "File too large" in last_line(tmp_path / "run", limit)


def test_a_checkpoint_that_cannot_be_written_raises_what_the_disk_said(tmp_path):
    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, content):
            if self.file.tell() > 10000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(content)

    path = tmp_path / "ablation.ckpt"
    path.write_text("earlier")
    with pytest.raises(OSError, match="No space left on device"):
        write_whole(path, lambda file: torch.save([torch.zeros(9000)] * 2 + [torch.ones(9000)], Full(file)))
    assert path.read_text() == "earlier" and list(tmp_path.iterdir()) == [path]


def test_a_small_or_read_only_disk_ends_in_a_line_and_leaves_earlier_results(tmp_path, full):
    folder = tmp_path / "run"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        assert "No space left on device" in last_line(folder)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        said = last_line(folder, earlier=False, begins="error: can't ")
        assert "Read-only file system (--ablation.dirpath)" in said
    finally:
        subprocess.run(["umount", str(folder)], check=True)
