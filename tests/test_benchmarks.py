import re

import pytest

from tests.command import ROOT, python
from tests.results.conftest import make

TINY = ["--shape", "tiny", "--tokens", "64", "--batch", "2", "--length", "16", "--rounds", "1"]
SMALL = ["--tokens", "512", "--conditions", "2", "--layers", "1", "--width", "64", "--rounds", "1"]


def check(name, options, last):
    run = python("-m", f"tests.benchmarks.{name}", *options, cwd=ROOT, timeout=None)
    assert run.returncode == 0, run.stderr
    assert re.search(rf"(^|\n){last}\n$", run.stdout)


def test_a_benchmark_runs_and_ends_with_its_figure():
    check("sweep", TINY, r"sweep / bare forwards: \d+\.\d+")


@pytest.mark.parametrize(
    ("name", "options", "last"),
    [
        ("calibration", [*TINY, "--memory"], r"moments / bare forward: \d+\.\d+\nhistogram / bare forward: \d+\.\d+"),
        ("sweep", [*TINY, "--memory"], r"extra memory / batch of logits: -?\d+\.\d+"),
        ("attribution", [*TINY, "--memory"], r"attribution / bare: \d+\.\d+ of 18"),
        ("peaks", ["--neurons", "2"], r"smallest ratio \d+\.\d+"),
        ("scale", SMALL, r"largest sweep / bare forwards: \d+\.\d+"),
        ("peers", [*TINY, "--peers"], r"ours / bare forward: \d+\.\d+"),
        ("startup", ["--rounds", "1"], r"--help beyond the imports: -?\d+\.\d+ s"),
    ],
)
def test_every_benchmark_does(full, name, options, last):
    check(name, options, last)


def test_coverage_is_simulated_from_a_run(tmp_path):
    make(("zero", "mean"), [0.5], [1, 2]).save(tmp_path)
    run = python("-m", "tests.benchmarks.intervals", tmp_path, "--draws", "4", "--clusters", "3", "30", cwd=ROOT)
    assert run.returncode == 0, run.stderr
    last = [float(cell) for cell in run.stdout.strip().splitlines()[-1].split()]
    assert last[:2] == [0.5, 30] and all(25 * share in range(0, 10001, 625) for share in last[2:])
