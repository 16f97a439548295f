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
    """Which units are ablated, whatever the method: a ``fraction`` of them, 0 to 1, in each site or in ``part``.

    That is the one site or layer it is confined to, or what else names its units; ``head`` the one head. The ``seed``
    is that of the choice of units and of what a method draws; None where it can't matter.
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


def check_conditions(
    methods: Sequence["AblationMethod"],
    fractions: Sequence[float],
    seeds: Sequence[int],
    sites: Sequence[str] = ("attention",),
) -> None:
    """Raises ConfigError if a fraction is outside 0 to 1, a name stands for two methods, or one of them is empty."""
    for name, values in {"methods": methods, "fractions": fractions, "seeds": seeds, "sites": sites}.items():
        if not values:
            raise ConfigError(f"{name} is empty, expected at least one (--ablation.{name})")
    if odd := [seed for seed in seeds if type(seed) is not int]:
        raise ConfigError(f"seeds holds {odd[0]!r}, expected whole numbers (--ablation.seeds)")
    for fraction in fractions:
        if not (isinstance(fraction, int | float) and isfinite(fraction) and 0 <= fraction <= 1):
            raise ConfigError(
                f"fractions holds {fraction!r}, expected shares of the neurons from 0 to 1 (--ablation.fractions)"
            )
    if nameless := [method for method in methods if not hasattr(method, "name")]:
        raise ConfigError(f"{type(nameless[0]).__name__} has no `name`, expected what results shall call the method")
    names = [method.name for method in methods]
    if repeated := {name for name in names if names.count(name) > 1 or name == BASELINE.method}:
        raise ConfigError(
            f"methods holds {sorted(repeated)} more than once, or by a name that is taken; leave one out, or give it a "
            "`name` of its own (--ablation.methods)"
        )


def distinct_conditions(
    methods: Sequence["AblationMethod"], selections: Sequence[Selection], seeds: Sequence[int]
) -> list[Condition]:
    """Every condition once, the baseline first; one per seed only where the selection or the method depends on it."""
    found = {BASELINE: None}
    for method in methods:
        for chosen in selections:
            for seed in seeds if chosen.seed is None and method.seeded else [chosen.seed]:
                found[Condition(**{**asdict(chosen), "seed": seed}, method=method.name)] = None
    return list(found)
