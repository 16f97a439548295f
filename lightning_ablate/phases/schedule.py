"""The order of the epochs of a run, and what it all amounts to."""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import NamedTuple

from lightning_ablate.attribution import Attributing
from lightning_ablate.choices import Choice
from lightning_ablate.conditions import Condition
from lightning_ablate.errors import ConfigError
from lightning_ablate.methods import AblationMethod, ConditionalTuned, LearnedMethod
from lightning_ablate.phases.attribution import AttributionPhase, VerificationPhase
from lightning_ablate.phases.calibration import CalibrationPhase
from lightning_ablate.phases.learning import Course, LearningPhase
from lightning_ablate.phases.phase import Phase
from lightning_ablate.phases.tuning import TuningPhase
from lightning_ablate.statistics import ActivationStatistic

_BACKWARD = 3.0  # what a pass back and forth costs, in forward passes


class Epoch(NamedTuple):
    """An epoch over the calibration data."""

    number: int  # of its phase, from 0
    make: Callable[..., Phase]  # of a module and a run
    cost: float  # of a batch, in forward passes
    each: float = 0.0  # and of every condition of this method
    method: str = ""
    note: str = ""  # what the plan must say of it


def schedule(
    kinds: Sequence[type[ActivationStatistic]],
    methods: Sequence[AblationMethod],
    choice: Choice,
    attributing: Attributing,
    conditions: Callable[[], Sequence[Condition]],
    *,
    batches: float,
    batch_size: int,
    examples: int,
    steps: int | None,
) -> list[Epoch]:
    """The epochs that gather these kinds of statistics, and behind them those that attribute, learn, and fit.

    Attribution comes first, as what is learned may be of neurons that it ranks, unless it is of what is learned.
    ``batches`` are those of an epoch and process, of ``examples`` in all, ``batch_size`` that of all processes
    together; of ``steps`` None takes each method's own; ``conditions`` gives those of the sweep, once the sites are
    known. ConfigError if there is something to learn from data without a length.
    """
    calibrate = partial(CalibrationPhase, kinds=kinds)
    found = [Epoch(number, calibrate, 1.0) for number in range(1 + max(kind.epoch() for kind in kinds))]
    learned = [method for method in methods if isinstance(method, LearnedMethod)]
    waits = bool({method.name for method in learned} & {method.name for method in attributing.methods})
    found += [] if waits else _attributing(attributing, examples)
    for method in methods:
        if not isinstance(method, LearnedMethod):
            continue
        if batches == float("inf"):
            raise ConfigError(
                f"{method.name} learns in steps over the calibration data, which tell no length; give the loader one, "
                "or set --trainer.limit_train_batches"
            )
        sizes = {"examples": method.examples, "batch_size": batch_size, "batches": int(batches)}
        course = Course.of(steps=steps or method.steps, **sizes)
        taken, note = min(course.accumulated * batch_size, examples or sys.maxsize), ""
        if taken != method.examples:
            why = "there are no more" if taken == examples else "a step is made of whole batches of all processes"
            note = f"; {method.name} takes steps of {taken} examples, not {method.examples}: {why}"
        for number in range(course.epochs):
            if isinstance(method, ConditionalTuned):
                tune = partial(TuningPhase, method=method, choice=choice, course=course, conditions=conditions)
                found.append(Epoch(number, tune, 1.0, _BACKWARD, method.name, note))
            else:
                learn = partial(LearningPhase, method=method, choice=choice, course=course)
                found.append(Epoch(number, learn, _BACKWARD, note=note))
    return found + (_attributing(attributing, examples) if waits else [])


def _attributing(options: Attributing, examples: int) -> list[Epoch]:
    """The epochs that attribute, and then verify, with ``examples`` calibration examples; none without methods."""
    found = [Epoch(0, partial(AttributionPhase, options=options), 1.0 + 2.0 * (1 + options.draws))]
    if options.verify:
        cost = 1.0 + 4.0 * options.verify * len(options.methods)
        found.append(Epoch(0, partial(VerificationPhase, options=options, examples=examples), cost))
    return found if options.methods else []


def plan(
    epochs: Sequence[Epoch],
    conditions: Sequence[Condition],
    methods: Sequence[AblationMethod],
    phase: CalibrationPhase,
    batches: tuple[float, float],
) -> str:
    """One line on what a run amounts to, with ``batches`` in an epoch of ``fit`` and in the sweep, of each process."""
    sources = {method.name: method.source for method in methods}
    resampled = {(sources[c.method], c.seed) for c in conditions[1:] if sources[c.method] is not None}
    counts = Counter(condition.method for condition in conditions)
    calibrating = sum(epoch.cost + epoch.each * counts[epoch.method] for epoch in epochs)
    passes = batches[0] * calibrating + batches[1] * (len(conditions) + len(resampled))
    about = f"plan: {len(conditions):,} conditions"
    notes = "".join(dict.fromkeys(epoch.note for epoch in epochs))
    if passes == float("inf"):
        return f"{about}, {phase.seconds:.2g} s a forward pass; the data tell no length{notes}"
    lasts = timedelta(seconds=round(passes * phase.seconds))
    return f"{about}, {passes:,.0f} forward passes, about {lasts} (h:mm:ss){notes}"
