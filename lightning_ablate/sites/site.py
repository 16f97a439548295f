"""Sites of a target: places whose activations are read and replaced."""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import get_ident
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import checkpoint

from lightning_ablate.errors import SiteError
from lightning_ablate.sites.basis import Basis
from lightning_ablate.sites.unfused import unfused

WITHOUT_FLOAT64 = {"mps"}  # types of devices
Hook = Callable[[Tensor], Tensor | None]
"""From a site's activations ``(batch, ..., neurons)`` to those to use instead; None leaves them."""
T = TypeVar("T")
_NUMBER = re.compile(r"(?:^|(?<=[._]))\d+$")


@dataclass(frozen=True)
class Site:
    """A place whose activations are read and replaced: the input of a projection, or the output of any module.

    Attributes:
        name: path of the module in the target, behind which ``:`` and the side follow for an output;
            ``path#0``, ``path#1`` ... if it runs several times.
        width: number of neurons, the features of the projection's input (n_heads x head_dim), or of the output.
        heads: number of attention heads, which lie side by side and are equally wide; None if there are none.
        kind: ``self-attention``, ``cross-attention`` (by the names of its modules), ``mlp``, ``residual``, ``query``,
            ``key``, ``value`` or ``other``.
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
        """``input``, or ``output``, or what a part of an output is to attention: ``query``, ``key`` or ``value``."""
        return self.name.partition("#")[0].partition(":")[2] or "input"

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


@contextmanager
def hooked(target: nn.Module, hooks: Mapping[Site, Hook], *, once: bool = False) -> Iterator[Counter[Site]]:
    """Runs a hook on the activations of each site; removes them all at the end, whatever happens.

    Inside, code that ``torch.compile`` made runs as plain Python, since compiled code ignores the hooks. With gradient
    checkpointing, a backward pass inside recomputes with the hooks. Yields how often each site has run.

    Raises:
        SiteError: if a checkpointed pass was not recomputed inside; or, with ``once``, if the sites did not run exactly
            as often as in one forward pass.
    """
    modules: dict[tuple[str, bool], dict[int, list[Site]]] = {}
    for site in hooks:
        modules.setdefault((site.path, site.side == "input"), {}).setdefault(site.use, []).append(site)
    runs = Counter[tuple[str, bool, int]]()  # in each thread
    ran, owed = Counter[Site](), Counter[str]()  # owed: runs that a backward pass will repeat
    differentiable = torch.is_grad_enabled()

    def due(path: str, reads: bool, uses: Mapping[int, list[Site]], of: int) -> list[Site]:
        """The sites that this run of a module is."""
        repeats = _repeats() if differentiable else None
        if repeats is not None:
            owed[path] += -1 if repeats else 1
        if repeats and of > 1:
            raise SiteError(
                f"{path} runs {of} times in a pass, which gradient checkpointing can't tell apart when it recomputes "
                "them: turn it off while the target is ablated"
            )
        key = path, reads, get_ident()
        runs[key] += not repeats
        sites = uses.get((runs[key] - 1) % of, [])
        ran.update([] if repeats else sites)
        return sites

    def before(given: tuple[Any, ...], module: nn.Module, inputs: Any, named: Any) -> Any:
        name = None if inputs else next(iter(named))
        read = whole = inputs[0] if name is None else named[name]
        for site in due(*given):
            read = _changed(site, hooks[site], read)
        if read is whole:
            return None
        return ((read, *inputs[1:]), named) if name is None else (inputs, {**named, name: read})

    def after(given: tuple[Any, ...], module: nn.Module, inputs: Any, output: Any) -> Any:
        made = whole = first_of(output)
        if made is None:
            return None
        for site in due(*given):
            made = _changed(site, hooks[site], made)
        if made is whole or isinstance(output, Tensor):
            return None if made is whole else made
        rest = made, *output[1:]
        return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)

    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(unfused(target.modules()))
        for (path, reads), uses in modules.items():
            given = path, reads, uses, next(iter(uses.values()))[0].uses
            module = target.get_submodule(path)
            if reads:
                stack.callback(module.register_forward_pre_hook(partial(before, given), with_kwargs=True).remove)
            else:
                stack.callback(module.register_forward_hook(partial(after, given)).remove)
        yield ran
    if late := [path for path, count in owed.items() if count > 0]:
        raise SiteError(
            f"{late[0]} ran under gradient checkpointing, and its backward pass hasn't run yet: outside this block it "
            "would recompute without the ablation; call backward() inside, or turn checkpointing off"
        )
    for site in hooks if once else ():
        if (count := runs[site.path, site.side == "input", get_ident()]) != site.uses:
            raise SiteError(
                f"the site {site.name} ran {count} times in one forward pass, expected {site.uses} as in the first "
                "batch: `evaluate` must run the target once, in the same way for every batch"
            )


def first_of(output: Any) -> Tensor | None:
    """The tensor that a module returns, alone or before others; None if it returns anything else."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) and first.ndim > 1 else None


def _changed(site: Site, hook: Hook, whole: Tensor) -> Tensor:
    """A module's activations ``(batch, ..., features)`` after the hook of a site, which gets them in its basis."""
    if site.basis is None:
        _check_width(site, whole)
        changed = hook(whole)
        return whole if changed is None else changed
    with torch.autocast(whole.device.type, enabled=False):  # a basis has a dtype of its own
        own = site.basis.read(whole)
        _check_width(site, own)
        changed = hook(own)
        return whole if changed is None else site.basis.write(whole, own, changed)


def _check_width(site: Site, own: Tensor) -> None:
    if own.shape[-1] != site.width:
        raise SiteError(f"{site.name} has {own.shape[-1]} neurons in a pass, expected {site.width}")


def keep(found: dict[Site, Tensor], site: Site, activations: Tensor) -> None:
    """Puts a copy of the activations of a site into ``found``; a hook once the first two arguments are given."""
    found[site] = activations.clone()


def _repeats() -> bool | None:
    """True while gradient checkpointing recomputes this; False if it will do that later; None without it."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        if frame.f_globals.get("__name__") == checkpoint.__name__:
            if torch._C._current_graph_task_id() != -1:
                return True
            inputs = frame.f_locals.get("args", ())  # of the reentrant form, which always runs without gradients
            recorded = any(isinstance(one, Tensor) and one.requires_grad for one in inputs)
            return False if torch.is_grad_enabled() or (frame.f_code.co_name == "forward" and recorded) else None
        frame = frame.f_back
    return None
