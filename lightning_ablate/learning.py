"""Learns the values of a method by gradient descent, while the target stays as it is."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil, cos, pi
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_ablate.calibration import Calibration, check_runs
from lightning_ablate.errors import ConfigError, NonFiniteError
from lightning_ablate.masks import NeuronChoice, seed_of
from lightning_ablate.methods import Ablation, LearnedMethod, ablate
from lightning_ablate.metrics import Scored
from lightning_ablate.sites import Site, hooked
from lightning_ablate.statistics import Moments

_HELD_OUT = 10  # one step of so many is held out


class Course(NamedTuple):
    """How the learning of a method's values goes.

    Attributes:
        epochs: over the calibration data.
        batches: in an epoch, of each process.
        accumulated: of these in a step.

    Example:
        >>> course = Course.of(steps=200, examples=32, batch_size=16, batches=25)
        >>> course, [batch for batch in range(25) if course.is_held_out(batch)]
        (Course(epochs=17, batches=25, accumulated=2), [18, 19])
    """

    epochs: int
    batches: int
    accumulated: int

    @classmethod
    def of(cls, *, steps: int, examples: int, batch_size: int, batches: int, accumulated: int = 1) -> "Course":
        """That with the fewest epochs which give so many steps.

        Args:
            steps: of the optimiser.
            examples: of one step, unless batches are accumulated already.
            batch_size: of all processes together.
            batches: in an epoch, of each process.
            accumulated: of these in a step, above 1 where that is asked for.
        """
        if accumulated == 1:
            accumulated = min(batches, max(1, round(examples / batch_size)))
        one = cls(1, batches, accumulated)
        taken = sum(not one.is_held_out(step * accumulated) for step in range(one.steps))
        return one._replace(epochs=ceil(steps / taken))

    @property
    def steps(self) -> int:
        """The steps of an epoch, those held out among them."""
        return ceil(self.batches / self.accumulated)

    def is_held_out(self, batch: int) -> bool:
        """Whether a batch belongs to a step that is held out: every tenth, or the last one of fewer."""
        each = min(_HELD_OUT, max(2, self.steps))
        return batch // self.accumulated % each == each - 1


class Learning:
    """The values of one method at all sites, while they are learned.

    Gradients are taken of the sum over the scored positions, and divided by their number over all processes when a step
    is due; so a step is the same, but for rounding, however its examples are dealt to batches and processes.

    Args:
        method: whose values.
        calibration: complete, of the target.
        choice: which neurons go.

    Attributes:
        deltas: what is learned of each site, ``(neurons,)`` float32: the distance from the mean, in standard
            deviations.
        taken: steps of the optimiser so far.
        held_out: cross-entropy on the examples of this epoch that were held out, in nats: with the values at the
            beginning (the means) and with those learned so far; None where none were.
    """

    def __init__(self, method: LearnedMethod, calibration: Calibration, choice: NeuronChoice) -> None:
        self.method, self._calibration, self._choice = method, calibration, choice
        moments = {site: calibration[site][Moments] for site in calibration.sites}
        self._mean = {site: found.mean.float() for site, found in moments.items()}
        self._sd = {site: found.sd.float() for site, found in moments.items()}
        self.deltas = {site: nn.Parameter(torch.zeros_like(mean)) for site, mean in self._mean.items()}
        self.optimizer = method.optimizer(self.deltas.values())
        self.taken, self.epoch, self.course = 0, 0, Course(1, 1, 1)
        self.held_out: tuple[float, float] | None = None
        self._gradients = {site: torch.zeros_like(delta) for site, delta in self.deltas.items()}
        self._sums = torch.zeros(2, dtype=torch.float64, device=calibration.device)  # positions, cross-entropy
        self._held_sums = torch.zeros(3, dtype=torch.float64, device=calibration.device)  # and with the means

    def start(self, epoch: int, course: Course) -> None:
        """Begins an epoch, the first one being 0."""
        self.epoch, self.course = epoch, course
        self._held_sums.zero_()

    def learn(self, evaluate: Callable[[], Scored], examples: Sequence[int]) -> None:
        """Adds the gradient on one batch, or a piece of it.

        Args:
            evaluate: runs the target on it.
            examples: its examples, by their indices, from which the neurons are drawn.
        """
        with self._ablated(examples, f"epoch {self.epoch}", self._values()):
            loss, positions = _loss(evaluate())
        if not loss.requires_grad:
            raise ConfigError(
                f"{self.method.name} can't learn: the logits that `evaluate` gives have no gradient; is there a "
                "torch.no_grad() in it?"
            )
        found = torch.autograd.grad(loss, list(self.deltas.values()), allow_unused=True, materialize_grads=True)
        for gradient, more in zip(self._gradients.values(), found, strict=True):
            gradient += more
        self._sums += torch.stack([positions, loss.detach()])

    @torch.no_grad()
    def check(self, evaluate: Callable[[], Scored], examples: Sequence[int]) -> None:
        """Adds the cross-entropy on a batch that is held out, with the means and with the values so far."""
        losses = []
        for values in (self._mean, self._values()):
            with self._ablated(examples, "held out", values):
                loss, positions = _loss(evaluate())
            losses.append(loss)
        self._held_sums += torch.stack([positions, *losses])

    def surrogate(self) -> Tensor:
        """A scalar with the mean cross-entropy as its value and the gradients added as its gradient."""
        terms = [(delta * self._gradients[site]).sum() for site, delta in self.deltas.items()]
        total = torch.stack(terms).sum()
        self._gradients = {site: torch.zeros_like(delta) for site, delta in self.deltas.items()}
        return total - total.detach() + (self._sums[1] / self._sums[0].clamp_min(1)).float()

    def before_step(self, reduce: Callable[[Tensor], Tensor], batch: int) -> float | None:
        """Makes the gradients those of the mean over all processes' positions, and sets the learning rate.

        Args:
            reduce: sums a tensor over the processes.
            batch: the last one of this step.

        Returns:
            The mean cross-entropy of this step; None if it was held out.

        Raises:
            NonFiniteError: if it is NaN or infinite.
        """
        if next(iter(self.deltas.values())).grad is None:
            return None
        parts = [*(delta.grad.double() for delta in self.deltas.values() if delta.grad is not None), self._sums]
        whole = torch.split(reduce(torch.cat(parts)), [len(part) for part in parts])
        positions, loss = whole[-1].tolist()
        for delta, gradient in zip(self.deltas.values(), whole[:-1], strict=True):
            delta.grad = (gradient * (self.course.accumulated / max(positions, 1))).float()  # Lightning divided by it
        self._sums.zero_()
        step = batch // self.course.accumulated
        progress = (self.epoch + step / self.course.steps) / self.course.epochs
        for group in self.optimizer.param_groups:
            group["lr"] = self.method.lr * (1 + cos(pi * progress)) / 2
        self.taken += 1
        mean = loss / max(positions, 1)
        if not all(bool(part.isfinite().all()) for part in whole):
            raise NonFiniteError(
                f"{self.method.name}: the cross-entropy is {mean} after {self.taken} steps, or its gradient isn't "
                "finite; lower the method's lr, or try another precision (--trainer.precision)"
            )
        return mean

    def finish_epoch(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Merges the processes' held-out cross-entropies."""
        positions, before, after = reduce(self._held_sums).tolist()
        self.held_out = (before / positions, after / positions) if positions else None

    def finish(self) -> None:
        """Hands the values to the calibration."""
        values = {site: value.detach().clone() for site, value in self._values().items()}
        self._calibration.learned[self.method.name] = values

    def state_dict(self) -> dict[str, Any]:
        """How far it has come, between two steps."""
        return {
            "deltas": [delta.detach().cpu() for delta in self.deltas.values()],
            "optimizer": self.optimizer.state_dict(),
            "taken": self.taken,
            "held": self._held_sums.cpu(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a :meth:`state_dict`."""
        with torch.no_grad():
            for delta, saved in zip(self.deltas.values(), state["deltas"], strict=True):
                delta.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.taken = state["taken"]
        self._held_sums.copy_(state["held"])

    def _values(self) -> dict[Site, Tensor]:
        return {site: self._mean[site] + self._sd[site] * delta for site, delta in self.deltas.items()}

    @contextmanager
    def _ablated(self, examples: Sequence[int], when: str, values: Mapping[Site, Tensor]) -> Iterator[None]:
        """Ablates other neurons in every example of the one forward pass inside."""
        drawn = [self._choice.draw(self._calibration.sites, seed_of("learning", when, index)) for index in examples]
        runs = dict.fromkeys(self._calibration.sites, 0)

        def act(site: Site, activations: Tensor) -> Tensor:
            runs[site] += 1
            statistics = self._calibration.with_learned(site, {self.method.name: values[site]})
            mask = torch.stack([self._choice.mask(one, site, statistics) for one in drawn]).to(activations.device)
            if len(activations) % len(mask):  # its first dimension isn't that of the examples
                mask = mask[:1]
            mask, by_example = mask.unsqueeze(1), activations.reshape(len(mask), -1, site.width)
            replacement = self.method.prepare(Ablation(site, mask, statistics, None))
            return ablate(by_example, mask, replacement).reshape(activations.shape)

        with hooked(self._calibration.target, self._calibration.sites, act):
            yield
        check_runs(runs)


def _loss(scored: Scored) -> tuple[Tensor, Tensor]:
    """The cross-entropy summed over the scored positions, and their number, both ``()`` float64."""
    counts = scored.example >= 0
    each = functional.cross_entropy(scored.logits.float(), scored.targets, reduction="none")
    return torch.where(counts, each, 0.0).sum(dtype=torch.float64), counts.sum().double()
