"""What calibration costs beside the forward passes it rides on.

``python tests/benchmarks/calibration.py`` compares, interleaved in one process, bare forward passes of a decoder with
the same passes while every statistic of a calibration's first epoch is gathered at each attention site. Its last line
is the ratio of their times (the median over the rounds). With ``--memory`` it measures, in processes of their own, the
memory that the statistics add at two numbers of tokens.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import MistralConfig, MistralModel, OPTConfig, OPTModel

from lightning_ablate.calibration import Calibration
from lightning_ablate.callback import ALWAYS
from lightning_ablate.statistics import ActivationStatistic, RangeHistogram

SHAPES: dict[str, Callable[[], nn.Module]] = {
    "tiny": lambda: OPTModel(
        OPTConfig(hidden_size=64, ffn_dim=256, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64)
    ),
    "opt-125m": lambda: OPTModel(OPTConfig()),
    "mistral-7b": lambda: MistralModel(MistralConfig()),
}


class Rig:
    """A decoder with random weights, and batches of random tokens."""

    def __init__(self, shape: str, tokens: int, batch: int, length: int) -> None:
        torch.manual_seed(0)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_default_dtype(torch.bfloat16 if self.device == "cuda" else torch.float32)
        with torch.device(self.device):
            self.target = SHAPES[shape]().eval().requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        self.batches = torch.randint(1000, (tokens // (batch * length), batch, length), device=self.device)

    def calibration(self, *kinds: type[ActivationStatistic]) -> Calibration:
        made = Calibration(self.target, kinds, device=self.device)
        made.find(lambda: self.forward(self.batches[0, :1, :8]))
        return made

    @torch.no_grad()
    def forward(self, ids: Tensor) -> None:
        self.target(input_ids=ids, use_cache=False)

    def run(self, around: Callable[[], AbstractContextManager[None]]) -> float:
        """Seconds for all batches."""
        self._wait()
        start = time.perf_counter()
        for ids in self.batches:
            with around():
                self.forward(ids)
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def times(rig: Rig, rounds: int) -> Iterator[tuple[float, float, float]]:
    """Seconds of bare passes, of a calibration's first epoch and of the second that the exact peak needs."""
    kinds = rig.calibration(*ALWAYS, RangeHistogram)
    rig.run(nullcontext)
    for _ in range(rounds):
        kinds.start(0)
        bare, first = rig.run(nullcontext), rig.run(lambda: kinds.collecting(lambda site: None))
        kinds.finish()
        kinds.start(1)
        yield bare, first, rig.run(lambda: kinds.collecting(lambda site: None))


def largest_memory(device: str, run: Callable[[], object]) -> int:
    """The most memory in use during a run, in KiB; on a CPU that of the process (Linux)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() // 1024
    Path("/proc/self/clear_refs").write_text("5")  # forgets the high-water mark
    run()
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def extra_memory(shape: str, tokens: int, batch: int, length: int) -> float:
    """MiB that calibration adds to the largest memory of the bare passes, each in a process of its own."""

    def largest(what: str) -> int:
        options = ["--shape", shape, "--tokens", tokens, "--batch", batch, "--length", length, "--only", what]
        command = [sys.executable, __file__, *map(str, options)]
        # large tensors in memory of their own, which is given back at once: the largest is then what was in use
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        return int(run.stdout.split()[-1])

    return (largest("calibration") - largest("bare")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints the cost of a calibration over that of its forward passes.")
    parser.add_argument("--shape", choices=SHAPES, default="opt-125m")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", action="store_true", help="measures memory at --tokens and twice as many")
    parser.add_argument("--only", choices=("bare", "calibration"), help="prints the peak memory in KiB")
    given = parser.parse_args()
    sizes = given.shape, given.tokens, given.batch, given.length
    if given.only:
        rig = Rig(*sizes)
        around = nullcontext
        if given.only == "calibration":
            calibration = rig.calibration(*ALWAYS)
            around = partial(calibration.collecting, lambda site: None)
        print(largest_memory(rig.device, lambda: rig.run(around)))
        return
    if given.memory:
        for tokens in (given.tokens, 2 * given.tokens):
            print(f"extra memory at {tokens:7,} tokens: {extra_memory(given.shape, tokens, *sizes[2:]):8.0f} MiB")
    rig = Rig(*sizes)
    found = list(times(rig, given.rounds))
    print(f"{given.shape} on {rig.device}, {given.tokens:,} tokens, batches of {given.batch} x {given.length}")
    for name, seconds in zip(("bare forward", "one pass", "second pass"), zip(*found, strict=True), strict=True):
        print(f"{name:14} {statistics.median(seconds):8.3f} s")
    second = statistics.median(two / bare for bare, _, two in found)
    print(f"second pass of the exact peak / bare forward: {second:.3f}")
    print(f"one-pass calibration / bare forward: {statistics.median(one / bare for bare, one, _ in found):.3f}")


if __name__ == "__main__":
    main()
