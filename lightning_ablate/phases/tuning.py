"""Tuning: moves what was fitted by gradient descent, until the ablated target says what the intact one does."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_ablate.choices import Choice
from lightning_ablate.conditions import Condition
from lightning_ablate.errors import ConfigError
from lightning_ablate.methods import Ablation, ConditionalTuned, Edit
from lightning_ablate.phases.learning import Begun, Course, LearningPhase, summed
from lightning_ablate.phases.phase import Module
from lightning_ablate.phases.resume import Run
from lightning_ablate.phases.sweep import digest_of, masks_of
from lightning_ablate.sites import Site, hooked
from lightning_ablate.statistics import Moments


class TuningPhase(LearningPhase):
    """Learns, for every condition of a sweep, what :class:`~lightning_ablate.methods.ConditionalTuned` puts in place.

    It begins with what the :class:`FittingPhase` has fitted, also to the batches that are held out here. The intact
    target reads a batch once, and each condition does.
    """

    doing, loss = "Tuning", "KL divergence"
    method: ConditionalTuned

    def __init__(
        self,
        module: Module,
        run: Run,
        method: ConditionalTuned,
        choice: Choice,
        course: Course,
        conditions: Callable[[], Sequence[Condition]],
    ) -> None:
        self._masks = dict[str, dict[Site, Tensor]]()
        for condition in (one for one in conditions() if one.method == method.name):
            masks = masks_of(condition, choice, run.calibration)
            self._masks[method.key(digest_of(masks))] = {
                site: mask.to(module.device) for site, mask in masks.items() if bool(mask.any())
            }
        if not self._masks:
            raise ConfigError(f"{method.name} has nothing to tune, as no neuron is ablated (--ablation.fractions)")
        self.passes = len(self._masks)
        super().__init__(module, run, method, choice, course)

    def begin(self) -> Begun:
        """Of every condition and site what :meth:`ConditionalTuned.moved` adds, ``(kept + 1, ablated)``."""
        begun: Begun = {}
        for key, masks in self._masks.items():
            for site, mask in masks.items():
                statistics = self._calibration[site]
                start = self.method.start(Ablation(site, mask, statistics, None))
                begun[key, site] = torch.zeros_like(start), partial(self.method.moved, start, mask, statistics[Moments])
        return begun

    def losses(self, batch: Any, batch_idx: int, when: str, moved: bool) -> Iterator[Tensor]:
        """Of the KL divergence of each condition in turn from the intact target."""
        with torch.no_grad():
            intact = self.module.evaluate(batch).logits.float().log_softmax(1)
        for key, masks in self._masks.items():
            edits = {s: Edit(m, self.method.unpacked(self.value((key, s), moved), m)) for s, m in masks.items()}
            yield self._divergence(batch, edits, intact)

    def _divergence(self, batch: Any, edits: Mapping[Site, Edit], intact: Tensor) -> Tensor:
        with hooked(self.module.target, edits, once=True):
            scored = self.module.evaluate(batch)
        apart = intact - scored.logits.float().log_softmax(1)
        return summed(torch.where(intact > -torch.inf, intact.exp() * apart, 0.0).sum(1), scored.example)
