"""The real command, killed at random moments and started again until it ends.

``python -m pytest tests/test_kills.py --full`` kills it 56 times; test_resume.py is the short form, in one process.
"""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

OPTIONS = [
    *("--data.calibration_images=200", "--data.evaluation_images=200", "--data.batch_size=5"),
    *("--ablation.fractions=[0.5,1.0]", "--ablation.note_every=0", "--ablation.folder=run"),
    *("--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"),
]
KILLS_OF_A_RUN = 4


def start(folder):
    """Starts it; one thread, so that sums come out the same whatever else runs."""
    with (folder / "said").open("w") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "lightning_ablate", "fit", *OPTIONS],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=said,
            stderr=said,
        )


def finish(process, folder):
    assert process.wait() == 0, (folder / "said").read_text()
    return (folder / "run" / "results.csv").read_bytes()


@pytest.fixture(scope="module")
def whole(full, tmp_path_factory):
    """The results of a run that lives, and its seconds before and behind the first note."""
    folder = tmp_path_factory.mktemp("whole")
    process, began = start(folder), time.monotonic()
    while not (folder / "run" / "unfinished").exists():
        assert process.poll() is None, (folder / "said").read_text()
        time.sleep(0.02)
    noted = time.monotonic()
    return finish(process, folder), noted - began, time.monotonic() - noted


def test_killed_runs_go_on_to_the_results_of_a_whole_one(whole, tmp_path):
    expected, before, behind = whole
    kills, draw, went_on = 56, random.Random(0), 0
    while kills > 0:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for _ in range(min(kills, KILLS_OF_A_RUN)):
            process = start(folder)
            time.sleep(before + draw.uniform(0, 0.6) * behind)
            if process.poll() is not None:  # it has ended before
                break
            process.send_signal(draw.choice([signal.SIGKILL, signal.SIGTERM]))
            if process.wait() == 0:  # it ended while the signal came
                break
            kills -= 1
            went_on += any(folder.glob("run/unfinished/*.pt"))
        else:
            process = start(folder)
        assert finish(process, folder) == expected
        assert not (folder / "run" / "unfinished").exists()
    assert went_on  # some of them died with something done
