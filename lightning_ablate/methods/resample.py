"""Resampling: what a neuron does on another input, the source."""

from typing import ClassVar

import torch
from torch import Tensor

from lightning_ablate.methods.base import Ablation, AblationMethod, Replacement
from lightning_ablate.methods.draws import below, hashed


class Resample(AblationMethod):
    """An ablated neuron does what it does on another input, position by position.

    The target's module makes that input from the condition's seed, of the kind named (see
    :meth:`AblationModule.source`): one for the whole batch, or one in the place of each example. It is run once for all
    conditions with nothing ablated, and its activations are kept for that long.
    """

    seeded = True
    needs_batch = True
    source: ClassVar[str]

    def places(self, seed: int, examples: Tensor, own: Tensor, length: Tensor) -> Tensor:
        """Which of the source's positions each of a batch's ``own`` ``(positions,)`` int64 takes, without padding.

        By default the same ones; a shorter source begins again at its end, so that no position is left over.
        ``examples`` ``(batch, 1)`` int64 are the indices of the batch's examples; ``length`` ``(batch, 1)`` int64 says
        how many positions the source has, ``(1, 1)`` where one serves the whole batch.
        """
        return own % length

    def prepare(self, ablation: Ablation) -> Replacement:
        """Looks the source's activations up when replacing."""
        seed = ablation.seed or 0

        def replace(activations: Tensor) -> Tensor:
            source, valid = ablation.batch.sources[self.source, seed][ablation.site]
            batch, positions = ablation.by_example(activations).shape[:2]
            real = valid.argsort(dim=1, descending=True, stable=True)  # those that aren't padding, in their order
            own = torch.arange(positions, device=activations.device)
            examples = ablation.batch.examples.to(activations.device).unsqueeze(1)
            place = self.places(seed, examples, own, valid.sum(1, keepdim=True).clamp_min(1))
            place = real.expand(len(place), -1).gather(1, place).unsqueeze(2).expand(-1, -1, source.shape[2])
            taken = source.expand(len(place), -1, -1).gather(1, place)
            return taken.expand(batch, -1, -1).reshape(activations.shape)

        return replace


class ResampleCharacters(Resample):
    """Resamples from a text of random printable characters."""

    name = "resample-characters"
    source = "characters"


class ResampleIds(Resample):
    """Resamples from a sequence of random token ids."""

    name = "resample-ids"
    source = "ids"


class ResampleGenerated(Resample):
    """Resamples from a text the target itself generates."""

    name = "resample-generated"
    source = "generated"


class ResamplePixels(Resample):
    """Resamples from an image of random pixels."""

    name = "resample-pixels"
    source = "pixels"


class ResampleSamePosition(Resample):
    """Resamples from the same position of another example of the evaluation data.

    Source: Chan et al. 2022, "Causal scrubbing". The activations take as much memory for every seed as one batch makes
    at the sites.
    """

    name = "resample-same-position"
    source = "example"


class ResampleAnyPosition(ResampleSamePosition):
    """Resamples from positions of another example that are drawn from the seed, the same ones at every site."""

    name = "resample-any-position"

    def places(self, seed: int, examples: Tensor, own: Tensor, length: Tensor) -> Tensor:
        """Those drawn."""
        return below(hashed(seed, examples, own), length)


class ResamplePartner(Resample):
    """Resamples from the same position of an example's partner, such as the corrupt text of a pair.

    With heads as units this is activation patching (Vig et al. 2020; Wang et al. 2023).
    """

    name = "resample-partner"
    source = "partner"
    seeded = False


def others_of(examples: Tensor, seed: int, count: int) -> Tensor:
    """Another of ``count`` examples in the place of each ``(batch,)`` int64, all others being equally likely."""
    return (examples.clamp_min(0) + 1 + below(hashed(seed, examples), torch.tensor(count - 1))) % count
