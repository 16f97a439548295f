"""Resampling from an unrelated input."""

from torch import Tensor

from lightning_ablate.errors import DataError
from lightning_ablate.methods.base import Ablation, AblationMethod, Replacement


class Resample(AblationMethod):
    """An ablated neuron does what it does on one unrelated input, position by position.

    The target's module makes the input (see :meth:`AblationModule.unrelated`), from the condition's seed and as long as
    the sequences of the batch, so that no position is left over.

    Example:
        >>> import torch
        >>> from lightning_ablate.sites import Site
        >>> from lightning_ablate.statistics import SiteStatistics
        >>> site, mask = Site("attn.proj", 1), torch.ones(1, dtype=torch.bool)
        >>> activations = {("pixels", 42): {site: torch.tensor([[[5.0], [6.0]]])}}
        >>> here = Ablation(site, mask, SiteStatistics("attn.proj", {}), 42, activations)
        >>> ResamplePixels().prepare(here)(torch.zeros(3, 2, 1)).shape
        torch.Size([1, 2, 1])
    """

    def prepare(self, ablation: Ablation) -> Replacement:
        """Looks the unrelated activations up when replacing."""
        site, kind = ablation.site, (str(self.unrelated), ablation.seed)

        def replace(activations: Tensor) -> Tensor:
            donor = ablation.unrelated[kind][site]
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
