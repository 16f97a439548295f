"""The order of the epochs of a run, and what it all amounts to."""

from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from math import ceil
from typing import Any

from lightning_ablate.attribution import Attribution, levels_of
from lightning_ablate.errors import ConfigError
from lightning_ablate.modules.phase import Amount
from lightning_ablate.phases.attribution import AttributionPhase, VerificationPhase, measured_heads
from lightning_ablate.phases.calibration import CalibrationPhase
from lightning_ablate.phases.method import Epoch, phase_of
from lightning_ablate.phases.units import parsed
from lightning_ablate.positions import ALL
from lightning_ablate.sites import Site, left_of
from lightning_ablate.statistics import ActivationStatistic, Moments, with_needs
from lightning_ablate.sweep import Sweep


def kinds_of(sweep: Sweep, attribution: Attribution) -> list[type[ActivationStatistic]]:
    """What calibration gathers; always Moments, which describe the neurons and tell whether activations are finite."""
    kinds = [kind for method in (*sweep.methods, *attribution.each) for kind in method.statistics]
    return with_needs([Moments, *sweep.neurons.statistics, *kinds])


def schedule(sweep: Sweep, attribution: Attribution, amount: Amount) -> list[Epoch]:
    """The epochs of ``fit``: those that gather statistics, attribute, and prepare methods.

    Attribution comes before the phases of methods, which may use its ranking; if a method that they prepare is
    attributed, it comes after them.
    """
    prepared = {method: phase for method in sweep.methods if (phase := phase_of(method)) is not None}
    if prepared and sweep.positions != ALL:
        raise ConfigError(
            f"{next(iter(prepared)).name} learns what takes the place of neurons at all positions, expected "
            "--ablation.positions all, or other methods"
        )
    kinds = kinds_of(sweep, attribution)
    calibrate = partial(CalibrationPhase, kinds=kinds, strict=sweep.strict)
    calibrating = [Epoch(number, calibrate, 1.0) for number in range(1 + max(kind.epoch() for kind in kinds))]
    preparing = [epoch for method, phase in prepared.items() for epoch in phase.scheduled(method, sweep, amount)]
    attributing = _attributing(attribution, sweep, amount) if attribution.methods else []
    waits = {method.name for method in prepared} & {method.name for method in attribution.each}
    return calibrating + (preparing + attributing if waits else attributing + preparing)


def check_attribution(options: Attribution, sweep: Sweep, metrics: Sequence[str] = ()) -> None:
    """Raises ConfigError for methods that can't be attributed, and for a choice whose attribution isn't made.

    ``metrics`` are those of the module's own.
    """
    if options.metric not in (None, *metrics):
        raise ConfigError(
            f"the module has no metric {options.metric!r} (--ablation.attribution.metric), it has "
            f"{', '.join(metrics) or 'none of its own'}"
        )
    names = [method.name for method in options.each]
    prepared = {method.name for method in sweep.methods if phase_of(method) is not None}
    for method in options.each:
        if not method.attributable or (phase_of(method) is not None and method.name not in prepared):
            raise ConfigError(
                f"{method.name} can't be attributed: expected a method whose values don't depend on what else is "
                "ablated, and one that learns in --ablation.methods as well (--ablation.attribution.methods)"
            )
    if (under := sweep.neurons.attribution) is None:
        return
    if options.metric is not None:
        raise ConfigError(
            "neurons are ranked by divergence, which the attribution of a metric doesn't estimate; leave out "
            "--ablation.attribution.metric"
        )
    if set(names) & prepared:
        raise ConfigError("neurons are ranked by an attribution, which waits for what is learned of such neurons")
    if (under or next(iter(names), None)) not in names:
        raise ConfigError(
            f"neurons are ranked by the attribution under {under or 'some method'}, expected it in "
            f"--ablation.attribution.methods, which names {', '.join(names) or 'none'}"
        )


def _attributing(options: Attribution, sweep: Sweep, amount: Amount) -> list[Epoch]:
    used = amount.batches if options.examples is None else ceil(options.examples / amount.batch_size)
    share = min(1.0, used / max(1, amount.batches))  # of the batches, the others are passed over
    given: dict[str, Any] = {"options": options, "seed": [*sweep.seeds, 0][0], "examples": amount.examples}
    given["positions"] = sweep.positions
    found = [Epoch(0, partial(AttributionPhase, **given), share * options.passes, per_pass=share)]
    if options.verify:
        found.append(Epoch(0, partial(VerificationPhase, **given), share * (1 + options.sources), per_unit=share))
    return found


def _verified(options: Attribution, sites: Sequence[Site], levels: Sequence[str]) -> int:
    """How many units of these levels are measured, each under its method."""
    units = Counter[tuple[str, str]]()
    for site in sites:
        units += {(site.kind, level): site.width // size for level, size in levels_of(site).items() if level in levels}
    return len(options.each) * sum(min(2 * options.verify, count) for count in units.values())


def _begins_of(sites: Sequence[Site]) -> dict[str, int]:
    """Name of a site, its module or its layer → the place of the first such site."""
    pairs = [(name, place) for place, one in enumerate(sites) for name in (one.name, one.path, one.layer) if name]
    return dict(reversed(pairs))


def plan(
    epochs: Sequence[Epoch],
    sweep: Sweep,
    attribution: Attribution,
    phase: CalibrationPhase,
    batches: tuple[float, float, float],
    explained: int = 0,
) -> str:
    """One line on what a run amounts to; of more than an hour it says which options shorten it.

    Args:
        epochs: those of ``fit``.
        sweep: what is compared.
        attribution: its options.
        phase: calibration, which has found the sites and timed a forward pass.
        batches: of an epoch of ``fit``, of the sweep and of what is explained, of each process.
        explained: how many units evidence ablates, each under each method.
    """
    sites, seconds = phase.calibration.sites, phase.seconds
    conditions = sweep.conditions(sites)
    heads, measuring = measured_heads(attribution, sites, phase.module.target)
    units = _verified(attribution, sites, ["neuron"] if heads else ["neuron", "head"])
    sources = {method.name: method.source for method in sweep.methods}
    resampled = {(sources[c.method], c.seed) for c in conditions[1:] if sources[c.method] is not None}
    counts = Counter(condition.method for condition in conditions)
    calibrating = sum(one.cost + one.per_condition * counts[one.method] for one in epochs)
    calibrating += sum(one.per_unit * units + one.per_pass * measuring for one in epochs)
    left, begins = left_of(phase.module.target, sites), _begins_of(sites)
    sweeping = sum(left[begins.get(parsed(condition.part)[0], 0)] for condition in conditions)
    passes = batches[0] * calibrating + batches[1] * (sweeping + len(resampled))
    passes += batches[2] * (1 + explained) if explained else 0.0
    about = f"plan: {len(conditions):,} conditions"
    notes = "".join(dict.fromkeys(epoch.note for epoch in epochs))
    if sweeping < len(conditions):
        notes += f"; a condition takes {sweeping / len(conditions):.0%} of a pass, as layers before it aren't run again"
    if passes == float("inf"):
        return f"{about}, {seconds:.2g} s a forward pass; the data tell no length{notes}"
    lasts = timedelta(seconds=round(passes * seconds))
    if lasts > timedelta(hours=1):
        many = [name for name in ("fraction", "seed") if len({getattr(one, name) for one in conditions[1:]}) > 1]
        unit = getattr(getattr(phase.module.trainer, "datamodule", None), "unit", None)
        lower = [f"ablation.{name}s" for name in many] + [f"data.evaluation_{unit}"] * (unit is not None)
        lower += ["ablation.attribution.examples"] * bool(attribution.methods)
        notes += f"; for a shorter run give fewer {', '.join(f'--{name}' for name in lower)}" if lower else ""
    return f"{about}, {passes:,.0f} forward passes, about {lasts} (h:mm:ss){notes}"
