"""Noise in the place of a neuron."""

import torch
from torch import Tensor

from lightning_ablate.methods.base import Ablation, AblationMethod, Replacement
from lightning_ablate.methods.draws import hashed, uniform
from lightning_ablate.seeds import seed_of
from lightning_ablate.statistics import Moments


class Noise(AblationMethod):
    """An ablated neuron is drawn at every position from a normal distribution with its mean and standard deviation.

    A draw depends on the seed, the site, the example, the position and the neuron, so that all fractions share it.
    """

    name = "noise"
    statistics = (Moments,)
    seeded = True
    needs_batch = True

    def prepare(self, ablation: Ablation) -> Replacement:
        """Draws when replacing."""
        device, moments = ablation.mask.device, ablation.statistics[Moments]
        mean, sd = moments.mean.float().to(device), moments.sd.float().to(device)
        key = seed_of("noise", ablation.seed, ablation.site.name)

        def replace(activations: Tensor) -> Tensor:
            _, positions, neurons = ablation.by_example(activations).shape
            examples = ablation.batch.examples.to(device).view(-1, 1, 1)
            places = torch.arange(positions, device=device).view(1, -1, 1)
            drawn = torch.special.ndtri(uniform(hashed(key, examples, places, torch.arange(neurons, device=device))))
            return (mean + sd * drawn).to(activations.dtype).reshape(activations.shape)

        return replace
