"""How the cost of a sweep grows with tokens, conditions, layers and width, and what a second process is worth.

``python -m tests.benchmarks.scale`` doubles one of them at a time from a small OPT, and gives the seconds of the sweep
and its ratio to the bare forward passes of its conditions; the last line is the largest of these ratios. With
``--processes`` it times the default command with one and with two processes instead.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile

from tests.benchmarks import targets
from tests.benchmarks.sweep import Rig

START = {"tokens": 1024, "conditions": 4, "layers": 4, "width": 256}


def measured(given, rounds):
    width = given["width"]
    shape = {"hidden_size": width, "ffn_dim": 4 * width, "num_attention_heads": width // 64}
    fractions = [(number + 1) / given["conditions"] for number in range(given["conditions"] - 1)]
    shape |= {"num_hidden_layers": given["layers"], "vocab_size": 8192}
    targets.MAKERS["scale"] = lambda: targets.Text(lambda: targets.opt(**shape))
    times = Rig("scale", given["tokens"], 4, 128, methods=["zero"], fractions=fractions).times(rounds)
    return statistics.median(ours for _, ours in times), targets.ratio(times)


def processes(rounds):
    command = [sys.executable, "-m", "lightning_ablate", "fit", "--config", "configs/demo_gpt2.yaml"]
    command += ["--trainer.accelerator=cpu", "--trainer.logger=false", "--ablation.seeds=[1]"]

    def run(*options):
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([*command, *options, f"--ablation.dirpath={folder}"], check=True, capture_output=True)

    several = [], ["--trainer.devices=2", "--trainer.strategy=ddp"]
    times = [[targets.seconds(run, *options) for options in several] for _ in range(rounds)]
    targets.show(("1 process", "2 processes"), times)
    print(f"one process / two: {1 / targets.ratio(times):.3f}")


def main():
    parser = argparse.ArgumentParser(description="Prints how the cost of a sweep grows.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", action="store_true")
    for name, value in START.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    given = vars(parser.parse_args())
    rounds = given.pop("rounds")
    if given.pop("processes"):
        processes(rounds)
        return
    ratios = []
    print(f"{'':12} {'tokens':>7} {'conditions':>10} {'layers':>6} {'width':>6} {'seconds':>8} {'sweep / bare':>12}")
    for name in ("", *given):
        sizes = {**given, **({name: 2 * given[name]} if name else {})}
        seconds, ratio = measured(sizes, rounds)
        ratios.append(ratio)
        numbers = f"{sizes['tokens']:7} {sizes['conditions']:10} {sizes['layers']:6} {sizes['width']:6}"
        print(f"{'2 x ' + name if name else 'start':12} {numbers} {seconds:8.3f} {ratio:12.3f}")
    print(f"largest sweep / bare forwards: {max(ratios):.3f}")


if __name__ == "__main__":
    main()
