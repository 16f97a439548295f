"""The sweep: evaluates every condition on every batch."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.profiler import record_function

from lightning_ablate.ablation import edits_of
from lightning_ablate.conditions import BASELINE, Condition
from lightning_ablate.errors import DataError, NonFiniteError
from lightning_ablate.methods import Batch, Edit, Replacement, Source
from lightning_ablate.metrics import METRICS, Clean, Scored, SweepMetrics, checked
from lightning_ablate.modules import AblationModule
from lightning_ablate.modules.loaders import evaluation_loaders
from lightning_ablate.modules.phase import Phase
from lightning_ablate.phases.positions import BatchPositions
from lightning_ablate.phases.stopping import Stop
from lightning_ablate.run import Run
from lightning_ablate.sites import Prefix, Site, exact_device, hooked, one_by_one
from lightning_ablate.statistics.base import by_example
from lightning_ablate.sweep import Sweep

_ROOM = 2**30  # bytes


class SweepPhase(Phase):
    """Evaluates every condition of a sweep on a calibrated target, and keeps the scores.

    A batch is loaded once and all conditions see it, so they are compared on the same positions. The baseline runs
    first, then conditions whose first ablated site is latest: a :class:`~lightning_ablate.sites.Prefix` answers the
    layers before it.

    Args:
        module: whose target is evaluated.
        run: has calibrated; StatisticsError if a statistic that a method needs is missing.
        sweep: what is compared.
        examples: each data set's number of evaluated examples, to keep the scores of each; 0 where it isn't known.
        conditions: those that are evaluated, the baseline first; None takes all of the sweep.
        until: nats; the sweep over a data set ends early once its intervals are narrower, see :class:`Stop`.

    Attributes:
        announce: is called with each condition before it is evaluated.
        pause: is called after each condition, and may save the progress.
        ablated: the share of all sites' neurons that each condition ablates.
    """

    title = "Sweep"

    def __init__(
        self,
        module: AblationModule,
        run: Run,
        sweep: Sweep,
        examples: Sequence[int] = (0,),
        conditions: Sequence[Condition] | None = None,
        until: float | None = None,
    ) -> None:
        super().__init__(module)
        calibration, self.run, self.sweep, self.classes = run.calibration, run, sweep, 0
        self.conditions = tuple(conditions or sweep.conditions(calibration.sites))
        self.ablated: dict[Condition, float] = {}
        self.done, self.within = [0] * len(examples), 0  # batches of each data set, and conditions of the next one
        self.each = [
            SweepMetrics(len(self.conditions), n, module.metrics).to(exact_device(module.device)) for n in examples
        ]
        loaders = [] if until is None else evaluation_loaders(module.trainer)
        self.stops = [Stop(module, one, until or 0.0, loader) for one, loader in zip(self.each, loaders, strict=False)]
        self.announce: Callable[[Condition], None] = lambda condition: None
        self.pause: Callable[[], None] = lambda: None
        self._places = BatchPositions.of(module, sweep.positions)
        if self._places is not None:
            run.note(f"neurons are ablated at these positions alone: {sweep.positions}", warn=False)
        self._calibration, self._batch = calibration, Batch(places=self._places)
        drawn = [(sweep.method(c.method).source, c.seed or 0) for c in self.conditions[1:]]
        self._sources = [(kind, seed) for kind, seed in dict.fromkeys(drawn) if kind is not None]  # resampled from
        self._constants: dict[tuple[str, Site], Replacement] = {}  # shared by conditions
        self._edits: dict[Condition, dict[Site, Edit]] = {}
        # kept while they take less memory than the target, or 1 GiB; others are made again for every batch
        room = max(_ROOM, sum(parameter.nbytes for parameter in module.target.parameters()))
        width = max(1, sum(site.width for site in calibration.sites))
        places = {site: place for place, site in enumerate(calibration.sites)}
        self._begins: list[int] = []  # the place of the first site that a condition ablates
        for condition in self.conditions:
            edits = self._edits_of(condition)
            self.ablated[condition] = sum(int(edit.mask.sum()) for edit in edits.values()) / width
            self._begins.append(min(map(places.__getitem__, edits), default=0))
            if (size := sum(edit.nbytes for edit in edits.values())) <= room:
                room -= size
                self._edits[condition] = edits
        if again := len(self.conditions) - len(self._edits):
            rank_zero_warn(
                f"the replacement values of {again:,} of {len(self.conditions):,} conditions don't fit into memory, so "
                "they are computed again for every batch; larger batches (--data.batch_size) need that less often"
            )
        self._prefix = Prefix(module.target, calibration.sites, max(self._begins), _left(room, module))
        self._intact: Scored | None = None  # the intact pass, until layers are proven by it
        self._order = [0, *sorted(range(1, len(self.conditions)), key=lambda index: -self._begins[index])]

    @property
    def metrics(self) -> SweepMetrics:
        """Those of the data set whose batches are run."""
        return self.each[self.module.loader_index]

    @property
    def batches(self) -> int:
        """How many are done, of all data sets."""
        return sum(self.done)

    def step(self, batch: Any, batch_idx: int) -> None:
        """Evaluates every condition on one batch; DataError or NonFiniteError if what ``evaluate`` gives is wrong."""
        number = self.module.loader_index
        stop = self.stops[number] if self.stops else None
        if batch_idx < self.done[number] or (stop is not None and stop.at is not None):  # of an earlier run, or ended
            return
        clean, known = None, self.within
        with torch.no_grad():
            self.begin(batch, batch_idx)
            for done, index in enumerate(self._order):
                if 0 < done < known:  # evaluated by an earlier process
                    continue
                scored = self.evaluated(index, batch)
                if clean is None:
                    scored = checked(scored, self.module.metrics)
                    if not known:
                        self._check_examples(scored.example)
                    clean, self.classes = Clean.of(scored), scored.logits.shape[1]
                if done >= known:
                    with record_function("scoring"):
                        self.metrics.update(index, Scored(*scored), clean)
                    self.within = done + 1
                    self.pause()
                del scored  # or the next pass would hold the logits of two conditions
        self._check_finite()
        self.done[number], self.within = batch_idx + 1, 0
        if stop is not None:
            stop.look(self._batch.examples)

    def begin(self, batch: Any, batch_idx: int) -> Tensor:
        """Gives methods what they need of a batch; returns the indices of its examples, ``(batch,)`` int64."""
        self._batch.examples = self.module.examples_of(batch, batch_idx)
        if self._places is not None:
            self._places.begin(batch)
        for kind, seed in self._sources:
            self._batch.sources[kind, seed] = read_source(self.module, self._calibration.sites, kind, seed, batch)
        return self._batch.examples

    def end_epoch(self) -> None:
        """Merges the processes; DataError if nothing was scored, or one example by several of them."""
        for metrics in self.each:
            known = (metrics.n[:-1] > 0).double()  # of each process, which must all ask
            if len(known) and bool((self.module.summed(known) > 1).any()):
                raise DataError("several processes evaluated one example; use a lightning_ablate.AblationDataModule")
            metrics.sync()
            if not int(metrics.n.sum()):
                raise DataError("the evaluation data have no scored position; is everything padding, or too short?")

    def evaluated(self, index: int, batch: Any) -> Scored:
        """What the module gives for a batch under the condition of this index; the baseline comes first."""
        condition = self.conditions[index]
        self.announce(condition)
        if index == 0:
            with self.applied(condition), self._prefix.recorded():
                scored = self.module.evaluate(batch)
            self._intact = Scored(*scored) if self._prefix.unproven else None
            return scored
        if (intact := self._intact) is not None:
            with self.applied(BASELINE):
                self._prefix.prove(lambda: _same(Scored(*self.module.evaluate(batch)), intact))
            self._intact = None
        with self.applied(condition), self._prefix.reused(self._begins[index]):
            return self.module.evaluate(batch)

    @contextmanager
    def applied(self, condition: Condition) -> Iterator[None]:
        """Ablates the target for the one forward pass inside."""
        edits = self._edits.get(condition) or self._edits_of(condition)
        target = self.module.target
        with (
            record_function(str(condition)),
            one_by_one(target, self._calibration.sites),
            hooked(target, edits, once=True),
        ):
            yield

    def state_dict(self) -> dict[str, Any]:
        """The scores so far, merged over the processes, which must all call it."""
        merged = []
        for metrics in self.each:
            with metrics.sync_context():
                merged.append({name: value.cpu() for name, value in metrics.state_dict().items()})
        stops = [stop.state_dict() for stop in self.stops]
        return {"done": self.done, "within": self.within, "classes": self.classes, "metrics": merged, "stops": stops}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a :meth:`state_dict`; the first process takes the scores."""
        self.done, self.within, self.classes = list(state["done"]), int(state["within"]), state["classes"]
        for metrics, saved in zip(self.each, state["metrics"], strict=True):
            if self.module.global_rank == 0:
                metrics.load_state_dict(dict(saved))
                metrics.to(exact_device(self.module.device))
        for stop, saved in zip(self.stops, state["stops"], strict=True):
            stop.load_state_dict(saved)

    def _edits_of(self, condition: Condition) -> dict[Site, Edit]:
        if condition == BASELINE:
            return {}
        method, masks = self.sweep.method(condition.method), self.sweep.masks(condition, self._calibration)
        given = condition.seed, self._batch, self._constants
        return edits_of(method, masks, self._calibration, self.module.device, *given)

    def _check_examples(self, example: Tensor) -> None:
        """Raises DataError unless a batch's examples are new and of the data, as the intervals are over examples."""
        known = self.metrics.by_example
        if self.metrics.examples and len(example) and int(example.max()) >= self.metrics.examples:
            raise DataError(
                f"example {int(example.max())} is beyond the {self.metrics.examples} of the evaluation data: Scored's "
                "`example`, or a batch's `index`, must be its place in them, from 0"
            )
        here = example[example >= 0].to(self.metrics.n.device)
        if known is not None and bool((again := known[0][here] > 0).any()):
            raise DataError(
                f"example {int(here[again][0])} comes in two batches: Scored's `example` must be its place in the "
                "whole data, such as batch['index'], not in the batch"
            )

    def _check_finite(self) -> None:
        finite = self.metrics.finite
        if not bool(finite.all()):
            bad = [str(c) for c, good in zip(self.conditions, finite.tolist(), strict=True) if not good]
            odd = [name for name, values in self.metrics.means.items() if not bool(values.isfinite().all())]
            what = "logits" if set(odd) & set(METRICS) else f"values of {odd[0]}"
            raise NonFiniteError(
                f"the {what} under {bad[0]!r} are NaN or infinite ({len(bad)} of {len(self.conditions)} conditions); "
                "try another precision (--trainer.precision, --model.dtype)"
            )


def _same(one: Scored, other: Scored) -> bool:
    """Whether two passes are the same to the bit."""
    pairs = [(one.logits, other.logits), *((one.extra[name], other.extra[name]) for name in one.extra)]
    return all(torch.equal(*pair) for pair in pairs)


def _left(room: float, module: AblationModule) -> float:
    """Bytes for kept outputs of layers; 0 for a sharded target, whose processes must all run the same layers."""
    if module.device_mesh is not None:
        return 0
    return min(room, torch.cuda.mem_get_info(module.device)[0] / 4) if module.device.type == "cuda" else room


def read_source(module: AblationModule, sites: Iterable[Site], kind: str, seed: int, batch: Any) -> dict[Site, Source]:
    """The activations of the sites on another input of this kind, from which methods resample."""
    other = module.source(kind, seed, batch)  # may run the target to generate it
    found: dict[Site, Source] = {}

    def keep(site: Site, activations: Tensor) -> None:
        found[site] = Source(*(part.clone() for part in by_example(activations, module.valid_at(site, other))))

    with hooked(module.target, {site: partial(keep, site) for site in sites}, once=True):
        module.evaluate(other)
    return found
