"""Ablation of an expert by taking it away from the router."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_ablate.errors import SiteError
from lightning_ablate.methods.base import Ablation, AblationMethod, Edit, Places, Replacement


@dataclass(frozen=True, eq=False)
class OfRouter(Edit):
    """Changes the score ``(batch, seq, 1)`` by which a router chooses an expert."""

    of_router: ClassVar[bool] = True

    def __call__(self, activations: Tensor) -> Tensor:
        """A new tensor of the shape, dtype and device of the scores."""
        places = torch.ones_like(activations, dtype=torch.bool)
        if self.places is not None:
            places = places & self.places(activations.shape).to(places.device)
        return torch.where(places, self.replacement(activations), activations)


class Reroute(AblationMethod):
    """The router chooses among the other experts, and the ablated ones don't run.

    It ablates whole experts of mixtures (``--ablation.sites experts``). An expert's score is least before the router
    takes the largest, so whatever it does with the scores of those that it takes stays as it is.
    """

    name = "reroute"
    attributable = False
    constant = True

    def prepare(self, ablation: Ablation) -> Replacement:
        """The least score; SiteError unless the neurons are those of a whole expert."""
        if ablation.site.expert is None or not bool(ablation.mask.all()):
            raise SiteError(
                f"reroute ablates whole experts, got {int(ablation.mask.sum())} of {ablation.site.width} neurons of "
                f"{ablation.site.name}; give --ablation.sites experts --ablation.neurons EachExpert"
            )
        return lambda scores: torch.full_like(scores, -torch.inf)

    def edit(self, ablation: Ablation, replacement: Replacement, places: Places | None) -> Edit:
        """Acts on the router."""
        return OfRouter(ablation.mask, replacement, places)
