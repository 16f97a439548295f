"""What takes an ablated neuron's place."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_ablate.errors import StatisticsError
from lightning_ablate.sites import Site
from lightning_ablate.statistics import ActivationStatistic, SiteStatistics
from lightning_ablate.statistics.base import by_example

Replacement = Callable[[Tensor], Tensor]
"""Maps activations ``(batch, ..., neurons)`` to what replaces them, broadcastable to the same shape; pure."""


class Source(NamedTuple):
    """What a site does on another input: ``activations`` ``(examples, positions, neurons)``, floating.

    A single example serves all of a batch. ``valid`` ``(examples, positions)`` bool is False at padding.
    """

    activations: Tensor
    valid: Tensor


@dataclass
class Batch:
    """What a method can know of the batch at hand. It changes with every batch, so look it up when replacing.

    ``examples`` ``(batch,)`` int64 are the indices of its examples, below 0 for those that only fill it; ``sources`` is
    what each site does on the inputs that are resampled from, by (kind, seed).
    """

    examples: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    sources: dict[tuple[str, int], dict[Site, Source]] = field(default_factory=dict)


@dataclass(frozen=True)
class Ablation:
    """One condition at one site, as a method sees it.

    ``mask`` is ``(neurons,)`` bool, True for the ablated neurons, on the target's device; while values are learned
    ``(examples, 1, neurons)``, and activations are ``(examples, positions, neurons)``. ``statistics`` are those the
    method needs; ``seed`` is the condition's, None where it can't matter, and ``masks`` a digest of the masks of all
    sites.
    """

    site: Site
    mask: Tensor
    statistics: SiteStatistics
    seed: int | None
    batch: Batch = field(default_factory=Batch)
    masks: str = ""

    def by_example(self, activations: Tensor) -> Tensor:
        """Activations as ``(batch, positions, neurons)``; StatisticsError if the examples can't be told apart."""
        if not len(self.batch.examples):
            raise StatisticsError(f"{self.site.name} ran in a part of the target; run the target itself")
        return by_example(activations, torch.ones(len(self.batch.examples), 1))[0]


class AblationMethod(ABC):
    """A replacement for ablated neurons. Subclass it to try another one.

    Attributes:
        name: what results and the command line call it.
        statistics: what calibration must gather for it.
        seeded: whether the seed matters beyond the choice of neurons.
        source: the kind of input it resamples from, if it does (see :meth:`AblationModule.source`).
        attributable: whether :meth:`alone` says what takes the place of a unit that is ablated alone.
        needs_batch: whether the replacement depends on which examples and positions are run, not on activations alone.
    """

    name: str
    statistics: ClassVar[tuple[type[ActivationStatistic], ...]] = ()
    seeded: ClassVar[bool] = False
    source: ClassVar[str | None] = None
    attributable: ClassVar[bool] = True
    needs_batch: ClassVar[bool] = False

    @abstractmethod
    def prepare(self, ablation: Ablation) -> Replacement:
        """The replacement at one site under one condition, computed once and then applied to every batch."""

    def alone(self, ablation: Ablation, sizes: Sequence[int]) -> dict[int, Replacement]:
        """By the size of units of so many neurons side by side: what takes the place of each if it alone is ablated.

        By default that of all neurons of ``ablation``, as what takes the place of one seldom depends on which others
        are ablated. Override it where it does.
        """
        return dict.fromkeys(sizes, self.prepare(ablation))

    def without_intercept(self) -> "AblationMethod | None":
        """The same method fitted without an intercept, for projections that have no bias; None if it can't be."""
        return None


@dataclass(frozen=True, eq=False)
class Edit:
    """What is done to the activations of a site: the masked neurons are replaced, the others stay.

    This is the one place where both are combined. ``mask`` is ``(neurons,)`` bool, or broadcastable to the activations.
    """

    mask: Tensor
    replacement: Replacement

    def __call__(self, activations: Tensor) -> Tensor:
        """A new tensor of the shape, dtype and device of ``activations`` ``(batch, ..., neurons)``."""
        return torch.where(self.mask.to(activations.device), self.replacement(activations).to(activations), activations)

    @property
    def nbytes(self) -> int:
        """The bytes its own tensors take, as far as that is known."""
        return self.replacement.nbytes if isinstance(self.replacement, Affine) else 0


@dataclass(frozen=True, eq=False)
class Affine:
    """A replacement that is affine in the neurons that are kept: ``x̂_a = offset_a + (x_k − center) slope``.

    Such a replacement can be folded into the projection that reads the site, so that it costs nothing. ``offset`` is
    ``(neurons,)``, ``slope`` ``(kept, ablated)`` and ``center`` ``(kept,)``, all floating and taken to the dtype and
    device of the activations; ``kept`` and ``ablated`` are int64 indices. Without a slope the last three don't matter.
    """

    offset: Tensor
    slope: Tensor | None = None
    center: Tensor = field(default_factory=lambda: torch.zeros(0))
    kept: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    ablated: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def __call__(self, activations: Tensor) -> Tensor:
        """The replacement of activations ``(batch, ..., neurons)``, see :data:`Replacement`."""
        offset = self.offset.to(activations)
        if self.slope is None:
            return offset
        kept, ablated = (places.to(activations.device) for places in (self.kept, self.ablated))
        deviations = activations[..., kept] - self.center.to(activations)
        expected = deviations @ self.slope.to(activations) + offset[ablated]
        return torch.zeros_like(activations).index_copy_(-1, ablated, expected)

    def fold(self, weight: Tensor, bias: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of a projection that makes of a site's activations what it makes of the ablated ones.

        ``weight`` ``(outputs, neurons)``, floating, and ``bias`` ``(outputs,)``, None for none, are left as they are;
        ``mask`` is ``(neurons,)`` bool, True for the ablated ones.
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
        """The bytes its tensors take."""
        return sum(t.nbytes for t in (self.offset, self.slope, self.center, self.kept, self.ablated) if t is not None)


def constant(value: Tensor) -> Affine:
    """Replaces by one value per neuron, ``(neurons,)`` of any floating dtype, cast to that of the activations."""
    return Affine(value)
