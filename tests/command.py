"""Runs the real command, and compares what two runs of it found."""

import os
import socket
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from unittest import mock

import pandas as pd

from lightning_ablate import Results
from lightning_ablate.__main__ import main

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}  # for class paths below `tests`
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
FEW = ["--data.batch_size=8", "--ablation.fractions=[0.5,1.0]", "--ablation.seeds=[1]", "--trainer.logger=false"]
TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]


def python(*words, **options):
    """What a process of Python with these words says, and how it ends."""
    given = {"env": ENVIRONMENT, "capture_output": True, "text": True, "timeout": 600, **options}
    return subprocess.run([sys.executable, *map(str, words)], **given)


def here(*arguments):
    """Runs the command in this process."""
    with mock.patch.object(sys, "argv", ["lightning_ablate", *map(str, arguments)]):
        main()


def command(*arguments):
    return [sys.executable, "-m", "lightning_ablate", *map(str, arguments), *QUIET]


def dying(epoch, batch, signal):
    """Options by which a run kills itself behind a batch, see :class:`tests.tiny.Dies`."""
    options = {"epoch": "null" if epoch is None else epoch, "batch": batch, "signal": int(signal)}
    return ["--trainer.callbacks=tests.tiny.Dies", *(f"--trainer.callbacks.{n}={v}" for n, v in options.items())]


def found(folder, *arguments):
    """What a run leaves in a folder of its own; a run of one process is in this one."""
    made = command(*arguments, "--ablation.dirpath", folder)
    if any("devices=" in word for word in made):
        done = python(*made[1:], cwd=folder.parent)
        assert done.returncode == 0, done.stderr
    else:
        with chdir(folder.parent):
            here(*made[3:])
    return Results.load(folder)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def assert_same_bytes(one, other, names=("results.csv", "examples.parquet")):
    """That two runs ended, with the same files."""
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert not (one / "ablation.lock").exists() and not (other / "ablation.lock").exists()


def assert_same(one, other, learned=1e-6):
    """That two runs found the same to 1e-6, for every example too; methods that learn to another tolerance."""
    optimal = one.table["method"].str.contains("optimal|tuned")
    for atol, which in ((1e-6, ~optimal), (learned, optimal)):
        rows = optimal.index[which]
        pd.testing.assert_frame_equal(other.table.loc[rows], one.table.loc[rows], rtol=0, atol=atol)
        examples = [run.examples[run.examples["condition"].isin(rows)] for run in (other, one)]
        counts = ["top1", "top5", "cross_entropy", "kl"]
        tolerances = atol * examples[0]["n"].clip(lower=1).to_numpy()
        assert examples[0].drop(columns=counts).equals(examples[1].drop(columns=counts))
        for name in counts:  # of an example they are sums over its positions
            assert ((examples[0][name] - examples[1][name]).abs().to_numpy() <= tolerances).all(), name
