"""Calibration: gathers the statistics of every site, epoch by epoch."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_ablate.errors import NonFiniteError, StatisticsError, few
from lightning_ablate.metrics import checked
from lightning_ablate.modules import AblationModule
from lightning_ablate.modules.phase import Phase
from lightning_ablate.phases.positions import BatchPositions
from lightning_ablate.run import Run
from lightning_ablate.sites import (
    KINDS,
    Basis,
    MixingError,
    Site,
    check_mixing,
    exact_device,
    find_sites,
    hooked,
    keep,
    other_mixing,
)
from lightning_ablate.statistics import ActivationStatistic, Moments


class CalibrationPhase(Phase):
    """Reads every site in every forward pass; after each epoch its statistics enter the run's calibration."""

    title = "Calibration"

    def __init__(
        self,
        module: AblationModule,
        run: Run,
        kinds: Sequence[type[ActivationStatistic]],
        strict: bool = False,
    ) -> None:
        super().__init__(module)
        self._places = BatchPositions.of(module, run.calibration.at)
        self.strict = strict
        self.kinds, self.calibration, self.seconds, self._run = kinds, run.calibration, 0.0, run
        self.epochs = 1 + max(kind.epoch() for kind in kinds)
        self._gathered: dict[Site, list[ActivationStatistic]] = {}

    def begin_epoch(self, epoch: int) -> None:
        """Makes the statistics of this epoch, from 0."""
        calibration, device = self.calibration, exact_device(self.module.device)
        kinds = [kind for kind in self.kinds if kind.epoch() == epoch]
        self._gathered = {s: [kind.of(s, calibration[s]).to(device) for kind in kinds] for s in calibration.sites}

    def step(self, batch: Any, batch_idx: int) -> None:
        """Adds the activations on one batch; finds the sites on the first one, or raises SiteError."""
        with torch.no_grad():
            if not self.calibration.sites:
                self._find_sites(batch)
            examples = self.module.examples_of(batch, batch_idx)
            if self._places is not None:
                self._places.begin(batch)
            routed: dict[Site, Tensor] = {}
            hooks = {site: partial(self._add, site, batch, examples, routed) for site in self._gathered}
            began = time.perf_counter()
            with hooked(self.module.target, hooks, once=True, routed=routed):
                scored = self.module.evaluate(batch)
            self.seconds = time.perf_counter() - began
        if batch_idx == 0:
            checked(scored, self.module.metrics)
        self._check_finite()

    def end_epoch(self) -> None:
        """Merges the processes; StatisticsError if nothing was gathered, or the epochs don't agree.

        Experts that no position was routed to are left out of the run.
        """
        idle = list[Site]()
        for site, statistics in self._gathered.items():
            for statistic in statistics:
                statistic.sync()
                if site.expert is not None and isinstance(statistic, Moments) and not int(statistic.count):
                    idle.append(site)
                    break
                try:
                    statistic.check()
                except StatisticsError as error:
                    raise StatisticsError(f"site {site.name}: {error}") from error
                self.calibration.add(site, statistic)
                self._run.note(statistic.note(site))
        self._gathered = {}
        if idle:
            self.calibration.leave_out(idle)
            named = few(one.name for one in idle)
            self._run.note(f"no calibration position is routed to these, which are left out and run intact: {named}")

    def _add(
        self, site: Site, batch: Any, examples: Tensor, routed: Mapping[Site, Tensor], activations: Tensor
    ) -> None:
        valid, exact = self.module.valid_at(site, batch), exact_device(self.module.device)
        if self._places is not None:
            valid = self._places(site, activations.shape).flatten(1)
        if site in routed:
            valid = routed[site] if valid is None else valid.to(routed[site].device) & routed[site]
        activations, valid = activations.to(exact), None if valid is None else valid.to(exact)
        for statistic in self._gathered[site]:
            more = {"examples": examples.to(exact)} if statistic.takes_examples else {}
            statistic.update(activations, valid, **more)

    def _find_sites(self, batch: Any) -> None:
        module, which = self.module, self.calibration.which
        self.calibration.locate(find_sites(module.target, lambda: module.evaluate(batch), which), module.target)
        self._check_axes(batch)
        units = {site.name: site.basis.unit for site in self.calibration.sites if site.basis is not None}
        for unit in sorted({*units.values()} - {Basis.unit}):
            named = few(name for name, own in units.items() if own == unit)
            self._run.note(f"what is called a neuron is a {unit} at {named}", warn=False)
        probes = module.probes(batch)
        if probes is not None and any("attention" in word for word in which if word in KINDS):
            attention = find_sites(module.target, lambda: module.evaluate(batch))  # all of it, whatever was chosen
            self._check_mixing(attention, lambda number: module.hidden(probes[number]))
        self.begin_epoch(0)  # again, now that there are sites

    def _check_mixing(self, attention: Sequence[Site], hidden: Callable[[int], Sequence[Tensor]]) -> None:
        """Notes how many layers mix positions beside attention; SiteError for any, if that is asked."""
        try:
            check_mixing(self.module.target, attention, hidden)
        except MixingError:
            if self.strict:
                raise
            others = other_mixing(self.module.target, attention, hidden)
            self._run.note(
                f"other mixing: {others}; positions are also mixed by convolution, pooling, a state space or linear "
                "attention there, which an ablation of attention passes by"
            )

    def _check_axes(self, batch: Any) -> None:
        """Refuses sites whose first axis isn't that of the examples: one alone must give its rows of a pass of two."""
        module, passes = self.module, []
        for count in (2, 1):
            if (some := module.first(batch, count)) is None:
                return
            found: dict[Site, Tensor] = {}
            with hooked(module.target, {s: partial(keep, found, s) for s in self.calibration.sites}, once=True):
                module.evaluate(some)
            passes.append(found)
        for site in self.calibration.sites:
            exact = (found[site].to(exact_device(found[site].device)).double() for found in passes)
            two, one = (found.nan_to_num().reshape(-1, site.width) for found in exact)
            noise = torch.finfo(passes[0][site].dtype).eps ** 0.5 * one.norm()
            limit = 0.5 * (one - one.mean(0)).norm() + noise  # dynamic quantisation depends on the batch
            if len(two) != 2 * len(one) or bool((two[: len(one)] - one).norm() > limit):
                raise StatisticsError(
                    f"site {site.name} gets {tuple(passes[0][site].shape)} for 2 examples and "
                    f"{tuple(passes[1][site].shape)} for 1, expected the examples along the first axis (batch first), "
                    "each as it is alone; leave the site out (--ablation.sites)"
                )

    def _check_finite(self) -> None:
        moments = [(site, one) for site, found in self._gathered.items() for one in found if isinstance(one, Moments)]
        finite = torch.stack([one.finite() for _, one in moments]).tolist() if moments else []
        if bad := [site.name for (site, _), good in zip(moments, finite, strict=True) if not good]:
            raise NonFiniteError(
                f"activations at {bad[0]} are NaN or infinite ({len(bad)} of {len(moments)} sites); "
                "try another precision (--trainer.precision, --model.dtype), or look for it in the data or weights"
            )
