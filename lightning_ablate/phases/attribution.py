"""Attribution: estimates what every unit is worth, and measures some of them."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from lightning_ablate.agreement import picked
from lightning_ablate.attribution import (
    SUMS,
    Attribution,
    Measured,
    cotangents,
    levels_of,
    orders,
    per_position,
    table_of,
)
from lightning_ablate.conditions import BASELINE, Condition
from lightning_ablate.errors import ConfigError, DataError, NonFiniteError, few
from lightning_ablate.methods import Ablation, AblationMethod, Batch, Replacement
from lightning_ablate.modules import AblationModule
from lightning_ablate.modules.phase import Phase
from lightning_ablate.phases.positions import BatchPositions
from lightning_ablate.phases.sweep import SweepPhase, read_source
from lightning_ablate.phases.units import Units
from lightning_ablate.positions import ALL, Positions
from lightning_ablate.run import Run
from lightning_ablate.sites import Site, exact_device, hooked, left_of
from lightning_ablate.statistics.base import by_example
from lightning_ablate.sweep import Sweep


class _Kept(NamedTuple):
    activations: Tensor  # of a site, without a graph
    moved: Tensor  # by whose gradient the effect of moving them is known


class AttributionPhase(Phase):
    """Estimates the effect of every neuron, head and site alone, from one forward and ``1 + draws`` backward passes.

    The effect on an example is ``Σ g·δ + ½ mean (Σ g̃·δ)²``, with sums over its positions and the unit's neurons and the
    mean over draws. δ is what ablating the unit adds to the activations, g the gradient of the cross-entropy, g̃ that of
    a random one of :func:`~lightning_ablate.attribution.cotangents`. Large positions are damped, see
    :func:`~lightning_ablate.attribution.orders`. Heads may be measured on the same batches, see :func:`measured_heads`.
    """

    title = "Attribution"

    def __init__(
        self,
        module: AblationModule,
        run: Run,
        options: Attribution,
        seed: int,
        examples: int = 0,
        positions: Positions = ALL,
    ) -> None:
        super().__init__(module)
        self.options, self.seed, self.sites, methods = options, seed, run.calibration.sites, options.each
        self._run, self._batch, self._places = run, Batch(), BatchPositions.of(module, positions)
        self.n = torch.zeros(2, dtype=torch.float64, device=exact_device(module.device))
        self.sums = {
            method.name: {site: self._nothing(site) for site in self.sites} for method in methods
        }  # (SUMS, units) float64: the neurons, heads and the site, one behind the other
        self._alone = {method.name: {site: self._prepared(method, site) for site in self.sites} for method in methods}
        heads = measured_heads(options, self.sites, module.target)[0]
        rows = pd.DataFrame(heads, columns=["site", "level", "unit"]).assign(picked="all")
        rows = pd.concat([rows.assign(method=method.name) for method in methods])
        self._heads = UnitsPhase(module, run, options, seed, examples, positions, rows) if heads else None

    def step(self, batch: Any, batch_idx: int) -> None:
        """Adds the estimates of the examples of one batch, and measures heads on them."""
        module, found = self.module, dict[Site, _Kept]()
        examples = module.examples_of(batch, batch_idx)
        used = self.options.used(examples)
        if _passed_over(module, self.options, used):
            return
        self._batch.examples, seed = examples, self.seed
        if self._places is not None:
            self._places.begin(batch)
        with torch.no_grad():
            for kind in dict.fromkeys(method.source for method in self.options.each if method.source is not None):
                self._batch.sources[kind, seed] = read_source(module, self.sites, kind, seed, batch)
        with torch.enable_grad(), hooked(module.target, {s: partial(_kept, found, s) for s in self.sites}, once=True):
            scored = module.evaluate(batch)
        metric = self.options.metric
        if not (scored.logits if metric is None else scored.extra[metric]).requires_grad:
            raise ConfigError(
                f"attribution needs gradients of the {metric or 'logits'} that `evaluate` gives; is it a step "
                "function, or made under no_grad?"
            )
        match = scored.example.unsqueeze(1) == examples
        if not bool((match.any(1) | (scored.example < 0)).all()):
            held = few(map(str, examples.tolist()))
            raise DataError(
                f"`evaluate` scored example {int(scored.example.max())}, the batch holds {held}: "
                "give batches their examples' places in the data as `index`, or override `examples_of`"
            )
        match &= used
        rows = torch.where(match.any(1), match.int().argmax(1), -1)
        with torch.no_grad():
            self._add(scored, rows, len(examples), found)
        del scored, found
        if self._heads is not None:
            self._heads.step(batch, batch_idx)

    def end_epoch(self) -> None:
        """Merges the processes and gives the estimates to the calibration; NonFiniteError if they aren't finite."""
        self.n = self.module.summed(self.n)
        if not self.n[0]:
            raise DataError("the examples that are attributed have no scored position; is everything padding?")
        for method, by_site in self.sums.items():
            for site, sums in by_site.items():
                by_site[site] = self.module.summed(sums)
                attributed = per_position(by_site[site], self.n)
                if not bool(attributed[:3].isfinite().all()):
                    raise NonFiniteError(
                        f"attributions of {method} at {site.name} aren't finite; try another precision "
                        "(--trainer.precision, --model.dtype)"
                    )
                self._run.calibration.attributed.setdefault(method, {})[site] = attributed
        if self._heads is not None:
            self._heads.end_epoch()

    def _add(self, scored: Any, rows: Tensor, examples: int, found: dict[Site, "_Kept"]) -> None:
        n = torch.bincount(rows[rows >= 0].to(self.n.device), minlength=examples).double()
        self.n += torch.stack([n.sum(), n.square().sum()])
        inputs = [found[site].moved for site in self.sites]
        draws, metric = self.options.draws, self.options.metric
        idle = any(site.expert is not None for site in self.sites)  # nothing may be routed to one
        if metric is not None:
            values = scored.extra[metric]
            lost = torch.autograd.grad(values, inputs, -(rows >= 0).to(values.dtype), materialize_grads=idle)
            gradients = [lost, [torch.zeros_like(one) for one in lost]]
        else:
            gradients = [
                torch.autograd.grad(
                    scored.logits, inputs, cotangent, retain_graph=number < draws, materialize_grads=idle
                )
                for number, cotangent in enumerate(cotangents(scored, rows, draws))
            ]
        one = torch.ones(examples, 1, dtype=torch.bool, device=n.device)
        for place, site in enumerate(self.sites):
            own = torch.stack([by_example(gradient[place].float(), one)[0] for gradient in gradients])
            given = found[site].activations
            for name, by_site in self.sums.items():
                alone, products, made = self._alone[name][site], dict[int, Tensor](), []
                for size, replace in alone.items():
                    if id(replace) not in products:  # levels mostly share what takes the neurons' place
                        delta = replace(given).to(given.dtype) - given
                        if self._places is not None:
                            delta = delta * self._places(site, given.shape).to(delta.device)
                        products[id(replace)] = own * by_example(delta.float(), one)[0]
                    made.append(orders(products[id(replace)].view(*own.shape[:3], -1, size).sum(4)))
                first, second, whole = (torch.cat(order, 1) for order in zip(*made, strict=True))
                each = [first, second, whole, whole.square(), whole * n.unsqueeze(1)]
                by_site[site] += torch.stack([order.sum(0) for order in each])

    def _prepared(self, method: AblationMethod, site: Site) -> dict[int, Replacement]:
        mask = torch.ones(site.width, dtype=torch.bool, device=self.module.device)
        ablation = Ablation(site, mask, self._run.calibration[site], self.seed, self._batch)
        return method.alone(ablation, list(levels_of(site).values()))

    def _nothing(self, site: Site) -> Tensor:
        units = sum(site.width // size for size in levels_of(site).values())
        return torch.zeros(len(SUMS), units, dtype=torch.float64, device=exact_device(self.module.device))


class UnitsPhase(SweepPhase):
    """Measures single units on the examples that are attributed: it ablates each alone.

    ``rows`` has their method, site, level, unit, and how they were picked; by default those of ``verify``. The run's
    table gets the measured effects.
    """

    def __init__(
        self,
        module: AblationModule,
        run: Run,
        options: Attribution,
        seed: int,
        examples: int,
        positions: Positions = ALL,
        rows: pd.DataFrame | None = None,
    ) -> None:
        rows = picked(table_of(run.calibration.attributed, run.measured), options.verify) if rows is None else rows
        self.rows, self.options = rows, options
        seeds = {method.name: seed if method.seeded else None for method in options.each}
        names = [f"{unit.site} {unit.level} {unit.unit}" for unit in rows.itertuples()]
        pairs = zip(rows["method"], names, strict=True)
        alone = [Condition(1.0, seeds[method], name, method=method) for method, name in pairs]
        sweep = Sweep(options.each, (1.0,), (seed,), Units(list(dict.fromkeys(names))), positions=positions)
        super().__init__(module, run, sweep, [options.examples or examples], [BASELINE, *alone])

    def end_epoch(self) -> None:
        """Merges the processes; the run's table gets the measured effects."""
        super().end_epoch()
        place = self.metrics.names.index(self.options.metric or "cross_entropy")
        sums = self.metrics.sums[:, place, : self.options.examples] * (-1 if self.options.metric else 1)
        n, (base, *others) = self.metrics.n[: self.options.examples].double(), sums
        keys = self.rows[["method", "site", "level", "unit", "picked"]].itertuples(index=False, name=None)
        for key, own in zip(keys, others, strict=True):
            effect = (own - base).sum() / n.sum()
            spread = (own - base - effect * n).square().sum().sqrt() / n.sum()
            error = spread.item() if int((n > 0).sum()) > 1 else float("nan")
            self.run.measured.append(Measured.of([*key, effect, error]))

    def _check_examples(self, example: Tensor) -> None:
        """Calibration data may number their examples as they like."""


class VerificationPhase(UnitsPhase):
    """Measures the units with the largest estimates, and as many random ones; see ``verify``."""

    title = "Verification"

    def step(self, batch: Any, batch_idx: int) -> None:
        """Evaluates every condition on one batch, if it has examples that were attributed."""
        examples = self.module.examples_of(batch, batch_idx)
        if not _passed_over(self.module, self.options, self.options.used(examples)):
            super().step(batch, batch_idx)


def measured_heads(
    options: Attribution, sites: Sequence[Site], target: nn.Module
) -> tuple[list[tuple[str, str, int]], float]:
    """The site, level and number of each head that is measured, and how many forward passes of a batch they take."""
    heads = [(site.name, "head", head) for site in sites for head in range(site.heads or 0)]
    alone = sum((site.heads or 0) * left for site, left in zip(sites, left_of(target, sites), strict=True))
    passes = 1 + options.sources + len(options.each) * alone  # beside the intact pass and what methods read
    measured = passes <= options.passes if options.heads is None else options.heads
    return (heads, passes) if heads and measured else ([], 0.0)


def _passed_over(module: AblationModule, options: Attribution, used: Tensor) -> bool:
    """Whether no process uses any example of its batch; asked of all, as the passes of a sharded target need all."""
    return options.examples is not None and not bool(module.summed(used.any().float()))


def _kept(found: dict[Site, _Kept], site: Site, activations: Tensor) -> Tensor:
    if site.basis is not None:  # what is written back is a difference, in which the activations themselves cancel
        moved = torch.zeros_like(activations, requires_grad=True)
        found[site] = _Kept(activations.detach(), moved)
        return activations + moved
    moved = activations if activations.requires_grad else activations.detach().requires_grad_()
    found[site] = _Kept(moved.detach(), moved)
    return moved if site.side == "input" else moved.clone()  # a target may write into what a module returned
