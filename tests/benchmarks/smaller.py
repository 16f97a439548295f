"""What a smaller model is worth: ``python -m tests.benchmarks.smaller INTACT SMALLER`` compares two folders.

Prints parameters, bytes and floating-point operations (by torch's own counter) of both causal language models, and
times forward passes of both, interleaved in one process. Its last line is the ratio of the medians beside that of the
operations, which a model that is bound by them reaches.
"""

import argparse
from pathlib import Path
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from tests.benchmarks.targets import ratio, seconds


def main():
    parser = argparse.ArgumentParser(description="Compares an intact model with a smaller one.")
    parser.add_argument("folders", nargs=2, type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in given.folders]
    ids = torch.randint(models[0].config.vocab_size, (given.batch, given.length))
    operations = []
    for folder, model in zip(given.folders, models, strict=True):
        with FlopCounterMode(display=False) as counter:
            model(ids)
        operations.append(counter.get_total_flops())
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        print(f"{folder.name}: {model.num_parameters():,} parameters, {size:,} bytes, {operations[-1]:,} FLOPs")
    times = [[seconds(model, ids) for model in models] for _ in range(given.rounds)]
    speeds = [given.batch * given.length / median(column) for column in zip(*times, strict=True)]
    print(f"tokens a second: {speeds[0]:,.0f} and {speeds[1]:,.0f}")
    print(f"faster: {1 / ratio(times):.3f}, by operations {operations[0] / operations[1]:.3f}")


if __name__ == "__main__":
    main()
