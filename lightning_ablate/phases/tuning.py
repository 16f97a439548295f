"""Tuning: moves regressions by gradient descent, until the ablated target predicts what the intact one does."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_ablate.errors import ConfigError
from lightning_ablate.methods import Ablation, ConditionalTuned, Edit, LearnedMethod
from lightning_ablate.modules import AblationModule
from lightning_ablate.phases.learning import BACKWARD, Begun, Course, LearningPhase, summed
from lightning_ablate.run import Run
from lightning_ablate.seeds import digest
from lightning_ablate.sites import Site, hooked, one_by_one
from lightning_ablate.statistics import Moments
from lightning_ablate.sweep import Sweep


class TuningPhase(LearningPhase):
    """Learns :class:`~lightning_ablate.methods.ConditionalTuned` for every condition of a sweep.

    The regressions begin at the conditional mean of all calibration data, held-out batches included. For each batch the
    intact target runs once, and each condition once.
    """

    serves = ConditionalTuned
    doing, loss = "Tuning", "KL divergence"
    method: ConditionalTuned

    def __init__(
        self, module: AblationModule, run: Run, method: ConditionalTuned, sweep: Sweep, course: Course
    ) -> None:
        self._masks = dict[str, dict[Site, Tensor]]()
        for condition in (one for one in sweep.conditions(run.calibration.sites) if one.method == method.name):
            masks = sweep.masks(condition, run.calibration)
            key = method.key(digest({site.name: mask for site, mask in masks.items()}))
            self._masks[key] = {site: mask.to(module.device) for site, mask in masks.items() if bool(mask.any())}
        if not self._masks:
            raise ConfigError(f"{method.name} has nothing to tune, as no neuron is ablated (--ablation.fractions)")
        self.passes = len(self._masks)
        super().__init__(module, run, method, sweep, course)

    @classmethod
    def cost(cls, method: LearnedMethod) -> tuple[float, str, float]:
        """An intact pass, and one back and forth for each condition."""
        return 1.0, method.name, BACKWARD

    def begin(self) -> Begun:
        """For each condition and site a zero change of its regression, ``(kept + 1, ablated)``."""
        begun: Begun = {}
        for key, masks in self._masks.items():
            for site, mask in masks.items():
                statistics = self._calibration[site]
                start = self.method.start(Ablation(site, mask, statistics, None))
                begun[key, site] = torch.zeros_like(start), partial(self.method.moved, start, mask, statistics[Moments])
        return begun

    def losses(self, batch: Any, batch_idx: int, when: str, moved: bool) -> Iterator[Tensor]:
        """For each condition the KL divergence from the intact target."""
        with torch.no_grad(), one_by_one(self.module.target, self._calibration.sites):
            intact = self.module.evaluate(batch).logits.float().log_softmax(1)
        for key, masks in self._masks.items():
            edits = {s: Edit(m, self.method.unpacked(self.value((key, s), moved), m)) for s, m in masks.items()}
            yield self._divergence(batch, edits, intact)

    def _divergence(self, batch: Any, edits: Mapping[Site, Edit], intact: Tensor) -> Tensor:
        with hooked(self.module.target, edits, once=True):
            scored = self.module.evaluate(batch)
        apart = intact - scored.logits.float().log_softmax(1)
        return summed(torch.where(intact > -torch.inf, intact.exp() * apart, 0.0).sum(1), scored.example)
