"""Other weights in the place of a target's, for as long as they are needed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_ablate.sites import Site


def weights_of(target: nn.Module, site: Site) -> tuple[Tensor, Tensor | None, bool] | None:
    """The weight and bias of the projection that reads a site, and whether the weight is ``(neurons, outputs)``.

    Returns:
        None where others can't take their place: for a module that runs several times, a quantised or sharded one, or
        one that is more than a matrix and a bias.

    Example:
        >>> weight, bias, transposed = weights_of(nn.Sequential(nn.Linear(3, 2)), Site("0", 3))
        >>> weight.shape, bias.shape, transposed
        (torch.Size([2, 3]), torch.Size([2]), False)
    """
    module = target.get_submodule(site.path)
    kind, weight, bias = type(module), getattr(module, "weight", None), getattr(module, "bias", None)
    linear, transposed = kind is nn.Linear, (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")
    if site.uses > 1 or not (linear or transposed) or "weight" not in module._parameters:
        return None
    if not isinstance(weight, Tensor) or isinstance(weight, DTensor) or not weight.is_floating_point():
        return None
    return weight, bias, transposed


@contextmanager
def swapped(target: nn.Module, weights: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Lets projections run with other weights and biases, by their paths; their own tensors are not written."""
    modules = {path: target.get_submodule(path) for path in weights}
    own = {path: dict(module._parameters) for path, module in modules.items()}
    try:
        for path, module in modules.items():
            weight, bias = weights[path]
            module._parameters.update(weight=nn.Parameter(weight, False), bias=nn.Parameter(bias, False))
        yield
    finally:
        for path, module in modules.items():
            module._parameters.update(own[path])
