import os
import pickle
import random
import shutil
import subprocess
import sys

import pytest
import torch

from lightning_ablate import AblationCallback
from lightning_ablate.errors import StatisticsError, TargetError
from lightning_ablate.files import load, save, seal, write_whole
from tests import tiny

SMALL = ["--data.calibration_images=20", "--data.evaluation_images=20", "--ablation.fractions=[1.0]"]
STATE = {"x": torch.arange(50.0), "name": "here", "n": [1, 2]}


def test_what_is_saved_is_loaded(tmp_path):
    save(STATE, tmp_path / "file")
    found = load(tmp_path / "file", StatisticsError)
    assert torch.equal(found.pop("x"), STATE["x"]) and found == {"name": "here", "n": [1, 2]}
    assert torch.equal(torch.load(tmp_path / "file", weights_only=True)["x"], STATE["x"])  # by others as well
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def mutated(content, draw):
    """A few flipped bits, a piece cut out, put in, overwritten, moved, or the end cut off."""
    content, at = bytearray(content), draw.randrange(len(content))
    to = min(len(content), at + draw.randrange(1, 200))
    kind = draw.randrange(6)
    if kind == 0:
        for _ in range(draw.randrange(1, 4)):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del content[at:to]
    elif kind == 2:
        content[at:at] = draw.randbytes(to - at)
    elif kind == 3:
        content[at:to] = draw.randbytes(to - at)
    elif kind == 4:
        content = content[:at] + content[to:] + content[at:to]
    else:
        content = content[:at]
    return bytes(content)


def test_a_mutated_file_is_refused_and_sealed_anew_it_loads_or_is_refused(tmp_path, request):
    """The second half gets behind the checksum, at the loading itself."""
    path, draw = tmp_path / "file", random.Random(0)
    save(STATE, path)
    content = path.read_bytes()
    for _ in range(4000 if request.config.getoption("--full") else 400):
        changed = mutated(content, draw)
        if changed == content:
            continue
        path.write_bytes(changed)
        with pytest.raises(TargetError, match="could not load .*file") as caught:
            load(path, TargetError)
        assert "\n" not in str(caught.value)
        path.write_bytes(mutated(content[: -len("\nsha256 \n") - 64], draw))
        seal(path)
        try:
            load(path, TargetError)
        except TargetError as error:
            assert "\n" not in str(error)


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("make", [torch.save, lambda state, path: path.write_bytes(pickle.dumps(state))])
def test_a_payload_is_refused_and_not_run(tmp_path, make):
    path, ran = tmp_path / "file", tmp_path / "ran"
    make({"callbacks": Payload(f"touch {ran}")}, path)
    for sealed in (False, True):
        if sealed:
            seal(path)
        with pytest.raises(TargetError, match="could not load"):
            load(path, TargetError)
    with pytest.raises(Exception):  # noqa: B017 - by the Trainer, whatever it raises
        tiny.trainer(tmp_path, AblationCallback(["zero"])).validate(
            tiny.Own(tiny.gpt2()), tiny.loader(seed=2), ckpt_path=path
        )
    assert not ran.exists()


def test_a_flipped_bit_in_a_checkpoint_is_refused_from_python_too(tmp_path):
    tiny.fit(tmp_path)
    path = tmp_path / "ablation.ckpt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(TargetError, match="its checksum is another one"):
        tiny.trainer(tmp_path, AblationCallback(["zero"])).validate(
            tiny.Own(tiny.gpt2()), tiny.loader(seed=2), ckpt_path=path
        )


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_whole(tmp_path / "file", "before")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "file", "after")
    assert (tmp_path / "file").read_text() == "before" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(os.name != "posix", reason="needs a file of the size limit of POSIX")
def test_a_full_disk_ends_in_a_line_and_leaves_earlier_results(tmp_path):
    """A limit on the size of files stands for the full disk."""
    (tmp_path / "run").mkdir()
    earlier = tmp_path / "run" / "results.csv"
    earlier.write_text("earlier")
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from lightning_ablate.__main__ import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); main()"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, "fit", *SMALL, "--ablation.folder=run", "--trainer.logger=false"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1 and "Traceback" not in run.stderr, run.stderr[-2000:]
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("error: could not write") and "File too large" in last
    assert earlier.read_text() == "earlier"


@pytest.fixture
def mounted(tmp_path, full):
    """A folder of its own file system, 256 KiB large."""
    folder = tmp_path / "run"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def last_line_of_a_run(folder):
    command = [sys.executable, "-m", "lightning_ablate", "fit", *SMALL, "--ablation.folder=run"]
    run = subprocess.run(
        [*command, "--trainer.logger=false", "--ablation.note_every=0"],
        cwd=folder.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1 and "Traceback" not in run.stderr, run.stderr[-2000:]
    return run.stderr.strip().splitlines()[-1]


def test_a_small_disk_ends_in_a_line_and_leaves_earlier_results(mounted):
    (mounted / "results.csv").write_text("earlier")
    last = last_line_of_a_run(mounted)
    assert last.startswith("error: could not write") and "No space left on device" in last
    assert (mounted / "results.csv").read_text() == "earlier" and not list(mounted.rglob("*.part"))


def test_a_read_only_folder_ends_in_a_line_and_leaves_earlier_results(mounted):
    (mounted / "results.csv").write_text("earlier")
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    last = last_line_of_a_run(mounted)
    assert last.startswith("error: could not write") and "Read-only file system" in last
    assert (mounted / "results.csv").read_text() == "earlier"
