"""The protocol of a phase, and how much data it works on."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class Phase(ABC):
    """One thing that a run does with its batches, for one or several epochs.

    Attributes:
        module: the :class:`~lightning_ablate.AblationModule` whose target it runs.
        title: what the progress bar calls it.
        epochs: how many epochs it takes.
    """

    title: str
    epochs: int = 1

    def __init__(self, module: Any) -> None:
        self.module = module

    def begin_epoch(self, epoch: int) -> None:
        """Prepares for an epoch of this phase, the first one being 0."""
        return None

    @abstractmethod
    def step(self, batch: Any, batch_idx: int) -> None:
        """Does its work on one batch, which is on the device."""

    def end_epoch(self) -> None:
        """Completes an epoch after its last batch, and merges the processes: every process must call it."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """How far it has come, as tensors on the CPU and plain values; every process must call it."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a :meth:`state_dict`."""
        return None


@dataclass(frozen=True)
class Amount:
    """How much calibration data there is.

    Attributes:
        batches: of an epoch, of each process; infinite where the data tell no length.
        batch_size: of all processes together.
        examples: of all processes together; 0 where it isn't known.
        dry: whether one step of everything is enough, as in a ``fast_dev_run``.
    """

    batches: float
    batch_size: int
    examples: int
    dry: bool = False
