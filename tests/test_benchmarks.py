import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "benchmarks"
TINY = ["--shape", "tiny", "--tokens", "64", "--batch", "2", "--length", "16", "--rounds", "1"]


@pytest.mark.parametrize(
    ("name", "options", "last"),
    [
        ("calibration", TINY, r"one-pass calibration / bare forward: \d+\.\d+"),
        ("kernel", [], r"histogram / copy: \d+\.\d+"),
        ("peaks", ["--neurons", "2"], r"smallest ratio \d+\.\d+"),
    ],
)
def test_benchmark_runs_and_ends_with_its_figure(name, options, last):
    run = subprocess.run([sys.executable, str(FOLDER / f"{name}.py"), *options], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert re.fullmatch(last, run.stdout.strip().splitlines()[-1])
