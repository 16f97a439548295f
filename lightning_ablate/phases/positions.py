"""Where the neurons of the batch at hand are ablated."""

from typing import Any

import torch
from torch import Tensor

from lightning_ablate.modules import AblationModule
from lightning_ablate.positions import ALL, Positions, places_at
from lightning_ablate.sites import Site


class BatchPositions:
    """Gives the positions of a site that are ablated in a batch, see :attr:`~lightning_ablate.methods.Batch.places`.

    They are found once a batch, however many conditions ask.
    """

    def __init__(self, module: AblationModule, positions: Positions) -> None:
        self.module, self.positions = module, positions
        self.begin(None)

    def begin(self, batch: Any) -> None:
        """Takes the batch at hand."""
        self._batch, self._found = batch, dict[tuple[Site, torch.Size], Tensor]()

    def __call__(self, site: Site, shape: torch.Size) -> Tensor:
        """Bool ``(batch, ..., 1)`` for activations of a shape, see :func:`~lightning_ablate.positions.places_at`."""
        if (site, shape) not in self._found:
            valid = self.module.valid_at(site, self._batch)
            if valid is None:
                valid = torch.ones(len(self.module.examples_of(self._batch, 0)), 1, dtype=torch.bool)
            self._found[site, shape] = places_at(self.positions, site, shape, valid, self._batch)
        return self._found[site, shape]

    @classmethod
    def of(cls, module: AblationModule, positions: Positions) -> "BatchPositions | None":
        """None for all positions."""
        return None if positions == ALL else cls(module, positions)
