"""What every phase of a run has in common."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_ablate.modules import AblationModule as Module
else:
    Module = Any  # modules import this file


class Phase(ABC):
    """One thing that a run does with its batches, for one or several epochs."""

    title: str  # as the progress bar shows it
    epochs: int = 1  # how many it takes

    def __init__(self, module: Module) -> None:
        self.module = module

    def begin_epoch(self, epoch: int) -> None:
        """Prepares for an epoch of this phase, the first one being 0."""
        return None

    @abstractmethod
    def step(self, batch: Any, batch_idx: int) -> None:
        """Does its work on one batch, which is on the device."""

    def end_epoch(self) -> None:
        """Completes an epoch behind its last batch; every process must call it, as the processes are merged here."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """How far it has come, as tensors on the CPU and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a :meth:`state_dict`."""
        return None


class Done(Phase):
    """What an earlier run has done: nothing is left to do in this epoch."""

    title = "Going on"

    def step(self, batch: Any, batch_idx: int) -> None:
        """Passes the batch over."""
