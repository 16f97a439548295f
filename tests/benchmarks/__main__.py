"""Runs all benchmarks, one after the other, and writes what they print into one file.

``python -m tests.benchmarks --environments FOLDER`` takes about an hour on two cores.
"""

import argparse
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

COMMANDS = [
    "sweep",
    "sweep --shape gpt2 --rounds 5",
    "sweep --shape digits --rounds 5",
    "sweep --memory --tokens 2048",
    "calibration --memory",
    "attribution --memory --tokens 2048",
    "startup",
    "scale",
    "scale --processes",
    "peaks",
    "peers --tokens 2048",
]


def main():
    parser = argparse.ArgumentParser(description="Writes the figures of all benchmarks into one file.")
    parser.add_argument("--file", type=Path, default=Path(__file__).with_name("measured.txt"))
    parser.add_argument("--environments", default="environments", help="see peers")
    parser.add_argument("--only", nargs="*", help="names of those to run; the file then holds these alone")
    given = parser.parse_args()
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU cores"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "transformers"))
    parts = [f"{where}; Python {platform.python_version()}, {versions}\n"]
    for command in COMMANDS:
        name, *options = command.split()
        if given.only and name not in given.only:
            continue
        options += ["--environments", given.environments] if name == "peers" else []
        print(command, flush=True)
        words = [sys.executable, "-m", f"tests.benchmarks.{name}", *options]
        run = subprocess.run(words, capture_output=True, text=True)
        said = run.stdout if not run.returncode else f"failed: {run.stderr.strip().splitlines()[-1]}\n"
        parts.append(f"$ python -m tests.benchmarks.{command}\n{said}")
        given.file.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
