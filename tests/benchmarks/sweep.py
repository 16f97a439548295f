"""What a sweep costs beside the forward passes of its conditions.

``python -m tests.benchmarks.sweep`` times, interleaved in one process, the whole validation epoch of a sweep, and as
many bare forward passes with a plain cross_entropy and argmax as it has conditions. Its last line is the ratio of
their times (the median over the rounds). With ``--memory`` it measures, in processes of their own, the largest memory
of both, and gives what the sweep adds in units of one batch of logits in float32. With ``--fold`` it sweeps constants
and the conditional mean folded into temporary weights, and times their preparation (factorising and folding) apart.
"""

import argparse
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import redirect_stdout
from typing import Any

import lightning
import torch

from lightning_ablate import AblationCallback
from tests.benchmarks import targets
from tests.benchmarks.calibration import largest_memory

FRACTIONS = {"digits": [0.1 * tenth for tenth in range(1, 11)]}


class Watch(lightning.Callback):
    """Times the validation epoch, with all that comes before its first batch; not the files and figures behind it."""

    def __init__(self) -> None:
        self.seconds = self.prepared = 0.0

    def on_validation_start(self, *_: Any) -> None:
        targets.wait()
        self.began = time.perf_counter()

    def on_validation_epoch_start(self, *_: Any) -> None:
        targets.wait()
        self.prepared = time.perf_counter() - self.began

    def on_validation_epoch_end(self, *_: Any) -> None:
        targets.wait()
        self.seconds = time.perf_counter() - self.began


class Rig:
    """A calibrated target, its batches, and a Trainer that sweeps."""

    def __init__(self, shape: str, tokens: int, batch: int, length: int, **options: Any) -> None:
        self.module = targets.MAKERS[shape]()
        self.batches = targets.batches(shape, self.module, tokens, batch, length)
        self.folder, self.watch = tempfile.TemporaryDirectory(), Watch()
        chosen = {"fractions": FRACTIONS.get(shape, [0.5, 1.0]), "seeds": [1]}
        self.callback = AblationCallback(**(chosen | options))
        self.trainer = lightning.Trainer(
            callbacks=[self.watch, self.callback],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=self.folder.name,
            accelerator="cuda" if targets.DEVICE == "cuda" else "cpu",
            devices=1,
        )
        few = self.batches[:1]
        with redirect_stdout(io.StringIO()):
            self.trainer.fit(self.module, targets.loader(few), targets.loader(few))
        self.module.to(targets.DEVICE)

    @property
    def conditions(self) -> int:
        return len(self.callback.results.rows)

    def bare(self) -> None:
        for batch in self.batches:
            targets.bare(self.module.target, batch)

    def sweep(self) -> float:
        with redirect_stdout(io.StringIO()):
            self.trainer.validate(self.module, targets.loader(self.batches), verbose=False)
        self.module.to(targets.DEVICE)
        return self.watch.seconds


def floating_point_time(rig: Rig) -> float:
    """Seconds that the operations of one bare pass over all batches take at the rate of a large matrix product."""
    from torch.utils.flop_counter import FlopCounterMode

    size = 8192 if targets.DEVICE == "cuda" else 1024
    dtype = next(rig.module.target.parameters()).dtype
    matrix = torch.randn(size, size, device=targets.DEVICE, dtype=dtype)
    times = [targets.seconds(lambda: targets.repeat(lambda: matrix @ matrix, 10)) / 10 for _ in range(7)]
    with FlopCounterMode(display=False) as counter:
        rig.bare()
    return counter.get_total_flops() / (2 * size**3 / statistics.median(times[1:]))


def synchronisations(rig: Rig) -> float:
    """How often the host waits for the device, per condition."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            rig.sweep()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(one.message) for one in seen) / rig.conditions / len(rig.batches)


def largest(given: argparse.Namespace, what: str) -> int:
    """KiB, in a process of its own."""
    sizes = {"--shape": given.shape, "--tokens": given.tokens, "--batch": given.batch, "--length": given.length}
    options = [str(word) for pair in sizes.items() for word in pair]
    command = [sys.executable, "-m", "tests.benchmarks.sweep", *options, "--only", what]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(run.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints the cost of a sweep over that of its forward passes.")
    parser.add_argument("--shape", choices=targets.MAKERS, default="opt-125m")
    parser.add_argument("--tokens", type=int, default=8192, help="images for vit-b16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--fold", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--only", choices=("bare", "sweep"), help="prints the peak memory in KiB")
    given = parser.parse_args()
    options = {"methods": ["zero", "mean", "conditional"], "fold": True} if given.fold else {}
    rig = Rig(given.shape, given.tokens, given.batch, given.length, compile=given.compile, **options)
    if given.only:
        print(largest_memory(targets.DEVICE, rig.bare if given.only == "bare" else rig.sweep))
        return
    print(f"{given.shape} on {targets.DEVICE}, {len(rig.batches)} batches, {rig.conditions} conditions")
    if given.memory:
        with torch.no_grad():
            logits = rig.module.evaluate(rig.batches[0]).logits
        batch = logits.numel() * 4 / 1024
        extra = largest(given, "sweep") - largest(given, "bare")
        print(
            f"extra memory of the sweep: {extra / 1024:.0f} MiB, a batch of logits in float32: {batch / 1024:.0f} MiB"
        )
        print(f"extra memory / batch of logits: {extra / batch:.2f}")
        return
    rig.bare()
    if given.compile:
        rig.sweep()  # which compiles
    found = []
    for _ in range(given.rounds):
        plain = targets.seconds(lambda: targets.repeat(rig.bare, rig.conditions))
        seconds = rig.sweep()
        if given.fold:
            print(f"preparation of {rig.conditions - 1} conditions: {rig.watch.prepared:.2f} s")
            seconds -= rig.watch.prepared
        found.append((plain, seconds))
    for name, times in zip(("bare forwards", "sweep"), zip(*found, strict=True), strict=True):
        print(f"{name:14} {statistics.median(times):8.3f} s")
    floor = rig.conditions * floating_point_time(rig)
    print(f"sweep / (FLOPs / matrix rate): {statistics.median(ours for _, ours in found) / floor:.2f}")
    if targets.DEVICE == "cuda":
        print(f"host synchronisations per condition and batch: {synchronisations(rig):.2f}")
    print(f"sweep / bare forwards: {statistics.median(ours / plain for plain, ours in found):.3f}")


if __name__ == "__main__":
    main()
