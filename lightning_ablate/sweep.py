"""All conditions of a run, and how each is applied."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite

from torch import Tensor

from lightning_ablate.calibration import Calibration, check_runs
from lightning_ablate.errors import ConfigError, NonFiniteError, StatisticsError
from lightning_ablate.masks import NeuronChoice, RandomNeurons
from lightning_ablate.methods import Ablation, AblationMethod, Replacement, ablate
from lightning_ablate.metrics import Scored, SweepMetrics
from lightning_ablate.sites import Site, hooked


@dataclass(frozen=True)
class Condition:
    """What is ablated and how.

    Attributes:
        method: its name; ``none`` for the baseline.
        fraction: share of each site's neurons that is ablated, 0 to 1.
        seed: of the choice of neurons and of what the method draws; None where it can't matter.
    """

    method: str
    fraction: float
    seed: int | None

    def __str__(self) -> str:
        """As the progress bar shows it."""
        seed = "" if self.seed is None else f" seed {self.seed}"
        return "baseline" if self == BASELINE else f"{self.method} {100 * self.fraction:g}%{seed}"


BASELINE = Condition("none", 0.0, None)


def distinct_conditions(
    methods: Sequence[AblationMethod], fractions: Sequence[float], seeds: Sequence[int]
) -> list[Condition]:
    """Every condition once, the baseline first.

    A fraction of 0 is the baseline; at a fraction of 1 every choice of neurons is the same, so only a method that
    draws something else from the seed has one condition per seed there.

    Raises:
        ConfigError: if a fraction is outside 0 to 1, a name stands for two methods, or one of the lists is empty.

    Example:
        >>> from lightning_ablate.methods import Zero
        >>> [str(c) for c in distinct_conditions([Zero()], [0, 0.5, 1], seeds=[1, 2])]
        ['baseline', 'zero 50% seed 1', 'zero 50% seed 2', 'zero 100%']
    """
    for name, values in (("methods", methods), ("fractions", fractions), ("seeds", seeds)):
        if not values:
            raise ConfigError(f"{name} is empty, expected at least one")
    for fraction in fractions:
        if not (isfinite(fraction) and 0 <= fraction <= 1):
            raise ConfigError(f"fractions holds {fraction}, expected a share of the neurons from 0 to 1")
    names = [method.name for method in methods]
    if repeated := {name for name in names if names.count(name) > 1 or name == BASELINE.method}:
        raise ConfigError(f"methods holds {sorted(repeated)} more than once, or by a name that is taken")
    found = {BASELINE: None}
    for method in methods:
        for fraction in sorted(map(float, fractions)):
            for seed in seeds:
                if fraction > 0:
                    matters = fraction < 1 or method.seeded or method.unrelated is not None
                    found[Condition(method.name, fraction, seed if matters else None)] = None
    return list(found)


class Sweep:
    """Applies every condition to a calibrated target, and keeps the scores.

    Args:
        calibration: the target, its sites and their statistics.
        methods: what replaces a neuron.
        conditions: of these methods, the baseline first (see :func:`distinct_conditions`).
        choice: which neurons go.
    """

    def __init__(
        self,
        calibration: Calibration,
        methods: Sequence[AblationMethod],
        conditions: Sequence[Condition],
        choice: NeuronChoice | None = None,
    ) -> None:
        self.conditions = tuple(conditions)
        self.metrics = SweepMetrics(len(self.conditions)).to(calibration.device)
        self.classes = 0
        self.announce: Callable[[Condition], None] = lambda condition: None
        self._calibration = calibration
        self._methods = {method.name: method for method in methods}
        self._choice = choice or RandomNeurons()
        self._prepared: dict[Condition, dict[Site, tuple[Tensor, Replacement]]] = {}
        self._unrelated: dict[tuple[str, int | None], dict[Site, Tensor]] = {}

    @property
    def unrelated(self) -> list[tuple[str, int]]:
        """The (kind, seed) of every unrelated input that the conditions resample from."""
        pairs = [(self._methods[c.method].unrelated, c.seed) for c in self.conditions if c != BASELINE]
        return list(dict.fromkeys((kind, seed) for kind, seed in pairs if kind is not None and seed is not None))

    def prepare(self) -> None:
        """Computes what every condition puts in the place of the ablated neurons.

        Raises:
            StatisticsError: if a method's statistics are missing.
        """
        for condition in self.conditions[1:]:
            self._prepared[condition] = {site: self._replacement(condition, site) for site in self._calibration.sites}

    @contextmanager
    def reading(self, kind: str, seed: int) -> Iterator[None]:
        """Keeps the activations of the unrelated input that is run inside, ``(1, seq, neurons)`` a site."""
        activations = self._unrelated[kind, seed] = {}
        runs = dict.fromkeys(self._calibration.sites, 0)

        def read(site: Site, values: Tensor) -> None:
            runs[site] += 1
            activations[site] = values

        with hooked(self._calibration.target, self._calibration.sites, read):
            yield
        check_runs(runs)

    @contextmanager
    def applied(self, condition: Condition) -> Iterator[None]:
        """Ablates the target for the one forward pass inside.

        Raises:
            SiteError: if a site did not run, or ran more than once.
        """
        self.announce(condition)
        if condition == BASELINE:
            yield
            return
        prepared, runs = self._prepared[condition], dict.fromkeys(self._calibration.sites, 0)

        def replace(site: Site, activations: Tensor) -> Tensor:
            runs[site] += 1
            return ablate(activations, *prepared[site])

        with hooked(self._calibration.target, self._calibration.sites, replace):
            yield
        check_runs(runs)

    def score(self, index: int, scored: Scored, clean: Scored) -> None:
        """Adds what the condition of that index scored on a batch."""
        self.classes = scored.logits.shape[1]
        self.metrics.update(index, scored, clean.logits)

    def check_finite(self) -> None:
        """Raises NonFiniteError if a condition's logits gave a score that is NaN or infinite."""
        finite = (self.metrics.cross_entropy + self.metrics.kl).isfinite()
        if not bool(finite.all()):
            bad = [str(c) for c, good in zip(self.conditions, finite.tolist(), strict=True) if not good]
            raise NonFiniteError(
                f"the logits under {bad[0]!r} are NaN or infinite ({len(bad)} of {len(self.conditions)} conditions); "
                "try another precision (--trainer.precision, --model.dtype)"
            )

    def _replacement(self, condition: Condition, site: Site) -> tuple[Tensor, Replacement]:
        method, device = self._methods[condition.method], self._calibration.device
        mask = self._choice.mask(site, condition.fraction, condition.seed or 0).to(device)
        ablation = Ablation(site, mask, self._calibration[site], condition.seed, self._unrelated)
        try:
            return mask, method.prepare(ablation)
        except StatisticsError as error:
            raise StatisticsError(f"the method {method.name!r} {error}") from error
