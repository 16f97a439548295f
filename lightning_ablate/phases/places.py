"""Where the neurons of the batch at hand are ablated."""

from typing import Any

import torch
from torch import Tensor

from lightning_ablate.modules import AblationModule
from lightning_ablate.positions import ALL, Positions, places_at
from lightning_ablate.sites import Site


class Places:
    """Gives the positions of a site that are ablated in a batch, see :attr:`~lightning_ablate.methods.Batch.places`.

    Attributes:
        batch: the one at hand.
    """

    def __init__(self, module: AblationModule, positions: Positions) -> None:
        self.module, self.positions = module, positions
        self.batch: Any = None

    def __call__(self, site: Site, shape: torch.Size) -> Tensor:
        """Bool ``(batch, ..., 1)`` for activations of a shape, see :func:`~lightning_ablate.positions.places_at`."""
        valid = self.module.valid_at(site, self.batch)
        if valid is None:
            valid = torch.ones(len(self.module.examples_of(self.batch, 0)), 1, dtype=torch.bool)
        return places_at(self.positions, site, shape, valid, self.batch)

    @classmethod
    def of(cls, module: AblationModule, positions: Positions) -> "Places | None":
        """None for all positions."""
        return None if positions == ALL else cls(module, positions)
