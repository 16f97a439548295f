"""Runs the real command, and compares what two runs of it found."""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from unittest import mock

import pandas as pd
import torch

from lightning_ablate import Results
from lightning_ablate.__main__ import main

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}  # for class paths below `tests`
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
FEW = ["--data.batch_size=8", "--ablation.fractions=[0.5,1.0]", "--ablation.seeds=[1]", "--trainer.logger=false"]
TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]
IMPORTED = "lightning_ablate.cli lightning_ablate.results.figures timm datasets sklearn.datasets".split()


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


def dying(epoch, batch, how):
    """Options by which a run kills itself behind a batch, see :class:`tests.tiny.Dies`."""
    options = {"epoch": "null" if epoch is None else epoch, "batch": batch, "signal": int(how)}
    return ["--trainer.callbacks=tests.tiny.Dies", *(f"--trainer.callbacks.{n}={v}" for n, v in options.items())]


def module(name, *arguments):
    """What ``python -m`` does with these words, in this process."""
    with mock.patch.object(sys, "argv", [name, *map(str, arguments)]):
        runpy.run_module(name, run_name="__main__", alter_sys=True)


def _module(folder, said, environment, words):
    """What a fork does; what it says goes into a file."""
    os.environ |= environment
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or torch.get_num_threads()))
    os.chdir(folder)
    with (folder / said).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        module(*words)
        sys.stdout.flush()


def started(folder, words, said="said.txt", environment=None):
    """Starts ``python -m`` with these words, as a fork of a server that has imported everything, for speed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED, "tests.command"])
    process = context.Process(target=_module, args=(folder, said, environment or {}, list(map(str, words))))
    process.start()
    return process


def asked(words):
    """How many processes the words ask for."""
    return next((int(word.partition("=")[2]) for word in words if word.startswith("--trainer.devices=")), 1)


def ranks(count, words, folder):
    """The exit codes of so many processes; several are started as torchrun does."""
    every = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "GROUP_RANK": "0"}
    every |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "TORCHELASTIC_RUN_ID": "tests"}
    own = [{**every, "RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {} for rank in range(count)]
    made = [started(folder, words, f"rank{rank}.txt", own[rank]) for rank in range(count)]
    for process in made:
        process.join(300)
        process.kill()  # nothing, if it has ended
    return [process.exitcode for process in made]


def several(count, words, folder):
    """What the first of several processes says."""
    ended = ranks(count, words, folder)
    said = (folder / "rank0.txt").read_text(encoding="utf-8")
    assert not any(ended), said[-3000:]
    return said


def killed(folder, *arguments, batch):
    """Runs the command into a folder until it kills itself behind a batch of its sweep."""
    made = command(
        *arguments, *dying(None, batch, signal.SIGKILL), "--ablation.figures=[]", "--ablation.dirpath", folder
    )
    assert -signal.SIGKILL in ranks(asked(made), made[2:], folder.parent)


def found(folder, *arguments):
    """What a run leaves in a folder of its own; a run of one process is in this one."""
    made = command(*arguments, "--ablation.dirpath", folder)
    if asked(made) > 1:
        several(asked(made), [*made[2:], "--ablation.figures=[]"], folder.parent)
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
