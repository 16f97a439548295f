"""What is ablated and how: the conditions that a sweep compares."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Selection:
    """Which units are ablated, whatever the method.

    Attributes:
        fraction: the share of units that is asked for, 0 to 1, in each site or in ``part``.
        seed: of the choice of units, and of what a method draws; None where it can't matter.
        part: the one site or layer that is ablated, or another name of the units; empty for all sites.
        head: the one head of that site; None for all.
    """

    fraction: float
    seed: int | None = None
    part: str = ""
    head: int | None = None


@dataclass(frozen=True)
class Condition(Selection):
    """A selection and the method by which it is ablated, ``none`` for the baseline."""

    method: str = "none"

    def __str__(self) -> str:
        """As the progress bar shows it."""
        if self == BASELINE:
            return "baseline"
        head = "" if self.head is None else f" head {self.head}"
        where = f" {self.part}{head}" if self.part else f" {100 * self.fraction:g}%"
        return f"{self.method}{where}" + ("" if self.seed is None else f" seed {self.seed}")


BASELINE = Condition(0.0)


def listed(given: Any) -> tuple[Any, ...]:
    """Several values, or a single one, as a tuple."""
    return tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)
