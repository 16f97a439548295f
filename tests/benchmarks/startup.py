"""How long the command takes before it does anything.

``python -m tests.benchmarks.startup`` times whole processes, interleaved: one that only imports torch, lightning and
transformers, ``--help``, and a run on one batch. The last line is what ``--help`` takes beyond the imports, in seconds
(the median over the rounds).
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from functools import partial

from tests.benchmarks.targets import seconds, show

COMMANDS = {
    "imports": ["-c", "import torch, lightning.pytorch.cli, transformers"],
    "--help": ["-m", "lightning_ablate", "fit", "--help"],
    "one batch": ["-m", "lightning_ablate", "fit", "--trainer.fast_dev_run=true"],
}


def main():
    parser = argparse.ArgumentParser(description="Prints what the command line adds to its imports.")
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        start = partial(subprocess.run, cwd=folder, check=True, capture_output=True)
        times = [[seconds(start, [sys.executable, *words]) for words in COMMANDS.values()] for _ in range(rounds)]
    show(COMMANDS, times)
    print(f"--help beyond the imports: {statistics.median(shown - bare for bare, shown, _ in times):.2f} s")


if __name__ == "__main__":
    main()
