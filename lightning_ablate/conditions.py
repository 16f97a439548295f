"""What is ablated and how: the conditions that a sweep compares."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

from lightning_ablate.errors import ConfigError

if TYPE_CHECKING:
    from lightning_ablate.methods import AblationMethod


@dataclass(frozen=True)
class Selection:
    """Which units are ablated, whatever the method.

    Attributes:
        fraction: share of the units that go, 0 to 1, in each site or in the part it is confined to.
        seed: of the choice of units and of what a method draws; None where it can't matter.
        part: the one site or layer it is confined to, or what else names its units; empty for all sites.
        head: the one head it is confined to; None for all.
    """

    fraction: float
    seed: int | None = None
    part: str = ""
    head: int | None = None


@dataclass(frozen=True)
class Condition(Selection):
    """A selection and the method by which it is ablated, ``none`` for the baseline.

    Example:
        >>> print(Condition(0.5, 42, method="mean"), Condition(1.0, None, "h.0", 3, method="zero"), BASELINE, sep=", ")
        mean 50% seed 42, zero h.0 head 3, baseline
    """

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


def check_conditions(methods: Sequence["AblationMethod"], fractions: Sequence[float], seeds: Sequence[int]) -> None:
    """Raises ConfigError if a fraction is outside 0 to 1, a name stands for two methods, or one of them is empty."""
    for name, values in (("methods", methods), ("fractions", fractions), ("seeds", seeds)):
        if not values:
            raise ConfigError(f"{name} is empty, expected at least one (--ablation.{name})")
    for fraction in fractions:
        if not (isinstance(fraction, int | float) and isfinite(fraction) and 0 <= fraction <= 1):
            raise ConfigError(
                f"fractions holds {fraction!r}, expected shares of the neurons from 0 to 1 (--ablation.fractions)"
            )
    names = [method.name for method in methods]
    if repeated := {name for name in names if names.count(name) > 1 or name == BASELINE.method}:
        raise ConfigError(
            f"methods holds {sorted(repeated)} more than once, or by a name that is taken; leave one out, or give it a "
            "`name` of its own (--ablation.methods)"
        )


def distinct_conditions(
    methods: Sequence["AblationMethod"], selections: Sequence[Selection], seeds: Sequence[int]
) -> list[Condition]:
    """Every condition once, the baseline first.

    Where a selection doesn't depend on the seed, only a method that draws something else from it has one condition per
    seed.

    Example:
        >>> from lightning_ablate.choices import Random
        >>> from lightning_ablate.methods import Zero
        >>> selections = Random().selections([], [0, 0.5, 1], seeds=[1, 2])
        >>> [str(condition) for condition in distinct_conditions([Zero()], selections, seeds=[1, 2])]
        ['baseline', 'zero 50% seed 1', 'zero 50% seed 2', 'zero 100%']
    """
    found = {BASELINE: None}
    for method in methods:
        for chosen in selections:
            for seed in seeds if chosen.seed is None and method.seeded else [chosen.seed]:
                found[Condition(**{**asdict(chosen), "seed": seed}, method=method.name)] = None
    return list(found)
