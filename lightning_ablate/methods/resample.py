"""Resampling: what a neuron does on another input, the source."""

from typing import ClassVar

import torch
from torch import Tensor

from lightning_ablate.errors import SiteError
from lightning_ablate.methods.base import Ablation, AblationMethod, Replacement
from lightning_ablate.methods.draws import below, hashed


class Resample(AblationMethod):
    """An ablated neuron does what it does on another input, position by position.

    The module makes that input from the condition's seed, of the kind that ``source`` names (see
    :meth:`AblationModule.source`): one for the whole batch, or one for each example. The intact target runs it once a
    batch, for all conditions.
    """

    seeded = True
    needs_batch = True
    source: ClassVar[str]

    def places(self, seed: int, examples: Tensor, own: Tensor, length: Tensor) -> Tensor:
        """The position of the source that each position of the batch takes, counted without padding.

        By default the same one; a shorter source is repeated.

        Args:
            seed: of the condition.
            examples: the indices of the batch's examples, ``(batch, 1)`` int64.
            own: the positions of the batch, ``(positions,)`` int64.
            length: how many positions the source has, ``(batch, 1)`` int64; ``(1, 1)`` if one serves the whole batch.
        """
        return own % length

    def prepare(self, ablation: Ablation) -> Replacement:
        """Looks up the source's activations for each batch."""
        seed = ablation.seed or 0
        if ablation.site.expert is not None:
            raise SiteError(
                f"{self.name} can't replace neurons of an expert ({ablation.site.name}), as the other input has other "
                "experts at its positions; leave the method or `experts` out (--ablation.methods, --ablation.sites)"
            )

        def replace(activations: Tensor) -> Tensor:
            source, valid = ablation.batch.sources[self.source, seed][ablation.site]
            batch, positions = ablation.by_example(activations).shape[:2]
            real = valid.argsort(dim=1, descending=True, stable=True)  # positions without padding, in their order
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
        """Positions drawn for each example and position."""
        return below(hashed(seed, examples, own), length)


class ResamplePartner(Resample):
    """Resamples from the same position of an example's partner, such as the corrupt text of a pair.

    With heads as units this is activation patching (Vig et al. 2020; Wang et al. 2023).
    """

    name = "resample-partner"
    source = "partner"
    seeded = False


def others_of(examples: Tensor, seed: int, count: int) -> Tensor:
    """For each of ``examples`` ``(batch,)`` int64 another one of ``count``, all others being equally likely."""
    return (examples.clamp_min(0) + 1 + below(hashed(seed, examples), torch.tensor(count - 1))) % count
