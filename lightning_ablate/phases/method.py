"""The phases that prepare single methods, and how the schedule finds them."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

from lightning_ablate.methods import AblationMethod
from lightning_ablate.modules.phase import Amount, Phase
from lightning_ablate.sweep import Sweep


class Epoch(NamedTuple):
    """An epoch over the calibration data."""

    number: int  # of its phase, from 0
    make: Callable[..., Phase]  # of a module and a run
    cost: float  # of a batch, in forward passes
    method: str = ""  # whose conditions are run, and what each costs beside that
    per_condition: float = 0.0
    note: str = ""  # what the plan must say of it
    per_unit: float = 0.0  # what each unit costs that a verification measures
    per_pass: float = 0.0  # what each pass costs that measures heads


class MethodPhase(Phase):
    """Prepares one method, in epochs of its own after calibration. A subclass names the class of methods it serves.

    The schedule gives a method to the phase that serves its nearest class, so a new method and its phase are one file.
    """

    serves: ClassVar[type[AblationMethod]]

    @classmethod
    @abstractmethod
    def scheduled(cls, method: Any, sweep: Sweep, amount: Amount) -> list[Epoch]:
        """The epochs that it takes to prepare a method for a sweep."""


def phase_of(method: AblationMethod) -> type[MethodPhase] | None:
    """The phase that prepares a method; None if it needs none."""
    served = {kind.serves: kind for kind in _subclasses(MethodPhase) if "serves" in vars(kind)}  # type: ignore[type-abstract]
    return next((served[kind] for kind in type(method).__mro__ if kind in served), None)


def _subclasses(kind: type[MethodPhase]) -> Iterator[type[MethodPhase]]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
