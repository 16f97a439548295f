"""The real command, killed and started again until it ends; ``--full`` kills it 50 times, the short form twice.

It kills itself at the ends of epochs, where a save is due, and is killed from outside at random moments.
"""

import json
import os
import random
import signal
import time
from contextlib import suppress

import pytest

from tests.command import command, dying, started

LEARNED = {"class_path": "lightning_ablate.methods.Optimal", "init_args": {"steps": 8, "examples": 10}}
EPOCHS, BATCHES = 4, 10  # two epochs calibrate and two learn
OPTIONS = [
    *("--data.calibration_images=50", "--data.evaluation_images=50", "--data.batch_size=5", "--ablation.figures=[]"),
    f"--ablation.methods={json.dumps(['zero', 'mean', 'peak', 'noise', LEARNED])}",
    *("--ablation.save_every=0", "--ablation.dirpath=run", "--trainer.logger=false"),
]
ENDS = {0, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM}


def start(folder, *options):
    """Starts it; one thread, so that sums come out the same whatever else runs."""
    return started(folder, command("fit", *OPTIONS, *options)[2:], environment={"OMP_NUM_THREADS": "1"})


def said(folder):
    return (folder / "said.txt").read_text()


def ended(process, folder):
    process.join(300)
    assert process.exitcode in ENDS, said(folder)
    return process.exitcode


def finish(process, folder):
    assert ended(process, folder) == 0, said(folder)
    assert not (folder / "run" / "ablation.lock").exists()
    return [(folder / "run" / name).read_bytes() for name in ("results.csv", "examples.parquet")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The results of a run that lives, and its seconds before and behind the first save."""
    folder = tmp_path_factory.mktemp("whole")
    process, began = start(folder), time.monotonic()
    while not (folder / "run" / "ablation.lock").exists():
        assert process.is_alive(), said(folder)
        time.sleep(0.02)
    saved = time.monotonic()
    return finish(process, folder), saved - began, time.monotonic() - saved


def test_killed_runs_go_on_to_the_results_of_a_whole_one(whole, tmp_path, request):
    expected, before, behind = whole
    wanted, killed, draw = 50 if request.config.getoption("--full") else 2, 0, random.Random(0)
    while killed < wanted:
        folder = tmp_path / str(killed)
        folder.mkdir()
        for number in range(min(wanted - killed, 4)):
            how = (signal.SIGKILL, signal.SIGTERM)[killed % 2]
            # epochs are counted from where a run goes on
            moment = (EPOCHS - 1, BATCHES - 1) if number == 0 else draw.choice([(0, 9), (1, 0), (1, 9), (None, 5)])
            process = start(folder, *(() if number % 2 else dying(*moment, how)))
            if number % 2:
                time.sleep(before + draw.uniform(0, 0.8) * behind)
                with suppress(ProcessLookupError):
                    os.kill(process.pid, how)
            if ended(process, folder) == 0:  # before the signal came
                break
            killed += 1
        else:
            process = start(folder)
        assert finish(process, folder) == expected
