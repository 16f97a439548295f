import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = ["--shape", "tiny", "--tokens", "64", "--batch", "2", "--length", "16", "--rounds", "1"]
SMALL = ["--tokens", "512", "--conditions", "2", "--layers", "1", "--width", "64", "--rounds", "1"]


@pytest.mark.parametrize(
    ("name", "options", "last"),
    [
        ("calibration", TINY, r"one-pass calibration / bare forward: \d+\.\d+"),
        ("kernel", [], r"histogram / copy: \d+\.\d+"),
        ("peaks", ["--neurons", "2"], r"smallest ratio \d+\.\d+"),
        ("sweep", TINY, r"sweep / bare forwards: \d+\.\d+"),
        ("sweep", [*TINY, "--fold"], r"sweep / bare forwards: \d+\.\d+"),
        ("sweep", [*TINY, "--memory"], r"extra memory / batch of logits: -?\d+\.\d+"),
        ("scale", SMALL, r"largest sweep / bare forwards: \d+\.\d+"),
        ("peers", [*TINY, "--peers"], r"ours / bare forward: \d+\.\d+"),
    ],
)
def test_benchmark_runs_and_ends_with_its_figure(request, name, options, last):
    if name != "sweep" or options != TINY:
        request.getfixturevalue("full")
    command = [sys.executable, "-m", f"tests.benchmarks.{name}", *options]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert re.fullmatch(last, run.stdout.strip().splitlines()[-1])


def test_the_command_adds_little_to_its_imports(full):
    run = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.startup", "--rounds", "1"], capture_output=True, text=True, cwd=ROOT
    )
    assert re.fullmatch(r"--help beyond the imports: -?\d+\.\d+ s", run.stdout.strip().splitlines()[-1])
