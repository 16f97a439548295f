"""What an attribution costs beside passes back and forth.

``python -m tests.benchmarks.attribution`` times, interleaved in one process, a forward and backward pass of a target
(to the inputs of its sites), and the attribution of the same batches under zero and the mean, from 8 draws. Its last
line is the ratio of their times (medians over the rounds) and what it is asked to stay below, 2 + 2 × draws. With
``--memory`` it measures, in processes of their own, the memory that an attribution adds, at two numbers of tokens.
"""

import torch

from lightning_ablate.attribution import Attribution
from lightning_ablate.calibration import Calibration
from lightning_ablate.methods import Mean, Zero
from lightning_ablate.phases import AttributionPhase, CalibrationPhase
from lightning_ablate.run import Run
from lightning_ablate.sites import hooked
from lightning_ablate.statistics import Moments
from tests.benchmarks import targets

DRAWS = 8


class Rig:
    def __init__(self, shape, tokens, batch, length):
        self.module = targets.MAKERS[shape]()
        self.module.configure_model()
        self.module.to(targets.DEVICE)
        self.batches = list(targets.batches(shape, self.module, tokens, batch, length))
        self.run = Run("", Calibration(("attention",)))
        calibration = CalibrationPhase(self.module, self.run, [Moments])
        calibration.begin_epoch(0)
        calibration.step(self.batches[0], 0)
        for site, statistics in calibration._gathered.items():
            self.run.calibration.add(site, statistics[0])

    def bare(self):
        sites, found = self.run.calibration.sites, {}

        def keep(site, activations):
            found[site] = activations if activations.requires_grad else activations.detach().requires_grad_()
            return found[site]

        for batch in self.batches:
            with hooked(self.module.target, {site: lambda x, site=site: keep(site, x) for site in sites}):
                scored = self.module.evaluate(batch)
            loss = torch.nn.functional.cross_entropy(scored.logits, scored.targets, reduction="sum")
            torch.autograd.grad(loss, [found[site] for site in sites])

    def attribution(self):
        phase = AttributionPhase(
            self.module, self.run, Attribution((Zero(), Mean()), DRAWS, heads=False), seed=0, examples=0
        )
        for place, batch in enumerate(self.batches):
            phase.step(batch, place)


def main():
    description = "Prints the cost of an attribution over that of a pass back and forth."
    parts = {"bare": Rig.bare, "attribution": Rig.attribution}
    times = targets.compare("attribution", description, list(targets.MAKERS), Rig, parts, rounds=3)
    print(f"attribution / bare: {targets.ratio(times):.2f} of {2 + 2 * DRAWS}")


if __name__ == "__main__":
    main()
