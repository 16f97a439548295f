"""Broken configurations and forged checkpoints end in one line; nothing that came in a file is run.

``--full`` tries 2,000 of each; test_files.py does the same with the bytes of what is loaded.
"""

import copy
import random
import sys

import pytest
import torch

from lightning_ablate import AblationCallback
from lightning_ablate.__main__ import main
from lightning_ablate.errors import AblationError
from lightning_ablate.files import load, save
from tests import tiny
from tests.test_files import mutated
from tests.test_readme import ROOT

VALUES = [
    *("", "null", "-1", "0", "1e400", ".nan", "true", "[]", "{}", "[[[]]]", "'\\0'", "999999999999999999999", "x y: z"),
    *("!!python/object/apply:os.system [touch ran]", "&a [*a]", "os.system", "__import__('os').system('touch ran')"),
    *("{class_path: os.system, init_args: {command: touch ran}}", "lightning_ablate.ImageClassifier", "../../x", "*x"),
]


@pytest.fixture
def many(request):
    return 2000 if request.config.getoption("--full") else 40


def mutated_config(text, draw):
    """Changes bytes, or a line, or a value."""
    kind = draw.randrange(5)
    if kind == 0:
        return mutated(text.encode(), draw)
    lines = text.splitlines()
    place = draw.randrange(len(lines))
    if kind == 1:
        del lines[place]
    elif kind == 2:
        lines.insert(draw.randrange(len(lines)), lines[place])
    elif kind == 3:
        lines[place] = " " * draw.randrange(6) + lines[place].strip()
    else:
        lines[place] = lines[place].partition(":")[0] + ": " + draw.choice(VALUES)
    return "\n".join(lines).encode()


def test_a_mutated_configuration_is_taken_or_refused_in_a_line(tmp_path, monkeypatch, capsys, many):
    import lightning

    draw = random.Random(0)
    texts = [(ROOT / "lightning_ablate/demo/default.yaml").read_text(), (ROOT / "configs/demo_gpt2.yaml").read_text()]
    monkeypatch.setattr(lightning.Trainer, "fit", lambda *args, **kwargs: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning_ablate", "fit", "--config", "config.yaml"])
    ended = {"taken": 0, "refused": 0}
    for _ in range(many):
        content = mutated_config(draw.choice(texts), draw)
        (tmp_path / "config.yaml").write_bytes(content)
        try:
            main()
        except SystemExit as end:
            said = str(end.code) if isinstance(end.code, str) else capsys.readouterr().err.strip().splitlines()[-1]
            assert end.code != 0 and said.startswith("error: ") and "\n" not in said, (content, said)
            ended["refused"] += 1
        except BaseException as error:
            raise AssertionError(content) from error
        else:
            ended["taken"] += 1
        capsys.readouterr()
        assert not (tmp_path / "ran").exists()
    assert min(ended.values()) > many / 20


def forged(state, draw):
    """The state with one part deleted, renamed, or replaced."""
    changed = copy.deepcopy(state)
    part, key = changed, draw.choice(sorted(changed, key=str))
    while isinstance(part[key], dict | list) and part[key] and draw.random() < 0.85:
        part = part[key]
        key = draw.choice(sorted(part, key=str)) if isinstance(part, dict) else draw.randrange(len(part))
    kind = draw.randrange(3)
    if kind == 0:
        del part[key]
    elif kind == 1 and isinstance(part, dict):
        part[f"{key}x"] = part.pop(key)
    else:
        other = torch.full((3, 2), torch.nan)
        part[key] = draw.choice([None, -1, 10**30, "x", "../x", [], {}, other, other.long(), [None] * 3, True, 1e400])
    return changed


def test_a_forged_checkpoint_is_taken_or_refused_in_a_line(tmp_path, many):
    """Sealed anew, so that the checksum doesn't give it away."""
    tiny.fit(tmp_path, callback=AblationCallback(["zero", "mean", "peak"], [1.0], [1]))
    path, draw, refused = tmp_path / "ablation.ckpt", random.Random(0), 0
    state = load(path, AblationError)
    for _ in range(many):
        name = AblationCallback.__qualname__
        save({**state, "callbacks": {name: forged(state["callbacks"][name], draw)}}, path)
        trainer = tiny.trainer(tmp_path, AblationCallback(["mean", "peak"], [1.0], [1], plan_only=True))
        try:
            trainer.validate(tiny.Own(tiny.gpt2()), tiny.loader(2, seed=2), ckpt_path=path, verbose=False)
        except AblationError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > many / 20
