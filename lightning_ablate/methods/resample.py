"""Resampling from an unrelated input, or from another example."""

from abc import abstractmethod

import torch
from torch import Tensor

from lightning_ablate.errors import DataError
from lightning_ablate.methods.base import Ablation, AblationMethod, Replacement
from lightning_ablate.methods.draws import below, hashed


class Resample(AblationMethod):
    """An ablated neuron does what it does on one unrelated input, position by position.

    The target's module makes the input (see :meth:`AblationModule.unrelated`), from the condition's seed and as long as
    the sequences of the batch, so that no position is left over.

    Example:
        >>> from lightning_ablate.methods.base import Batch
        >>> from lightning_ablate.sites import Site
        >>> from lightning_ablate.statistics import SiteStatistics
        >>> site, mask = Site("attn.proj", 1), torch.ones(1, dtype=torch.bool)
        >>> batch = Batch(unrelated={("pixels", 42): {site: torch.tensor([[[5.0], [6.0]]])}})
        >>> here = Ablation(site, mask, SiteStatistics("attn.proj", {}), 42, batch)
        >>> ResamplePixels().prepare(here)(torch.zeros(3, 2, 1)).shape
        torch.Size([1, 2, 1])
    """

    def prepare(self, ablation: Ablation) -> Replacement:
        """Looks the unrelated activations up when replacing."""
        site, kind = ablation.site, (str(self.unrelated), ablation.seed or 0)

        def replace(activations: Tensor) -> Tensor:
            donor = ablation.batch.unrelated[kind][site]
            if donor.shape[1:] != activations.shape[1:]:
                raise DataError(
                    f"{self.name} at {site.name}: the unrelated input has the shape {tuple(donor.shape[1:])}, "
                    f"expected {tuple(activations.shape[1:])}; `unrelated` must be as long as the batch"
                )
            return donor

        return replace


class ResampleCharacters(Resample):
    """Resamples from a text of random printable characters."""

    name = "resample-characters"
    unrelated = "characters"


class ResampleIds(Resample):
    """Resamples from a sequence of random token ids."""

    name = "resample-ids"
    unrelated = "ids"


class ResampleGenerated(Resample):
    """Resamples from a text the target itself generates."""

    name = "resample-generated"
    unrelated = "generated"


class ResamplePixels(Resample):
    """Resamples from an image of random pixels."""

    name = "resample-pixels"
    unrelated = "pixels"


class ResampleExample(AblationMethod):
    """An ablated neuron does what it does on another example, the donor, as in causal scrubbing (Chan et al. 2022).

    Each example's donor is another one of the evaluation data, drawn from the seed. It is run with nothing ablated,
    once for all conditions; its activations are kept for that long, which takes as much memory for every seed as one
    batch makes at the sites.
    """

    donors = True
    seeded = True

    @abstractmethod
    def places(self, seed: int, examples: Tensor, own: Tensor, length: Tensor) -> Tensor:
        """Which of the donor's positions each position takes, counted without padding.

        Args:
            seed: of the condition.
            examples: ``(batch, 1)`` int64.
            own: ``(positions,)`` int64, the positions.
            length: ``(batch, 1)`` int64, how many the donor has.

        Returns:
            ``(batch, positions)`` int64, from 0 to below ``length``.
        """

    def prepare(self, ablation: Ablation) -> Replacement:
        """Looks the donors' activations up when replacing."""
        seed = ablation.seed or 0

        def replace(activations: Tensor) -> Tensor:
            donor, valid = ablation.batch.donors[seed][ablation.site]
            positions = ablation.by_example(activations).shape[1]
            own = torch.arange(positions, device=activations.device)
            real = valid.argsort(dim=1, descending=True, stable=True)  # those that aren't padding, in their order
            examples = ablation.batch.examples.to(activations.device).unsqueeze(1)
            length = valid.sum(1, keepdim=True).clamp_min(1)
            place = real.gather(1, self.places(seed, examples, own, length).expand(len(donor), positions))
            taken = donor.gather(1, place.unsqueeze(2).expand(-1, -1, donor.shape[2]))
            return taken.reshape(activations.shape)

        return replace


class ResampleSamePosition(ResampleExample):
    """Resamples from the same position of another example; a shorter one begins again at its end.

    Example:
        >>> place = torch.arange(5)
        >>> ResampleSamePosition().places(1, torch.tensor([[7]]), place, torch.tensor([[3]]))
        tensor([[0, 1, 2, 0, 1]])
    """

    name = "resample-same-position"

    def places(self, seed: int, examples: Tensor, own: Tensor, length: Tensor) -> Tensor:
        """The same ones."""
        return own % length


class ResampleAnyPosition(ResampleExample):
    """Resamples from positions of another example that are drawn from the seed, the same ones at every site."""

    name = "resample-any-position"

    def places(self, seed: int, examples: Tensor, own: Tensor, length: Tensor) -> Tensor:
        """Those drawn."""
        return below(hashed(seed, examples, own), length)


def donors_of(examples: Tensor, seed: int, count: int) -> Tensor:
    """Another example in the place of each, all others being equally likely.

    Args:
        examples: ``(batch,)`` int64; those that only fill a batch, below 0, get some donor.
        seed: of the draw.
        count: of all examples, at least 2.

    Example:
        >>> bool((donors_of(torch.arange(5), 42, 5) != torch.arange(5)).all())
        True
    """
    return (examples.clamp_min(0) + 1 + below(hashed(seed, examples), torch.tensor(count - 1))) % count
