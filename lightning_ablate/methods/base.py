"""What takes an ablated neuron's place."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_ablate.sites import Site
from lightning_ablate.statistics import ActivationStatistic, SiteStatistics

Replacement = Callable[[Tensor], Tensor]
"""Maps activations ``(batch, ..., neurons)`` to what replaces them, broadcastable to the same shape; pure."""


@dataclass(frozen=True)
class Ablation:
    """One condition at one site, as a method sees it.

    Attributes:
        site: the place.
        mask: ``(neurons,)`` bool, True for the ablated neurons, on the target's device.
        statistics: those the method needs, of this site.
        seed: the condition's seed; None where it can't matter.
        unrelated: the site's activations ``(1, seq, neurons)`` on each unrelated input, by (kind, seed). They are
            gathered anew for each batch, so look them up when replacing.
    """

    site: Site
    mask: Tensor
    statistics: SiteStatistics
    seed: int | None
    unrelated: Mapping[tuple[str, int | None], Mapping[Site, Tensor]]


class AblationMethod(ABC):
    """A replacement for ablated neurons. Subclass it to try another one.

    Attributes:
        name: what results and the command line call it.
        statistics: what calibration must gather for it.
        unrelated: the kind of unrelated input it resamples from, if it does; such a method depends on the seed.
        seeded: whether the seed matters beyond the choice of neurons.
    """

    name: ClassVar[str]
    statistics: ClassVar[tuple[type[ActivationStatistic], ...]] = ()
    unrelated: ClassVar[str | None] = None
    seeded: ClassVar[bool] = False

    @abstractmethod
    def prepare(self, ablation: Ablation) -> Replacement:
        """The replacement at one site under one condition, computed once and then applied to every batch."""


class ConstantMethod(AblationMethod):
    """A method that puts one value in each neuron's place, whatever else is ablated and whatever the seed.

    The sweep computes these values once for each site, not once for each condition.
    """

    @abstractmethod
    def values(self, site: Site, statistics: SiteStatistics) -> Tensor:
        """The values, ``(neurons,)`` floating, on any device."""

    def prepare(self, ablation: Ablation) -> Replacement:
        """The values as a replacement."""
        return constant(self.values(ablation.site, ablation.statistics).to(ablation.mask.device))


def constant(value: Tensor) -> Replacement:
    """Replaces by one value per neuron, ``(neurons,)`` of any floating dtype, cast to that of the activations."""

    def replace(activations: Tensor) -> Tensor:
        return value.to(activations.dtype)

    return replace


def ablate(activations: Tensor, mask: Tensor, replacement: Replacement) -> Tensor:
    """The activations with the masked neurons replaced: the one place where both are combined.

    Args:
        activations: ``(batch, ..., neurons)``, left as they are.
        mask: ``(neurons,)`` bool.
        replacement: what takes the masked neurons' place.

    Returns:
        A tensor of the shape and dtype of ``activations``.

    Example:
        >>> ablate(torch.tensor([[1.0, 2.0]]), torch.tensor([True, False]), constant(torch.tensor([7.0, 8.0])))
        tensor([[7., 2.]])
    """
    return torch.where(mask, replacement(activations), activations)
