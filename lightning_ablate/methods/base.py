"""What takes an ablated neuron's place."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_ablate.errors import ConfigError, DataError
from lightning_ablate.sites import Site
from lightning_ablate.statistics import ActivationStatistic, Moments, SiteStatistics

Replacement = Callable[[Tensor], Tensor]
"""Maps activations ``(batch, ..., neurons)`` to what replaces them, broadcastable to the same shape; pure."""


@dataclass
class Batch:
    """What a method can know of the batch at hand. It changes with every batch, so look it up when replacing.

    Attributes:
        examples: ``(batch,)`` int64, the indices of its examples, below 0 for those that only fill it.
        unrelated: each site's activations ``(1, seq, neurons)`` on every unrelated input, by (kind, seed).
        donors: each site's clean activations ``(batch, positions, neurons)`` on another example in the place of each,
            and which of the positions aren't padding, ``(batch, positions)`` bool; by seed.
    """

    examples: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    unrelated: dict[tuple[str, int], dict[Site, Tensor]] = field(default_factory=dict)
    donors: dict[int, dict[Site, tuple[Tensor, Tensor]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Ablation:
    """One condition at one site, as a method sees it.

    Attributes:
        site: the place.
        mask: ``(neurons,)`` bool, True for the ablated neurons, on the target's device; while values are learned
            ``(examples, 1, neurons)``, and activations are ``(examples, positions, neurons)``.
        statistics: those the method needs, of this site.
        seed: the condition's seed; None where it can't matter.
        batch: the one at hand.
    """

    site: Site
    mask: Tensor
    statistics: SiteStatistics
    seed: int | None
    batch: Batch = field(default_factory=Batch)

    def by_example(self, activations: Tensor) -> Tensor:
        """Activations as ``(batch, positions, neurons)``, whatever their shape.

        Raises:
            DataError: if they can't be told apart by example.
        """
        examples = len(self.batch.examples)
        if len(activations) % examples:
            raise DataError(
                f"the activations at {self.site.name} have the shape {tuple(activations.shape)}, which doesn't divide "
                f"by the {examples} examples of the batch, as this method needs it; leave the site out "
                "(--ablation.sites)"
            )
        return activations.reshape(examples, -1, activations.shape[-1])


class AblationMethod(ABC):
    """A replacement for ablated neurons. Subclass it to try another one.

    Attributes:
        name: what results and the command line call it.
        statistics: what calibration must gather for it.
        unrelated: the kind of unrelated input it resamples from, if it does; such a method depends on the seed.
        donors: whether it resamples from other examples of the data; then it is seeded as well.
        seeded: whether the seed matters beyond the choice of neurons.
    """

    name: ClassVar[str]
    statistics: ClassVar[tuple[type[ActivationStatistic], ...]] = ()
    unrelated: ClassVar[str | None] = None
    donors: ClassVar[bool] = False
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


class LearnedMethod(AblationMethod):
    """A method with one value a neuron that ``fit`` learns by gradient descent on the cross-entropy.

    The target stays as it is. In the epochs behind the calibration the ablated target reads the calibration data, with
    neurons chosen anew for every example at a random fraction, so that one fit serves every fraction and seed. Values
    begin at the mean and move in units of each neuron's standard deviation. The method finds them by
    ``statistics.learned(self.name)``, as a leaf of what it computes.

    Args:
        steps: of the optimiser, at least; the last epoch is completed.
        lr: of Adam (Kingma & Ba 2015) at the start, in standard deviations; it falls to 0 along a cosine.
        examples: of all processes together in one step, as near as whole batches allow, which are accumulated for it;
            ``accumulate_grad_batches`` of the Trainer goes before.
    """

    statistics: ClassVar[tuple[type[ActivationStatistic], ...]] = (Moments,)

    def __init__(self, steps: int = 100, lr: float = 0.05, examples: int = 32) -> None:
        if steps < 1 or examples < 1 or not lr > 0:
            raise ConfigError(f"steps is {steps}, lr {lr} and examples {examples}; expected all of them above 0")
        self.steps, self.lr, self.examples = steps, lr, examples

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """What takes the steps. Override it to learn in another way."""
        return torch.optim.Adam(parameters, lr=self.lr)


@dataclass(frozen=True, eq=False)
class Affine:
    """A replacement that is affine in the neurons that are kept: ``x̂_a = offset_a + (x_k − center) slope``.

    Such a replacement can be folded into the projection that reads the site, so that it costs nothing.

    Attributes:
        offset: ``(neurons,)`` floating; cast to the dtype of the activations.
        slope: ``(kept, ablated)`` floating; None where the kept neurons don't matter.
        center: ``(kept,)`` floating, if there is a slope.
        kept: ``(kept,)`` int64, if there is a slope.
        ablated: ``(ablated,)`` int64, if there is a slope.
    """

    offset: Tensor
    slope: Tensor | None = None
    center: Tensor = field(default_factory=lambda: torch.zeros(0))
    kept: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    ablated: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def __call__(self, activations: Tensor) -> Tensor:
        """The replacement of activations ``(batch, ..., neurons)``, see :data:`Replacement`."""
        dtype = activations.dtype
        if self.slope is None:
            return self.offset.to(dtype)
        deviations = activations[..., self.kept] - self.center.to(dtype)
        expected = deviations @ self.slope.to(dtype) + self.offset[self.ablated].to(dtype)
        return torch.zeros_like(activations).index_copy_(-1, self.ablated, expected)

    def fold(self, weight: Tensor, bias: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of a projection that makes of a site's activations what it makes of the ablated ones.

        Args:
            weight: ``(outputs, neurons)`` floating, left as it is.
            bias: ``(outputs,)``; None for none.
            mask: ``(neurons,)`` bool, True for the ablated ones.

        Returns:
            New tensors of the shapes and dtypes of weight and bias.

        Example:
            >>> weight, mask = torch.tensor([[1.0, 10.0]]), torch.tensor([False, True])
            >>> constant(torch.tensor([7.0, 8.0])).fold(weight, None, mask)
            (tensor([[1., 0.]]), tensor([80.]))
        """
        wide = torch.promote_types(weight.dtype, torch.float32)
        ablated, folded = weight[:, mask].to(wide), weight.masked_fill(mask, 0)
        offset = self.offset[mask].to(wide)
        if self.slope is not None:
            slope = self.slope.to(wide)
            folded[:, ~mask] = (weight[:, ~mask].to(wide) + ablated @ slope.T).to(weight.dtype)
            offset = offset - self.center.to(wide) @ slope
        added = ablated @ offset
        return folded, (added if bias is None else bias.to(wide) + added).to(weight.dtype)

    @property
    def nbytes(self) -> int:
        """What its tensors take."""
        return sum(t.nbytes for t in (self.offset, self.slope, self.center, self.kept, self.ablated) if t is not None)


def constant(value: Tensor) -> Affine:
    """Replaces by one value per neuron, ``(neurons,)`` of any floating dtype, cast to that of the activations."""
    return Affine(value)


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
