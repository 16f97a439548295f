"""What every statistic of a site's neurons has in common."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import ClassVar, Self, TypeVar

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_ablate.errors import StatisticsError
from lightning_ablate.sites import Site

FOUND = ("first", "second", "estimate", "se", "examples")  # what an attribution finds of each unit
S = TypeVar("S", bound="ActivationStatistic")
_MISSING = (
    "which `fit` has not found: run `fit` with this method, or give its checkpoint: --ckpt_path on the command line, "
    "calibration=Calibration.load(path, model) in Python"
)


class SiteStatistics:
    """The statistics of one site by their class; the values learned and attributions of it by a method's name."""

    def __init__(
        self,
        site: str,
        statistics: Mapping[type["ActivationStatistic"], "ActivationStatistic"],
        learned: Mapping[str, Tensor] | None = None,
        attributed: Mapping[str, Tensor] | None = None,
        weight: Tensor | None = None,
    ) -> None:
        self.site, self.attributed, self._weight = site, attributed or {}, weight
        self._statistics, self._learned = dict(statistics), learned or {}

    def __getitem__(self, kind: type[S]) -> S:
        """The statistic of that class; StatisticsError if it was not gathered."""
        found = self._statistics.get(kind)
        if not isinstance(found, kind):
            raise StatisticsError(f"needs the statistic {kind.__name__} of the site {self.site}, {_MISSING}")
        return found

    def learned(self, method: str, *shape: int) -> Tensor:
        """The values that a method learned, float32; StatisticsError if there are none, or none of a shape."""
        found = self._learned.get(method)
        if found is None or (shape and found.shape != shape):
            raise StatisticsError(f"needs the values it learns for the site {self.site}, {_MISSING}")
        return found

    @property
    def weight(self) -> Tensor:
        """The projection's weights, ``(neurons, outputs)``; StatisticsError if it isn't just a matrix and a bias."""
        if self._weight is None:
            raise StatisticsError(
                f"needs the weights with which a projection reads {self.site}, which is an output, or the input of no "
                "plain linear one, or sharded"
            )
        return self._weight

    def __contains__(self, kind: type["ActivationStatistic"]) -> bool:
        """Whether the statistic of that class was gathered."""
        return kind in self._statistics


class ActivationStatistic(Metric, ABC):
    """A statistic of each neuron of one site, gathered batch by batch. Subclass it to gather another one.

    Add each state with its ``dist_reduce_fx``, which merges the ranks, and with ``persistent=True`` to keep it in the
    checkpoint. States must not depend on how the activations are split into batches. At the end of an epoch,
    calibration merges the ranks and calls ``check`` and ``reduce``; then methods read the states and properties.

    Attributes:
        neurons: the width of the site.
        takes_examples: whether ``update`` takes ``examples`` ``(batch,)`` int64, too, the indices of the examples.
        needs: statistics that must be complete first, which takes another calibration epoch. The constructor gets them
            as ``earlier``.
    """

    full_state_update = False
    takes_examples: ClassVar[bool] = False
    needs: ClassVar[tuple[type["ActivationStatistic"], ...]] = ()

    def __init__(self, neurons: int, earlier: SiteStatistics | None = None) -> None:
        super().__init__()
        self.neurons = neurons

    @classmethod
    def of(cls, site: Site, earlier: SiteStatistics | None = None) -> Self:
        """The statistic of a site, before its first batch. Override it if more than the width matters."""
        return cls(site.width, earlier)

    @abstractmethod
    def update(self, activations: Tensor, valid: Tensor | None = None) -> None:
        """Adds a batch of activations ``(batch, ..., neurons)``, floating.

        ``valid`` is bool, broadcastable to ``(batch, seq)``, False at padding; None counts every position.
        """

    def check(self) -> None:
        """Raises StatisticsError if the statistic can't be right; called once the epoch is complete."""

    def note(self, site: Site) -> str | None:
        """One line about what limits the use of this statistic, if anything does; called after :meth:`check`."""
        return None

    def reduce(self) -> None:
        """Frees what is needed no longer once the epoch is complete and the neurons are described."""
        self._cache = None  # torchmetrics keeps the states from before the ranks were merged

    @classmethod
    def epoch(cls) -> int:
        """The calibration epoch, from 0, in which this statistic is gathered."""
        return 1 + max((kind.epoch() for kind in cls.needs), default=-1)


def positions(activations: Tensor, valid: Tensor | None) -> Tensor:
    """The activations of the valid positions, ``(positions, neurons)``, in their own dtype; see :func:`by_example`."""
    if valid is None:
        return activations.reshape(-1, activations.shape[-1])
    if activations.ndim == 2 and len(activations) == len(valid):  # one position an example
        return activations[valid.any(1)]
    rows, real = by_example(activations, valid)
    return rows[real]


def by_example(activations: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Activations as ``(examples, positions, neurons)``, and which are valid ``(examples, positions)`` bool.

    StatisticsError if the shapes don't fit.
    """
    if valid is None:
        valid = torch.ones(len(activations), 1, dtype=torch.bool, device=activations.device)
    examples, length = valid.shape
    if len(activations) % examples if length == 1 else activations.shape[:2] != valid.shape:
        raise StatisticsError(
            f"gets activations {tuple(activations.shape)} where {examples} examples of {length} positions are expected "
            "(batch first); leave the site out (--ablation.sites), or override `valid_at`"
        )
    rows = activations.reshape(examples, -1, activations.shape[-1])
    return rows, valid.expand(rows.shape[:2])


def with_needs(kinds: Iterable[type[ActivationStatistic]]) -> list[type[ActivationStatistic]]:
    """These statistics and those they need, each once, needed ones first."""
    found: dict[type[ActivationStatistic], None] = {}
    for kind in kinds:
        found |= dict.fromkeys([*with_needs(kind.needs), kind])
    return list(found)
