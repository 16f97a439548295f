"""What a run compares: every method, with every choice of units, at every fraction and seed."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Literal

from torch import Tensor

from lightning_ablate.calibration import Calibration
from lightning_ablate.choices import Choice
from lightning_ablate.conditions import BASELINE, Condition, Selection
from lightning_ablate.errors import ConfigError
from lightning_ablate.methods import AblationMethod
from lightning_ablate.positions import ALL, Positions, check_positions
from lightning_ablate.sites import Basis, Site, check_mask


@dataclass(frozen=True)
class Sweep:
    """The conditions of a run.

    Raises:
        ConfigError: if there are no sites, or methods without fractions or seeds; if a fraction is outside 0 to 1, a
            seed isn't a whole number, or two methods share a name.
    """

    methods: tuple[AblationMethod, ...]
    fractions: tuple[float, ...]
    seeds: tuple[int, ...]
    neurons: Choice
    sites: tuple[str, ...] = ("attention",)
    positions: Positions = ALL
    calibrate_at: Literal["all", "positions"] = "all"
    strict: bool = False  # whether attention alone may mix positions
    bases: Mapping[str, Basis] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks what was given."""
        if not isinstance(self.neurons, Choice):
            raise ConfigError(
                f"neurons is {self.neurons!r:.80}, expected a Choice, such as EachHead() (--ablation.neurons)"
            )
        for name in ("fractions", "seeds", "sites") if self.methods else ("sites",):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty, expected at least one (--ablation.{name})")
        if odd := [seed for seed in self.seeds if type(seed) is not int]:
            raise ConfigError(f"seeds holds {odd[0]!r}, expected whole numbers (--ablation.seeds)")
        check_positions(self.positions)
        for fraction in self.fractions:
            if not (isinstance(fraction, int | float) and isfinite(fraction) and 0 <= fraction <= 1):
                raise ConfigError(
                    f"fractions holds {fraction!r}, expected shares of the neurons from 0 to 1 (--ablation.fractions)"
                )
        if nameless := [method for method in self.methods if not hasattr(method, "name")]:
            raise ConfigError(f"{type(nameless[0]).__name__} has no `name`, expected what results call the method")
        names = [method.name for method in self.methods]
        if repeated := {name for name in names if names.count(name) > 1 or name == BASELINE.method}:
            raise ConfigError(
                f"methods holds {sorted(repeated)} more than once, or by a name that is taken; leave one out, or give "
                "it a `name` of its own (--ablation.methods)"
            )

    @property
    def gathered(self) -> Positions:
        """The positions whose activations the statistics are of."""
        return self.positions if self.calibrate_at == "positions" else ALL

    def method(self, name: str) -> AblationMethod:
        """The method of this name."""
        return next(method for method in self.methods if method.name == name)

    def conditions(self, sites: Sequence[Site]) -> list[Condition]:
        """Every condition once, the baseline first; one per seed only where the choice or the method depends on it."""
        selections = self.neurons.selections(sites, sorted(map(float, self.fractions)), self.seeds)
        found = {BASELINE: None}
        for method in self.methods:
            for selection in selections:
                for seed in self.seeds if selection.seed is None and method.seeded else [selection.seed]:
                    found[Condition(**{**asdict(selection), "seed": seed}, method=method.name)] = None
        return list(found)

    def masks(self, selection: Selection, calibration: Calibration) -> dict[Site, Tensor]:
        """The neurons of every site that are ablated, ``(neurons,)`` bool on the CPU."""
        masks = self.neurons.masks_of(selection, {site: calibration[site] for site in calibration.sites})
        for site, mask in masks.items():
            check_mask(mask, site, type(self.neurons).__name__)
        return masks
