"""What takes an ablated neuron's place."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
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
Places = Callable[[torch.Size], Tensor]
"""The positions that are ablated, for activations of a shape: bool ``(batch, ..., 1)``."""


class Source(NamedTuple):
    """The activations of a site on another input, ``(examples, positions, neurons)`` floating.

    A single example serves a whole batch. ``valid`` ``(examples, positions)`` bool is False at padding.
    """

    activations: Tensor
    valid: Tensor


@dataclass
class Batch:
    """What a method can know of the batch at hand.

    Read its fields inside the replacement, not in ``prepare``: they change with every batch.

    Attributes:
        examples: the indices of its examples, ``(batch,)`` int64, below 0 for those that only fill it.
        sources: (kind, seed) of another input → site → its activations there.
        places: gives the positions of a site, with activations of a shape, that are ablated: bool ``(batch, ..., 1)``;
            None where all are.
    """

    examples: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    sources: dict[tuple[str, int], dict[Site, Source]] = field(default_factory=dict)
    places: Callable[[Site, torch.Size], Tensor] | None = None


@dataclass(frozen=True)
class Ablation:
    """One condition at one site, as a method sees it.

    Attributes:
        site: the site.
        mask: ``(neurons,)`` bool, True for the ablated neurons, on the target's device. While a method learns,
            ``(examples, 1, neurons)``, for activations ``(examples, positions, neurons)``.
        statistics: those of the site.
        seed: of the condition; None where it can't matter.
        batch: the batch at hand.
        masks: a digest of the masks of all sites.
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


@dataclass(frozen=True, eq=False)
class Edit:
    """Replaces the masked neurons of a site and keeps the others: the only code that combines both.

    ``mask`` is ``(neurons,)`` bool, or broadcastable to the activations. They are replaced at ``places``; None for all.
    """

    mask: Tensor
    replacement: Replacement
    places: Places | None = None

    def __call__(self, activations: Tensor) -> Tensor:
        """A new tensor of the shape, dtype and device of ``activations`` ``(batch, ..., neurons)``."""
        mask = self.mask.to(activations.device)
        if self.places is not None:
            mask = mask & self.places(activations.shape).to(mask.device)
        return torch.where(mask, self.replacement(activations).to(activations), activations)

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors; 0 for a replacement that doesn't tell."""
        return getattr(self.replacement, "nbytes", 0)


class AblationMethod(ABC):
    """A replacement for ablated neurons. Subclass it to try another one.

    Attributes:
        name: what results and the command line call it.
        statistics: what calibration must gather for it.
        seeded: whether the seed matters beyond the choice of neurons.
        source: the kind of input that it resamples from, see :meth:`AblationModule.source`; None for no resampling.
        attributable: whether :meth:`alone` gives the replacement of a unit that is ablated alone.
        constant: whether one replacement at a site serves all conditions.
        needs_batch: whether the replacement depends on the examples and positions, not on the activations alone.
    """

    name: str
    statistics: ClassVar[tuple[type[ActivationStatistic], ...]] = ()
    seeded: ClassVar[bool] = False
    source: ClassVar[str | None] = None
    attributable: ClassVar[bool] = True
    constant: ClassVar[bool] = False
    needs_batch: ClassVar[bool] = False

    @abstractmethod
    def prepare(self, ablation: Ablation) -> Replacement:
        """The replacement at one site under one condition; it is then applied to every batch."""

    def notes(self, statistics: Iterable[SiteStatistics]) -> list[str]:
        """Lines about how the replacement was made, shown with the results."""
        return []

    def alone(self, ablation: Ablation, sizes: Sequence[int]) -> dict[int, Replacement]:
        """For each unit size in neurons, the replacement of a unit of that size when it alone is ablated.

        By default the replacement for all neurons of ``ablation``. Override it where the replacement of a neuron
        depends on which others are ablated.
        """
        return dict.fromkeys(sizes, self.prepare(ablation))

    def edit(self, ablation: Ablation, replacement: Replacement, places: Places | None) -> Edit:
        """What is done at a site; override it for a method that acts on anything but the site's neurons."""
        return Edit(ablation.mask, replacement, places)

    def without_intercept(self) -> "AblationMethod | None":
        """The same method fitted without an intercept, for projections that have no bias; None if it can't be."""
        return None


@dataclass(frozen=True, eq=False)
class Affine:
    """A replacement that is affine in the kept neurons: ``x̂_a = offset_a + (x_k − center) slope``.

    It can be folded into the projection that reads the site. Tensors are cast to the dtype and device of activations.

    Attributes:
        offset: ``(neurons,)`` floating.
        slope: ``(kept, ablated)`` floating; None for a constant, whose other attributes don't matter.
        center: ``(kept,)`` floating.
        kept: the indices of the kept neurons, int64.
        ablated: the indices of the ablated neurons, int64.
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
        """New weight and bias, with which a projection does the ablation by itself.

        Args:
            weight: of the projection, ``(outputs, neurons)`` floating; it is not changed.
            bias: ``(outputs,)`` floating, or None.
            mask: ``(neurons,)`` bool, True for the ablated neurons.
        """
        wide = torch.promote_types(weight.dtype, torch.float32)
        ablated, folded = weight[:, mask].to(wide), weight.masked_fill(mask, 0)
        offset = self.offset.to(wide).to(mask.device)[mask]
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
