"""Places of a target whose input is read and replaced."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_ablate.errors import SiteError
from lightning_ablate.sites.unfused import unfused

Hook = Callable[[Tensor], Tensor | None]
"""Gets a site's activations ``(batch, ..., neurons)``; what it returns, unless None, is used instead."""


@dataclass(frozen=True)
class Site:
    """A place whose input is read and replaced.

    Attributes:
        name: path of the projection module in the target; behind a ``#`` the use, from 1, where a module runs again.
        width: number of neurons, the features of the projection's input (n_heads x head_dim).
        heads: number of attention heads, which lie side by side and are equally wide; None where there are none.
        kind: ``self-attention``, ``cross-attention`` (told by the names of its modules), ``mlp`` or ``other``.
        layer: path of the layer it belongs to, and the use like that of the name.
        uses: how often the module runs in one forward pass.
    """

    name: str
    width: int
    heads: int | None = None
    kind: str = "self-attention"
    layer: str = ""
    uses: int = 1

    @property
    def path(self) -> str:
        """The path of the module."""
        return self.name.partition("#")[0]

    @property
    def use(self) -> int:
        """Which use of the module it is, from 0."""
        return int(self.name.partition("#")[2] or 0)


def heads_of(site: Site) -> int:
    """The number of heads of a site; SiteError if it has none that lie side by side in its neurons."""
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


@contextmanager
def hooked(target: nn.Module, hooks: Mapping[Site, Hook], *, once: bool = False) -> Iterator[None]:
    """Runs a hook before each site's projection; leaves none behind, whatever happens.

    With ``once``, a single forward pass is expected inside; SiteError if a site did not run in it, or ran too often.
    """
    modules: dict[str, dict[int, Site]] = {}
    for site in hooks:
        modules.setdefault(site.path, {})[site.use] = site
    runs = Counter[tuple[str, int]]()  # of each thread, in which passes can go side by side

    def before(path: str, uses: Mapping[int, Site], of: int, module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        site = uses.get(runs[path, get_ident()] % of)
        runs[path, get_ident()] += 1
        changed = None if site is None else hooks[site](inputs[0])
        return None if changed is None else (changed, *inputs[1:])

    with ExitStack() as stack:
        stack.enter_context(unfused(target.modules()))
        for path, uses in modules.items():
            hook = partial(before, path, uses, next(iter(uses.values())).uses)
            stack.callback(target.get_submodule(path).register_forward_pre_hook(hook).remove)
        yield
    for site in hooks if once else ():
        if (ran := runs[site.path, get_ident()]) != site.uses:
            raise SiteError(
                f"the site {site.name} ran {ran} times in one forward pass, expected {site.uses}, as when "
                "the sites were found: `evaluate` must run the target once, in the same way for every batch, and not "
                "compiled by torch.compile before"
            )
