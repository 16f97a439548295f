"""Edits folded into other weights: what a smaller model computes, without a hook."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_ablate.errors import SiteError
from lightning_ablate.methods import Affine, Edit
from lightning_ablate.sites import Site


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


def weights_of(target: nn.Module, site: Site) -> tuple[Tensor, Tensor | None, bool] | None:
    """The weight and bias of the projection that reads a site, and whether the weight is ``(neurons, outputs)``.

    None where others can't take their place: for a module that runs several times, a quantised or sharded one, or one
    that is more than a matrix and a bias.
    """
    module = target.get_submodule(site.path)
    kind, weight, bias = type(module), getattr(module, "weight", None), getattr(module, "bias", None)
    linear, transposed = kind is nn.Linear, (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")
    if site.uses > 1 or not (linear or transposed) or "weight" not in module._parameters:
        return None
    if not isinstance(weight, Tensor) or isinstance(weight, DTensor) or not weight.is_floating_point():
        return None
    return weight, bias, transposed
