"""Ends a sweep once its intervals are narrow enough, after the same examples for any number of processes."""

from collections.abc import Mapping
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_ablate.errors import ConfigError
from lightning_ablate.metrics import METRICS, SweepMetrics
from lightning_ablate.modules import AblationModule
from lightning_ablate.modules.loaders import clusters_of
from lightning_ablate.results.bootstrap import ENOUGH, carrying, sequences

_LOOKS = 20  # in the whole data, evenly
_LEAST = 50  # clusters


class Stop:
    """Looks at a data set's scores after every twentieth of its examples, in their order.

    The sweep ends at the first look at which the interval of each condition's added cross-entropy is narrower than
    ``width`` nats. The intervals are :func:`~lightning_ablate.results.bootstrap.sequences`, so looking often doesn't
    harm them. At least 50 clusters must be seen, and each interval must rest on 20 of them. Processes may be ahead of
    one another: examples behind the one at which the sweep ends are left out.

    Attributes:
        at: after how many examples the sweep has ended; None while it goes on.
    """

    def __init__(self, module: AblationModule, metrics: SweepMetrics, width: float, loader: Any) -> None:
        count = metrics.examples
        if not count:
            raise ConfigError("ablation.until needs data that tell how many examples they hold; leave it out")
        self.module, self.metrics, self.width = module, metrics, width
        self.at: int | None = None
        self.clusters = np.asarray(clusters_of(loader, count))
        self._looks = [ceil(count * (look + 1) / _LOOKS) for look in range(_LOOKS)]
        self._seen = torch.zeros(count, dtype=torch.bool)

    def look(self, examples: Tensor) -> None:
        """Takes the indices of a batch's examples, ``(batch,)`` int64; every process must call it as often."""
        own = examples[(examples >= 0) & (examples < len(self._seen))].cpu()
        self._seen[own] = True
        seen = self._merged()
        until = len(seen) if bool(seen.all()) else int(seen.int().argmin())
        while self.at is None and self._looks and self._looks[0] <= until:
            self._decide(self._looks.pop(0))

    @property
    def said(self) -> str:
        """What the results say of it; empty if the sweep took all examples."""
        if self.at is None or self.at == len(self.clusters):
            return ""
        return (
            f"evaluation ended after {self.at:,} of {len(self.clusters):,} examples, as the 95% confidence sequence of "
            f"each condition's added cross-entropy is narrower than {self.width:g} nats"
        )

    def state_dict(self) -> dict[str, Any]:
        """What was looked at, merged over the processes, which must all call it."""
        return {"seen": self._merged(), "at": self.at, "looks": list(self._looks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a :meth:`state_dict`."""
        self._seen, self.at, self._looks = state["seen"].clone(), state["at"], list(state["looks"])

    def _merged(self) -> Tensor:
        """Which examples any process has seen."""
        return self.module.summed(self._seen.to(self.metrics.n.device, torch.float64)).cpu() > 0

    def _decide(self, count: int) -> None:
        place = METRICS.index("cross_entropy")
        sums = self.module.summed(self.metrics.sums[:, place, :count]).cpu().numpy()
        positions = np.zeros(len(self.clusters))
        positions[:count] = self.module.summed(self.metrics.n[:count]).cpu().numpy()
        whole = np.zeros((len(sums) - 1, len(positions)))
        whole[:, :count] = sums[1:] - sums[0]
        if len(np.unique(self.clusters[positions > 0])) < _LEAST:
            return
        known = whole, positions, self.clusters
        low, high = sequences(*known)
        if bool((carrying(*known) >= ENOUGH).all()) and bool((high - low <= self.width).all()):
            self.at = count
            self.metrics.sums[..., count:] = 0
            self.metrics.n[count:] = 0
