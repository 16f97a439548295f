"""Fitting: regressions where they act, site after site, with everything before a site already ablated."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from queue import SimpleQueue
from threading import Thread, current_thread
from typing import Any, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lightning_ablate.choices import Choice
from lightning_ablate.conditions import Condition
from lightning_ablate.errors import ConfigError, SiteError
from lightning_ablate.methods import Ablation, ConditionalSequential, Edit
from lightning_ablate.phases.phase import Module, Phase
from lightning_ablate.phases.resume import Run
from lightning_ablate.phases.sweep import digest_of, masks_of
from lightning_ablate.sites import Site, hooked
from lightning_ablate.statistics import Covariance, Moments, SiteStatistics

_BATCHES = 256  # each has a thread of its own, and that one its pool


class FittingPhase(Phase):
    """Fits :class:`~lightning_ablate.methods.ConditionalSequential` for every condition of a sweep.

    It takes a forward pass of the calibration data for each condition, or a second one of the intact target beside it,
    behind the last batch. All batches go through the target side by side: each pass waits at a site until every other
    one is there, so that the regression knows all of them; what has to be kept is what a forward pass hands on there.
    """

    def __init__(
        self,
        module: Module,
        run: Run,
        method: ConditionalSequential,
        choice: Choice,
        conditions: Callable[[], Sequence[Condition]],
    ) -> None:
        super().__init__(module)
        if module.device_mesh is not None:
            raise ConfigError(f"{method.name} can't be fitted on a sharded target; leave it out (--ablation.methods)")
        self.title, self.method, self._run, self._choice = f"Fitting {method.name}", method, run, choice
        self._conditions = [condition for condition in conditions() if condition.method == method.name]
        self._batches: list[tuple[Any, Tensor]] = []

    def step(self, batch: Any, batch_idx: int) -> None:
        """Keeps the batch, and fits with all of them once it is the last; ConfigError if they are too many."""
        if batch_idx == _BATCHES:
            raise ConfigError(
                f"{self.method.name} takes a thread for each batch of the calibration data, expected at most "
                f"{_BATCHES}; raise --data.batch_size"
            )
        self._batches.append((batch, self.module.examples_of(batch, batch_idx)))
        if self.module.trainer.is_last_batch:
            learned, sites, device = self._run.calibration.learned, self._run.calibration.sites, self.module.device
            bar = type(cast(Any, self.module.trainer).progress_bar_callback)  # beside rich's another one can't write
            silent = self.module.global_rank > 0 or not hasattr(bar, "train_progress_bar")
            with torch.no_grad():
                for condition in tqdm(self._conditions, self.title, leave=False, disable=silent):
                    masks = masks_of(condition, self._choice, self._run.calibration)
                    which = digest_of(masks)
                    known = learned.get(self.method.same(which))
                    if known is None:
                        found = self._fitted(condition, {s: m.to(device) for s, m in masks.items() if bool(m.any())})
                        known = {site: found.get(site, torch.zeros(1, 0, device=device)) for site in sites}
                    learned[self.method.key(which)] = dict(known)
            self._batches.clear()

    def _fitted(self, condition: Condition, masks: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
        """What the method keeps of each site, see :meth:`ConditionalSequential.packed`."""
        beside = 1 if self.method.intact else 0
        passes = [[_Pass(partial(self._evaluate, batch)) for _ in range(1 + beside)] for batch, _ in self._batches]
        edit: Edit | None = None
        found = {}
        try:
            with hooked(self.module.target, {site: partial(_arrive, site) for site in masks}):
                for site, mask in masks.items():
                    mean = self._run.calibration[site][Moments].mean
                    gathered = [kind.of(site).to(self.module.device) for kind in self.method.fitted_from]
                    for (ablated, *intact), (batch, examples) in zip(passes, self._batches, strict=True):
                        mixed = _at(site, ablated, edit)
                        for one in intact:
                            mixed = torch.where(mask, _at(site, one, None), mixed)
                        for statistic in gathered:
                            more = {"examples": examples} if statistic.takes_examples else {}
                            statistic.update(mixed, self.module.valid_at(site, batch), **more)
                    for statistic in gathered:
                        statistic.sync()
                        if isinstance(statistic, Covariance):
                            self._run.check_positions(site, statistic)
                            if self.method.ridge is None:
                                statistic.choose(mask)
                                self._run.ridges.setdefault(str(condition), {})[site.name] = statistic.ridge
                        statistic.reduce()
                    statistics = SiteStatistics(site.name, {type(one): one for one in gathered})
                    with torch.autocast(mask.device.type, enabled=False):
                        affine = self.method.regressed(Ablation(site, mask, statistics, condition.seed), mean)
                        edit, found[site] = Edit(mask, affine), self.method.packed(affine, mask)
        finally:
            for one in (one for both in passes for one in both):
                one.stop()
        return found

    def _evaluate(self, batch: Any) -> None:
        if self.module.device.type == "cuda":  # which, as the contexts, is of one thread alone
            torch.cuda.set_device(self.module.device)
        with torch.no_grad(), self.module.trainer.precision_plugin.forward_context():
            self.module.evaluate(batch)


class _Stopped(Exception):
    """Ends a pass that is needed no longer."""


class _Pass(Thread):
    """A forward pass in a thread of its own, which waits at every site; a single one runs at a time."""

    def __init__(self, forward: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._forward = forward
        self._out: SimpleQueue[Any] = SimpleQueue()
        self._in: SimpleQueue[Any] = SimpleQueue()

    def resume(self, edit: Edit | None) -> tuple[Any, Tensor]:
        """Lets it do an edit and go on to the next site: that site, or what else ended it, and its activations."""
        if self.ident is None:
            self.start()
        else:
            self._in.put(edit)
        found = self._out.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def arrive(self, site: Site, activations: Tensor) -> Tensor | None:
        """Called within the pass: hands the activations over, and waits for what is done to them."""
        self._out.put((site, activations))
        edit = self._in.get()
        if isinstance(edit, _Stopped):
            raise edit
        return None if edit is None else edit(activations)

    def stop(self) -> None:
        """Ends it, wherever it is."""
        if self.is_alive():
            self._in.put(_Stopped())
            self.join()

    def run(self) -> None:
        """The pass."""
        try:
            self._forward()
            self._out.put(("the end", None))
        except BaseException as error:
            self._out.put(error)


def _arrive(site: Site, activations: Tensor) -> Tensor | None:
    return cast(_Pass, current_thread()).arrive(site, activations)


def _at(site: Site, one: _Pass, edit: Edit | None) -> Tensor:
    """The activations with which a pass comes to its next site, which must be this one."""
    here, activations = one.resume(edit)
    if here != site:
        raise SiteError(f"the sites ran in another order than when they were found: {here} in place of {site.name}")
    return activations
