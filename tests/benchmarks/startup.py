"""How long the command takes before it does anything.

``python -m tests.benchmarks.startup`` times whole processes, interleaved: one that only imports torch, lightning and
transformers, ``--help``, and a run up to the end of its first batch. The last line is what ``--help`` takes beyond
the imports, in seconds (the median over the rounds).
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time

COMMANDS = {
    "imports": ["-c", "import torch, lightning.pytorch.cli, transformers"],
    "--help": ["-m", "lightning_ablate", "fit", "--help"],
    "first batch": ["-m", "lightning_ablate", "fit", "--ablation.plan_only=true", "--trainer.logger=false"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints what the command line adds to its imports.")
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for name, words in COMMANDS.items():
                began = time.perf_counter()
                subprocess.run([sys.executable, *words], cwd=folder, check=True, capture_output=True)
                seconds[name].append(time.perf_counter() - began)
    for name, times in seconds.items():
        print(f"{name:18} {statistics.median(times):6.2f} s")
    added = statistics.median(a - b for a, b in zip(seconds["--help"], seconds["imports"], strict=True))
    print(f"--help beyond the imports: {added:.2f} s")


if __name__ == "__main__":
    main()
