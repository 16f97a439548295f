"""What calibration costs beside the forward passes it rides on.

``python -m tests.benchmarks.calibration`` compares, interleaved in one process, bare forward passes of a decoder
(without its vocabulary) with those of a calibration's two epochs: of the moments, and of the histogram that ``peak``
needs. It ends with the ratios of their times (medians over the rounds). With ``--memory`` it measures, in processes of
their own, the memory that each epoch adds, at two numbers of tokens.
"""

import torch

from lightning_ablate import Scored
from lightning_ablate.calibration import Calibration
from lightning_ablate.phases import CalibrationPhase
from lightning_ablate.run import Run
from lightning_ablate.sites import find_sites
from lightning_ablate.statistics import Histogram, Moments
from tests.benchmarks import targets

SHAPES = {"tiny": lambda: targets.opt(**targets.SMALL_OPT), "opt-125m": targets.opt, "mistral-7b": targets.mistral}


class Body(targets.Text):
    """A decoder without its vocabulary, whose hidden states pass for logits."""

    def build_target(self):
        return super().build_target().base_model

    def evaluate(self, batch):
        hidden = self.target(**self.inputs(batch)).last_hidden_state.flatten(0, 1)
        return Scored(hidden, *hidden.new_zeros(2, len(hidden), dtype=torch.int64))


class Rig:
    def __init__(self, shape, tokens, batch, length):
        self.module = Body(SHAPES[shape])
        self.module.configure_model()
        self.module.to(targets.DEVICE)
        self.batches = targets.batches(shape, self.module, tokens, batch, length)
        few = {name: tensor[:1, :8] if tensor.ndim > 1 else tensor[:1] for name, tensor in self.batches[0].items()}
        sites = find_sites(self.module.target, lambda: self.module.evaluate(few))
        run = Run("", Calibration(("attention",), sites))
        self.phase = CalibrationPhase(self.module, run, [Moments, Histogram])

    @torch.no_grad()
    def bare(self):
        for batch in self.batches:
            self.module.evaluate(batch)

    def epoch(self, number):
        self.phase.begin_epoch(number)
        for place, batch in enumerate(self.batches):
            self.phase.step(batch, place)
        self.phase.end_epoch()


def main():
    description = "Prints the cost of a calibration over that of its forward passes."
    parts = {"bare": Rig.bare, "moments": lambda rig: rig.epoch(0), "histogram": lambda rig: rig.epoch(1)}
    times = targets.compare("calibration", description, list(SHAPES), Rig, parts, rounds=7)
    for number, name in ((1, "moments"), (2, "histogram")):
        print(f"{name} / bare forward: {targets.ratio(times, number):.3f}")


if __name__ == "__main__":
    main()
