"""Which neurons go: nested in the fraction, fixed by the seed, and the same on every machine of a run."""

import hashlib
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lightning_ablate.sites import Site


class NeuronChoice(ABC):
    """Chooses which neurons of a site are ablated. Subclass it to choose in another way."""

    @abstractmethod
    def order(self, site: Site, seed: int) -> Tensor:
        """The neurons of a site, first to go first: a permutation ``(neurons,)`` int64 on the CPU."""

    def mask(self, site: Site, fraction: float, seed: int) -> Tensor:
        """True for the ablated neurons: the first ``round(fraction * neurons)`` of the order.

        Args:
            site: whose neurons.
            fraction: share of the site's neurons, 0 to 1.
            seed: of the order.

        Returns:
            ``(neurons,)`` bool on the CPU.
        """
        mask = torch.zeros(site.width, dtype=torch.bool)
        mask[self.order(site, seed)[: round(fraction * site.width)]] = True
        return mask


class RandomNeurons(NeuronChoice):
    """A random order of its own for every site and seed (the paper's choice).

    Example:
        >>> site = Site("blocks.0.attn.proj", 10)
        >>> half, most = (RandomNeurons().mask(site, fraction, seed=42) for fraction in (0.5, 0.9))
        >>> int(half.sum()), int(most.sum()), bool((half <= most).all())
        (5, 9, True)
    """

    def order(self, site: Site, seed: int) -> Tensor:
        """A permutation drawn from the hash of (seed, site name, width)."""
        generator = torch.Generator().manual_seed(seed_of(seed, site.name, site.width))
        return torch.randperm(site.width, generator=generator)


def seed_of(*parts: object) -> int:
    """A seed of 63 bits that depends on every part, so that nearby seeds and names give unrelated draws."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
