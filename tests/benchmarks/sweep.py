"""What a sweep costs beside the forward passes of its conditions.

``python -m tests.benchmarks.sweep`` times, interleaved in one process, the whole validation epoch of a sweep, and as
many bare forward passes with a plain cross_entropy and argmax as it has conditions. Its last line is the ratio of
their times (the median over the rounds). With ``--memory`` it measures, in processes of their own, the largest memory
of both, and gives what the sweep adds in units of one batch of logits in float32.
"""

import io
import tempfile
import time
from contextlib import redirect_stdout

import lightning
import torch
from torch.utils.data import DataLoader

from lightning_ablate import AblationCallback
from tests import tiny
from tests.benchmarks import targets

FRACTIONS = {"digits": [0.1 * tenth for tenth in range(1, 11)]}


class Watch(lightning.Callback):
    """Times the validation epoch, with all that comes before its first batch; not the files and figures behind it."""

    def on_validation_start(self, *_):
        targets.wait()
        self.began = time.perf_counter()

    def on_validation_epoch_end(self, *_):
        targets.wait()
        self.seconds = time.perf_counter() - self.began


class Rig:
    """A target and its batches, which a Trainer calibrates on the first batch and sweeps on all."""

    def __init__(self, shape, tokens, batch, length, **options):
        self.module, self.watch = targets.MAKERS[shape](), Watch()
        self.batches = targets.batches(shape, self.module, tokens, batch, length)
        self.options = {"fractions": FRACTIONS.get(shape, [0.5, 1.0]), "seeds": [1]} | options
        self.sweep()

    def bare(self):
        for batch in self.batches:
            targets.bare(self.module.target, batch)

    def sweep(self):
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            callback = AblationCallback(**self.options, dirpath=folder)
            trainer = tiny.trainer(folder, self.watch, callback, accelerator="auto", devices=1)
            trainer.fit(self.module, *(DataLoader(made, batch_size=None) for made in (self.batches[:1], self.batches)))
        self.module.to(targets.DEVICE)
        self.conditions = len(callback.results.table)
        return self.watch.seconds

    def times(self, rounds):
        """Seconds of as many bare passes as there are conditions, and of the sweep, after one another."""
        self.bare()
        return [(sum(targets.seconds(self.bare) for _ in range(self.conditions)), self.sweep()) for _ in range(rounds)]


def main():
    description = "Prints the cost of a sweep over that of its forward passes."
    given = targets.parser(description, list(targets.MAKERS), rounds=3, measured=("bare", "sweep")).parse_args()
    rig = Rig(given.shape, given.tokens, given.batch, given.length)
    if given.only:
        print(targets.largest_memory(rig.bare if given.only == "bare" else rig.sweep))
        return
    print(f"{given.shape} on {targets.DEVICE}, {len(rig.batches)} batches, {rig.conditions} conditions")
    if given.memory:
        with torch.no_grad():
            logits = rig.module.evaluate(rig.batches[0]).logits.numel() * 4 / 1024
        extra = targets.memory_of("sweep", given, "sweep") - targets.memory_of("sweep", given, "bare")
        print(f"added by the sweep: {extra / 1024:.0f} MiB, a batch of logits in float32: {logits / 1024:.0f} MiB")
        print(f"extra memory / batch of logits: {extra / logits:.2f}")
        return
    times = rig.times(given.rounds)
    targets.show(("bare forwards", "sweep"), times)
    print(f"sweep / bare forwards: {targets.ratio(times):.3f}")


if __name__ == "__main__":
    main()
