"""Edits folded into other weights: what a smaller model computes, without a hook."""

from collections.abc import Mapping

from torch import Tensor, nn

from lightning_ablate.errors import SiteError
from lightning_ablate.methods import Affine, Edit
from lightning_ablate.sites import Site, weights_of


def fold(target: nn.Module, edits: Mapping[Site, Edit]) -> dict[str, tuple[Tensor, Tensor]]:
    """By path, the weights and biases with which projections do by themselves what edits do to their inputs.

    The target is left as it is. SiteError if an edit isn't affine, or a projection can't take other weights.
    """
    made = {}
    for site, edit in edits.items():
        weights = weights_of(target, site)
        if weights is None or not isinstance(edit.replacement, Affine):
            raise SiteError(
                f"what is done at {site.name} can't be folded, expected a constant or conditional method at a plain "
                "linear projection that runs once"
            )
        weight, bias, transposed = weights
        weight, bias = edit.replacement.fold(weight.T if transposed else weight, bias, edit.mask)
        made[site.path] = (weight.T if transposed else weight), bias
    return made
