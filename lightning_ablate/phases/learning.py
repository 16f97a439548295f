"""Learning: finds the values of a method by gradient descent, while the target stays as it is."""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import ceil
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_ablate.errors import ConfigError, NonFiniteError
from lightning_ablate.methods import Ablation, Edit, LearnedMethod
from lightning_ablate.modules import AblationModule
from lightning_ablate.modules.phase import Amount
from lightning_ablate.phases.method import Epoch, MethodPhase
from lightning_ablate.run import Run
from lightning_ablate.seeds import seed_of
from lightning_ablate.sites import Site, exact_device, hooked
from lightning_ablate.statistics import Moments
from lightning_ablate.statistics.base import by_example
from lightning_ablate.sweep import Sweep

_HELD_OUT = 10  # one step of so many is held out
BACKWARD = 3.0  # what a pass back and forth costs, in forward passes
Begun = dict[tuple[str, Site], tuple[Tensor, Callable[[Tensor], Tensor]]]
"""(name, site) → (zero delta, float32, function from delta to replacement values)."""


class Course(NamedTuple):
    """The epochs and steps in which a method learns."""

    epochs: int  # over the calibration data
    batches: int  # in an epoch, of each process
    accumulated: int  # batches in a step

    @classmethod
    def of(cls, method: LearnedMethod, amount: Amount) -> Self:
        """The fewest epochs that give the steps of a method."""
        batches = int(amount.batches)
        one = cls(1, batches, min(batches, max(1, round(method.examples / amount.batch_size))))
        return one._replace(epochs=ceil((1 if amount.dry else method.steps) / one.taken))

    @property
    def steps(self) -> int:
        """The steps of an epoch, held-out ones included."""
        return ceil(self.batches / self.accumulated)

    @property
    def taken(self) -> int:
        """The steps of an epoch that are taken."""
        return sum(not self.is_held_out(step * self.accumulated) for step in range(self.steps))

    def is_held_out(self, batch: int) -> bool:
        """Whether a batch belongs to a step that is held out: every tenth, or the last one of fewer."""
        each = min(_HELD_OUT, max(2, self.steps))
        return batch // self.accumulated % each == each - 1


class LearningPhase(MethodPhase):
    """Learns the values of one method at all sites by gradient descent, while the target stays as it is.

    Gradients are those of the sum over scored positions, divided by their number over all processes when a step is
    due. So a step is the same, but for rounding, however its examples are dealt to batches and processes. What is
    learned is float32 in any precision of the target; the calibration gets it at the end.
    """

    serves: ClassVar[type[LearnedMethod]] = LearnedMethod  # type: ignore[type-abstract]
    doing, loss = "Learning", "cross-entropy"
    passes = 1  # of the ablated target over each batch, each with values of its own

    def __init__(self, module: AblationModule, run: Run, method: LearnedMethod, sweep: Sweep, course: Course) -> None:
        super().__init__(module)
        self.method, self.course, self.sweep, self._run = method, course, sweep, run
        self._calibration = run.calibration
        self.title, self.epochs = f"{self.doing} {method.name}", course.epochs
        begun = self.begin()
        self._moves = {key: move for key, (_, move) in begun.items()}
        self.deltas = {key: nn.Parameter(zero) for key, (zero, _) in begun.items()}
        self.optimizer = method.optimizer(self.deltas.values())
        self.scheduler = CosineAnnealingLR(self.optimizer, T_max=course.epochs * course.steps)
        self.taken, self._epoch = 0, 0  # steps of the optimizer so far
        for delta in self.deltas.values():  # also in a process that ablates nothing at a site
            delta.grad = torch.zeros_like(delta)
        exact = exact_device(module.device)
        self._sums = torch.zeros(2, dtype=torch.float64, device=exact)  # positions, and their loss
        self._held_sums = torch.zeros(2, 2, dtype=torch.float64, device=exact)  # as it began, and by now

    @classmethod
    def scheduled(cls, method: LearnedMethod, sweep: Sweep, amount: Amount) -> list[Epoch]:
        """As many epochs as give the method's steps; ConfigError for data without a length."""
        if amount.batches == float("inf"):
            raise ConfigError(
                f"{method.name} learns in steps over the calibration data, which tell no length; give the loader one, "
                "or set --trainer.limit_train_batches"
            )
        course = Course.of(method, amount)
        taken, note = min(course.accumulated * amount.batch_size, amount.examples or sys.maxsize), ""
        if taken != method.examples:
            few = taken == amount.examples
            why = "there are no more" if few else "a step is made of whole batches of all processes"
            note = f"; {method.name} takes steps of {taken} examples, not {method.examples}: {why}"
        make = partial(cls, method=method, sweep=sweep, course=course)
        return [Epoch(number, make, *cls.cost(method), note) for number in range(course.epochs)]

    @classmethod
    def cost(cls, method: LearnedMethod) -> tuple[float, str, float]:
        """What a batch costs in forward passes, see :class:`Epoch`: beside conditions, their method, and each."""
        return BACKWARD, "", 0.0

    def begin(self) -> Begun:
        """For each site a zero change from the means, in standard deviations, ``(neurons,)``."""
        begun: Begun = {}
        for site in self._calibration.sites:
            moments = self._calibration[site][Moments]
            mean, sd = (values.float().to(self.module.device) for values in (moments.mean, moments.sd))
            begun[self.method.name, site] = torch.zeros_like(mean), partial(torch.addcmul, mean, sd)
        return begun

    def losses(self, batch: Any, batch_idx: int, when: str, moved: bool) -> Iterator[Tensor]:
        """For each ablated pass: the number of scored positions and the sum of their losses, ``(2,)`` float64.

        ``when`` seeds the choice of neurons; without ``moved`` the values are those that learning began with.
        """
        sites, examples = self._calibration.sites, self.module.examples_of(batch, batch_idx).tolist()
        drawn = [self.sweep.neurons.draw(sites, seed_of("learning", when, index)) for index in examples]
        masks = [self.sweep.masks(selection, self._calibration) for selection in drawn]
        values = {site: self.value((self.method.name, site), moved) for site in sites}
        with hooked(self.module.target, {s: partial(self._ablate, s, values[s], masks) for s in sites}, once=True):
            scored = self.module.evaluate(batch)
        yield summed(functional.cross_entropy(scored.logits.float(), scored.targets, reduction="none"), scored.example)

    def value(self, key: tuple[str, Site], moved: bool) -> Tensor:
        """The replacement values by now, or those that learning began with."""
        delta = self.deltas[key]
        return self._moves[key](delta if moved else torch.zeros_like(delta))

    def begin_epoch(self, epoch: int) -> None:
        """Resets the held-out losses."""
        self._epoch = epoch
        self._held_sums.zero_()

    def step(self, batch: Any, batch_idx: int) -> None:
        """Adds the gradient on one batch and takes a step if one is due, or evaluates a held-out batch."""
        held_out = self.course.is_held_out(batch_idx)
        if held_out:
            with torch.no_grad():
                for sums, moved in zip(self._held_sums, (False, True), strict=True):
                    sums += torch.stack(list(self.losses(batch, batch_idx, "held out", moved))).sum(0)
        else:
            for sums in self.losses(batch, batch_idx, f"epoch {self._epoch}", moved=True):
                if not sums.requires_grad:
                    raise ConfigError(
                        f"{self.method.name} can't learn: the logits that `evaluate` gives have no gradient; is there "
                        "a torch.no_grad() in it?"
                    )
                sums[1].backward()  # type: ignore[no-untyped-call]
                self._sums += sums.detach()
        done = batch_idx + 1
        if done % self.course.accumulated == 0 or done == self.course.batches:  # a step ends here
            if not held_out:
                self._take_step()
            self.scheduler.step()

    def end_epoch(self) -> None:
        """Merges the held-out losses; after the last epoch the values go to the calibration."""
        (positions, before), (_, after) = self.module.summed(self._held_sums).tolist()
        before, after = before / max(positions, 1), after / max(positions, 1)
        if positions:
            name = f"learning/{self.method.name} held out"
            self.module.log_at(self.taken, **{f"{name}, before": before, name: after})
        if self._epoch == self.epochs - 1:
            if after > before:
                warnings.warn(
                    f"{self.method.name}: what was learned is worse than what it began with on examples held out, "
                    f"{after:.4f} nats against {before:.4f}; give it more steps, more calibration data or a lower lr",
                    stacklevel=2,
                )
            self._run.held_out[self.method.name] = (before, after) if positions else None
            for name, site in self.deltas:
                learned = self._calibration.learned.setdefault(name, {})
                learned[site] = self.value((name, site), moved=True).detach().clone()

    def state_dict(self) -> dict[str, Any]:
        """The values and the optimizer, at the end of an epoch."""
        return {
            "deltas": [delta.detach().cpu() for delta in self.deltas.values()],
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "taken": self.taken,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a :meth:`state_dict`."""
        with torch.no_grad():
            for delta, saved in zip(self.deltas.values(), state["deltas"], strict=True):
                delta.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.taken = state["taken"]

    def _take_step(self) -> None:
        sums = self.module.summed(self._sums)
        (positions, loss), finite = sums.tolist(), [sums.isfinite().all()]
        mean = loss / max(positions, 1)
        for delta in self.deltas.values():
            gradient = cast(Tensor, delta.grad)
            total = self.module.summed(gradient.to(sums.device).double())
            gradient.copy_((total * self.passes / max(positions, 1)).float())
            finite.append(gradient.isfinite().all().to(sums.device))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self._sums.zero_()
        self.taken += 1
        if not bool(torch.stack(finite).all()):
            raise NonFiniteError(
                f"{self.method.name}: the {self.loss} is {mean} after {self.taken} steps, or its gradient isn't "
                "finite; lower the method's lr, or try another precision (--trainer.precision)"
            )
        self.module.log_at(self.taken, **{f"learning/{self.method.name}": mean})

    def _ablate(self, site: Site, values: Tensor, masks: list[dict[Site, Tensor]], activations: Tensor) -> Tensor:
        statistics = self._calibration.with_learned(site, {self.method.name: values})
        mask = torch.stack([one[site] for one in masks]).to(activations.device)
        rows, _ = by_example(activations, torch.ones(len(mask), 1, dtype=torch.bool))
        mask = mask.unsqueeze(1)
        return Edit(mask, self.method.prepare(Ablation(site, mask, statistics, None)))(rows).reshape(activations.shape)


def summed(losses: Tensor, example: Tensor) -> Tensor:
    """The number of positions that count and the sum of their losses, ``(2,)`` float64.

    ``losses`` and ``example`` are ``(n,)``, see :class:`Scored`.
    """
    losses, counts = losses.to(exact := exact_device(losses.device)), (example >= 0).to(exact)
    return torch.stack([counts.sum().double(), torch.where(counts, losses, 0.0).sum(dtype=torch.float64)])
