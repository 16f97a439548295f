"""Sites of a target: places whose activations are read and replaced."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_ablate.errors import SiteError
from lightning_ablate.sites.basis import Basis

WITHOUT_FLOAT64 = {"mps"}  # types of devices
EXPERT = "expert"  # the side of an expert's neurons, before its number
T = TypeVar("T")
_NUMBER = re.compile(r"(?:^|(?<=[._]))\d+$")


@dataclass(frozen=True)
class Site:
    """A place whose activations are read and replaced: the input of a projection, or the output of any module.

    Attributes:
        name: path of the module in the target, behind which ``:`` and the side follow if it isn't the input;
            ``path#0``, ``path#1`` ... if it runs several times.
        width: number of neurons, the features of the projection's input (n_heads x head_dim), or of the output.
        heads: number of attention heads, which lie side by side and are equally wide; None if there are none.
        kind: ``self-attention``, ``cross-attention`` (by the names of its modules), ``mlp``, ``expert``, ``residual``,
            ``query``, ``key``, ``value`` or ``other``.
        layer: path of its layer, with the same ``#`` as the name.
        uses: how often the module runs in one forward pass.
        basis: what its neurons are in place of the features: a part of them, directions, or an autoencoder's features.
    """

    name: str
    width: int
    heads: int | None = None
    kind: str = "self-attention"
    layer: str = ""
    uses: int = 1
    basis: Basis | None = field(default=None, compare=False)  # or each look into a mapping would hash its numbers

    @property
    def path(self) -> str:
        """The path of the module."""
        return self.name.partition("#")[0].partition(":")[0]

    @property
    def side(self) -> str:
        """``input``, ``output``, a part of an output (``query``, ``key``, ``value``), or the neurons of ``expert3``.

        An expert's neurons are what its last matrix multiplies, at the positions that are routed to it.
        """
        return self.name.partition("#")[0].partition(":")[2] or "input"

    @property
    def expert(self) -> int | None:
        """The number of the expert whose neurons they are; None for any other site."""
        return int(self.side[len(EXPERT) :]) if self.side.startswith(EXPERT) else None

    @property
    def end(self) -> str:
        """Where the module is read: at its ``input``, its ``output``, or ``inside``."""
        return self.side if self.side == "input" else "output" if self.expert is None else "inside"

    @property
    def use(self) -> int:
        """Which use of the module it is, from 0."""
        return int(self.name.partition("#")[2] or 0)

    def neuron(self, number: int) -> str:
        """What a person calls a neuron: ``neuron 563``, of a site with heads followed by ``(head 8, dim 51)``."""
        if self.basis is not None and not self.heads:
            return f"{self.basis.unit} {number}"
        place = divmod(number, self.width // self.heads) if self.heads else ()
        return f"neuron {number}" + (f" (head {place[0]}, dim {place[1]})" if place else "")


def series_of(path: str) -> str | None:
    """The path of a numbered module without its number; None for another module."""
    return _NUMBER.sub("", path) if _NUMBER.search(path) else None


def given_for(site: Site, given: Mapping[str, T]) -> T | None:
    """The value of a mapping for a site's name, or for that without ``#``, which stands for all uses of a module."""
    return given.get(site.name, given.get(site.name.partition("#")[0]))


def heads_of(site: Site) -> int:
    """The number of heads of a site; SiteError if none lie side by side in its neurons."""
    if site.heads is None:
        raise SiteError(
            f"the site {site.name} ({site.kind}, {site.width} neurons) has no heads that lie side by side; take "
            "neurons and methods that don't go by heads, or leave the site out (--ablation.sites)"
        )
    return site.heads


def check_mask(mask: Tensor, site: Site, whose: str) -> None:
    """Raises SiteError unless a mask is ``(neurons,)`` bool."""
    if mask.dtype != torch.bool or mask.shape != (site.width,):
        raise SiteError(
            f"the mask of {whose} at {site.name} is {tuple(mask.shape)} {mask.dtype}, expected ({site.width},) "
            "torch.bool, True for the neurons to ablate"
        )


def device_of(target: nn.Module) -> torch.device:
    """The device of a target's first parameter; the CPU if that is on ``meta``, as in an offloaded target."""
    device = next(target.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def exact_device(device: torch.device) -> torch.device:
    """Where sums in float64 are kept: the device itself, or the CPU if the device has no float64, as Apple's MPS.

    Values are moved to the exact device before they become float64, and become float32 before they are moved back.
    """
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def features(module: nn.Module) -> int | None:
    """The number of features that a projection reads; None if the module is no projection."""
    width = getattr(module, "in_features", None)
    if isinstance(width, int) and isinstance(getattr(module, "out_features", None), int):
        return width
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or isinstance(module, nn.Embedding):
        return None
    # transformers' Conv1D keeps its weight as (inputs, outputs), other projections as (outputs, inputs)
    return weight.shape[0 if hasattr(module, "nx") else 1]


def weights_of(target: nn.Module, site: Site) -> tuple[Tensor, Tensor | None, bool] | None:
    """The weight and bias of a site's projection, and whether the weight is ``(neurons, outputs)``.

    None if they can't be replaced: the site is an output or has a basis, the module runs several times, it is
    quantised, sharded or offloaded, or it is more than a matrix and a bias.
    """
    module = target.get_submodule(site.path)
    kind, weight, bias = type(module), getattr(module, "weight", None), getattr(module, "bias", None)
    linear, transposed = kind is nn.Linear, (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")
    if (
        site.side != "input"
        or site.basis is not None
        or site.uses > 1
        or not (linear or transposed)
        or "weight" not in module._parameters
    ):
        return None
    if not isinstance(weight, Tensor) or isinstance(weight, DTensor) or weight.is_meta:
        return None
    return (weight, bias, transposed) if weight.is_floating_point() else None
