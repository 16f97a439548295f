"""All conditions of a run, and how each is applied."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from lightning_ablate.calibration import Calibration, check_runs
from lightning_ablate.errors import ConfigError, NonFiniteError, StatisticsError
from lightning_ablate.folding import swapped, weights_of
from lightning_ablate.masks import NeuronChoice, RandomNeurons, Selection
from lightning_ablate.methods import (
    Ablation,
    AblationMethod,
    Affine,
    Batch,
    ConstantMethod,
    Replacement,
    ablate,
    constant,
)
from lightning_ablate.metrics import Clean, Scored, SweepMetrics
from lightning_ablate.sites import Site, hooked
from lightning_ablate.statistics.base import by_example


@dataclass(frozen=True)
class Condition:
    """What is ablated and how.

    Attributes:
        method: its name; ``none`` for the baseline.
        fraction: share of the units that is ablated, 0 to 1, in each site or in the part it is confined to.
        seed: of the choice of neurons and of what the method draws; None where it can't matter.
        part: name of the one site or layer it is confined to; empty for all sites.
        head: the one head it is confined to; None for all.
    """

    method: str
    fraction: float
    seed: int | None
    part: str = ""
    head: int | None = None

    def __str__(self) -> str:
        """As the progress bar shows it."""
        if self == BASELINE:
            return "baseline"
        head = "" if self.head is None else f" head {self.head}"
        where = f" {self.part}{head}" if self.part else f" {100 * self.fraction:g}%"
        return f"{self.method}{where}" + ("" if self.seed is None else f" seed {self.seed}")


BASELINE = Condition("none", 0.0, None)
_ROOM = 2**30  # bytes


@dataclass(frozen=True)
class Prepared:
    """What one condition does to the target.

    Attributes:
        hooks: by site the mask, and what takes the masked neurons' place.
        folded: by path of the projections into which that is folded, their temporary weights and biases.
    """

    hooks: Mapping[Site, tuple[Tensor, Replacement]]
    folded: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def nbytes(self) -> int:
        """What its tensors take, as far as that is known."""
        affine = sum(made.nbytes for _, made in self.hooks.values() if isinstance(made, Affine))
        return affine + sum(tensor.nbytes for pair in self.folded.values() for tensor in pair)


def check_conditions(methods: Sequence[AblationMethod], fractions: Sequence[float], seeds: Sequence[int]) -> None:
    """Raises ConfigError if a fraction is outside 0 to 1, a name stands for two methods, or one of them is empty."""
    for name, values in (("methods", methods), ("fractions", fractions), ("seeds", seeds)):
        if not values:
            raise ConfigError(f"{name} is empty, expected at least one")
    for fraction in fractions:
        if not (isfinite(fraction) and 0 <= fraction <= 1):
            raise ConfigError(f"fractions holds {fraction}, expected a share of the neurons from 0 to 1")
    names = [method.name for method in methods]
    if repeated := {name for name in names if names.count(name) > 1 or name == BASELINE.method}:
        raise ConfigError(f"methods holds {sorted(repeated)} more than once, or by a name that is taken")


def distinct_conditions(
    methods: Sequence[AblationMethod], selections: Sequence[Selection], seeds: Sequence[int]
) -> list[Condition]:
    """Every condition once, the baseline first.

    Where a selection doesn't depend on the seed, only a method that draws something else from it has one condition per
    seed.

    Example:
        >>> from lightning_ablate.masks import RandomNeurons
        >>> from lightning_ablate.methods import Zero
        >>> selections = RandomNeurons().selections([], [0, 0.5, 1], seeds=[1, 2])
        >>> [str(condition) for condition in distinct_conditions([Zero()], selections, seeds=[1, 2])]
        ['baseline', 'zero 50% seed 1', 'zero 50% seed 2', 'zero 100%']
    """
    found = {BASELINE: None}
    for method in methods:
        draws = method.seeded or method.unrelated is not None
        for chosen in selections:
            for seed in seeds if chosen.seed is None and draws else [chosen.seed]:
                found[Condition(method.name, chosen.fraction, seed, chosen.part, chosen.head)] = None
    return list(found)


class Sweep:
    """Applies every condition to a calibrated target, and keeps the scores.

    Args:
        calibration: the target, its sites and their statistics.
        methods: what replaces a neuron.
        conditions: of these methods, the baseline first (see :func:`distinct_conditions`).
        choice: which neurons go.
        examples: how many examples are evaluated, to keep what each of them scores; 0 where that isn't known.
        fold: folds affine replacements into temporary weights of the projections, where these are plain ones.

    Attributes:
        batch: what methods can know of the batch at hand.
    """

    def __init__(
        self,
        calibration: Calibration,
        methods: Sequence[AblationMethod],
        conditions: Sequence[Condition],
        choice: NeuronChoice | None = None,
        examples: int = 0,
        fold: bool = False,
    ) -> None:
        self.conditions = tuple(conditions)
        self.metrics = SweepMetrics(len(self.conditions), examples).to(calibration.device)
        self.classes, self.batch = 0, Batch()
        self.announce: Callable[[Condition], None] = lambda condition: None
        self.passed: Callable[[], None] = lambda: None
        self._calibration = calibration
        self._methods = {method.name: method for method in methods}
        self._choice, self._fold = choice or RandomNeurons(), fold
        self._prepared: dict[Condition, Prepared] = {}
        self._constants: dict[tuple[str, Site], Replacement] = {}
        self._stay = False
        self._act: Callable[[Site, Tensor], Tensor | None] = lambda site, activations: None

    @property
    def unrelated(self) -> list[tuple[str, int]]:
        """The (kind, seed) of every unrelated input that the conditions resample from."""
        pairs = [(self._methods[c.method].unrelated, c.seed) for c in self.conditions if c != BASELINE]
        return list(dict.fromkeys((kind, seed) for kind, seed in pairs if kind is not None and seed is not None))

    @property
    def donors(self) -> list[int]:
        """The seeds for which the conditions resample from other examples."""
        seeds = [c.seed for c in self.conditions if c != BASELINE and self._methods[c.method].donors]
        return list(dict.fromkeys(seed for seed in seeds if seed is not None))

    def prepare(self) -> None:
        """Computes what the conditions put in the place of the ablated neurons.

        It is kept while it takes less memory than the target, or 1 GiB; the rest is computed anew for every batch.

        Raises:
            StatisticsError: if a method's statistics are missing.
        """
        room = max(_ROOM, sum(parameter.nbytes for parameter in self._calibration.target.parameters()))
        for condition in self.conditions[1:]:
            made = self._prepare(condition)
            room -= made.nbytes
            if room >= 0:
                self._prepared[condition] = made

    @contextmanager
    def reading(self, kind: str, seed: int) -> Iterator[None]:
        """Keeps the activations of the unrelated input that is run inside, ``(1, seq, neurons)`` a site."""
        activations = self.batch.unrelated[kind, seed] = {}

        def read(site: Site, values: Tensor) -> None:
            activations[site] = values.clone()  # what is compiled may use its memory again

        with self._hooked(self._calibration.sites, read):
            yield

    @contextmanager
    def reading_donors(self, seed: int, valid: Callable[[Site], Tensor | None]) -> Iterator[None]:
        """Keeps the activations of the other examples that are run inside, one in the place of each of the batch's.

        Args:
            seed: that drew them.
            valid: of a site, which of their positions aren't padding, broadcastable to ``(batch, seq)``; or None.
        """
        donors = self.batch.donors[seed] = {}
        examples = len(self.batch.examples)

        def read(site: Site, values: Tensor) -> None:
            rows, real = by_example(values, valid(site))
            donors[site] = rows.reshape(examples, -1, site.width).clone(), real.reshape(examples, -1)

        with self._hooked(self._calibration.sites, read):
            yield

    @contextmanager
    def applied(self, condition: Condition) -> Iterator[None]:
        """Ablates the target for the one forward pass inside.

        Raises:
            SiteError: if a site did not run, or ran more than once.
        """
        self.announce(condition)
        prepared = self._prepared.get(condition) or self._prepare(condition)
        hooks = prepared.hooks
        ablated = self._hooked(tuple(hooks), lambda site, activations: ablate(activations, *hooks[site]))
        with record_function(str(condition)), ablated, swapped(self._calibration.target, prepared.folded):
            yield

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """Compiles the target (torch.compile) for the passes inside; no condition compiles it anew.

        For that the hooks stay from one condition to the next, and ask what to do by an operator that the compiler
        doesn't look into.

        Raises:
            ConfigError: if a module runs several times in a pass.
        """
        target, sites = self._calibration.target, self._calibration.sites
        if shared := [site.name for site in sites if site.uses > 1]:
            raise ConfigError(f"{shared[0]} runs several times in one pass, which can't be compiled; leave compile out")
        with ExitStack() as stack:
            for site in sites:
                key = next(_KEYS)
                _ACTIONS[key] = lambda activations, site=site: self._act(site, activations)  # type: ignore[misc]
                stack.callback(_ACTIONS.pop, key)
                hook = target.get_submodule(site.path).register_forward_pre_hook(_asking(key))
                stack.callback(hook.remove)
            target.compile()
            stack.callback(setattr, target, "_compiled_call_impl", None)
            self._stay = True
            stack.callback(setattr, self, "_stay", False)
            yield

    @contextmanager
    def _hooked(self, sites: Sequence[Site], action: Callable[[Site, Tensor], Tensor | None]) -> Iterator[None]:
        """Does something at these sites, in the one forward pass inside."""
        runs = dict.fromkeys(sites, 0)

        def act(site: Site, activations: Tensor) -> Tensor | None:
            if site not in runs:
                return None
            runs[site] += 1
            return action(site, activations)

        if self._stay:
            self._act = act
            yield
        else:
            with hooked(self._calibration.target, sites, act):
                yield
        check_runs(runs)

    def score(self, index: int, scored: Scored, clean: Clean) -> None:
        """Adds what the condition of that index scored on a batch."""
        self.classes = scored.logits.shape[1]
        with record_function("scoring"):
            self.metrics.update(index, scored, clean)
        self.passed()

    def figures(self) -> dict[str, Tensor]:
        """Merges the ranks, once and for all; and gives what each condition scored (see :class:`SweepMetrics`)."""
        self.metrics.sync()
        return {name: values.cpu() for name, values in self.metrics.figures.items()}

    def by_example(self) -> tuple[Tensor, dict[str, Tensor]] | None:
        """What each example scored, once the ranks are merged; None where the examples can't be told apart.

        Returns:
            The scored positions of each example, ``(examples,)`` int64, and the sums over these by metric,
            ``(conditions, examples)`` float64.
        """
        metrics = self.metrics
        if not metrics.examples or int(metrics.elsewhere):
            return None
        sums = {"top1": metrics.top1_by_example.cpu(), "cross_entropy": metrics.cross_entropy_by_example.cpu()}
        return metrics.n_by_example.cpu(), sums

    def state_dict(self) -> dict[str, Any]:
        """The scores so far."""
        return {"classes": self.classes, "metrics": self.metrics.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a :meth:`state_dict`."""
        self.classes = state["classes"]
        self.metrics.load_state_dict(dict(state["metrics"]))

    def check_finite(self) -> None:
        """Raises NonFiniteError if a condition's logits gave a score that is NaN or infinite."""
        finite = (self.metrics.cross_entropy + self.metrics.kl).isfinite()
        if not bool(finite.all()):
            bad = [str(c) for c, good in zip(self.conditions, finite.tolist(), strict=True) if not good]
            raise NonFiniteError(
                f"the logits under {bad[0]!r} are NaN or infinite ({len(bad)} of {len(self.conditions)} conditions); "
                "try another precision (--trainer.precision, --model.dtype)"
            )

    def _prepare(self, condition: Condition) -> "Prepared":
        hooks, folded = {}, {}
        for site in self._calibration.sites if condition != BASELINE else ():
            made = self._replacement(condition, site)
            if made is None:
                continue
            weights = weights_of(self._calibration.target, site) if self._fold else None
            if weights is None or not isinstance(made[1], Affine):
                hooks[site] = made
            else:
                weight, bias, transposed = weights
                weight, bias = made[1].fold(weight.T if transposed else weight, bias, made[0])
                folded[site.path] = (weight.T if transposed else weight), bias
        return Prepared(hooks, folded)

    def _replacement(self, condition: Condition, site: Site) -> tuple[Tensor, Replacement] | None:
        """The mask and what takes the masked neurons' place; None where a condition leaves the site alone."""
        method, device, statistics = self._methods[condition.method], self._calibration.device, self._calibration[site]
        chosen = Selection(condition.fraction, condition.seed, condition.part, condition.head)
        mask = self._choice.mask(chosen, site, statistics)
        if not bool(mask.any()):
            return None
        mask = mask.to(device)
        try:
            if not isinstance(method, ConstantMethod):
                return mask, method.prepare(Ablation(site, mask, statistics, condition.seed, self.batch))
            if (method.name, site) not in self._constants:
                self._constants[method.name, site] = constant(method.values(site, statistics).to(device))
            return mask, self._constants[method.name, site]
        except StatisticsError as error:
            raise StatisticsError(f"the method {method.name!r} {error}") from error


_KEYS = count()
_ACTIONS: dict[int, Callable[[Tensor], Tensor | None]] = {}


@torch.library.custom_op("lightning_ablate::ask", mutates_args=())
def _ask(activations: Tensor, key: int) -> Tensor:
    """What the action of that key makes of the activations, in memory of its own."""
    changed = _ACTIONS[key](activations)
    return activations.clone() if changed is None else changed


@_ask.register_fake
def _(activations: Tensor, key: int) -> Tensor:
    return torch.empty_like(activations)


def _asking(key: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def pre_hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (_ask(inputs[0], key), *inputs[1:])

    return pre_hook
