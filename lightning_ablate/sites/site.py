"""Sites of a target: projections whose input is read and replaced."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from threading import get_ident
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import checkpoint

from lightning_ablate.errors import SiteError
from lightning_ablate.sites.unfused import unfused

WITHOUT_FLOAT64 = {"mps"}  # types of devices
Hook = Callable[[Tensor], Tensor | None]
"""From a site's activations ``(batch, ..., neurons)`` to those to use instead; None leaves them."""
T = TypeVar("T")


@dataclass(frozen=True)
class Site:
    """A projection whose input is read and replaced.

    Attributes:
        name: path of the projection module in the target; ``path#0``, ``path#1`` ... if it runs several times.
        width: number of neurons, the features of the projection's input (n_heads x head_dim).
        heads: number of attention heads, which lie side by side and are equally wide; None if there are none.
        kind: ``self-attention``, ``cross-attention`` (by the names of its modules), ``mlp`` or ``other``.
        layer: path of its layer, with the same ``#`` as the name.
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

    def neuron(self, number: int) -> str:
        """What a person calls a neuron: ``neuron 563``, of a site with heads followed by ``(head 8, dim 51)``."""
        place = divmod(number, self.width // self.heads) if self.heads else ()
        return f"neuron {number}" + (f" (head {place[0]}, dim {place[1]})" if place else "")


def given_for(site: Site, given: Mapping[str, T]) -> T | None:
    """The value of a mapping for a site's name, or for its path, which stands for all uses of a module."""
    return given.get(site.name, given.get(site.path))


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

    None if they can't be replaced: the module runs several times, it is quantised, sharded or offloaded, or it is more
    than a matrix and a bias.
    """
    module = target.get_submodule(site.path)
    kind, weight, bias = type(module), getattr(module, "weight", None), getattr(module, "bias", None)
    linear, transposed = kind is nn.Linear, (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")
    if site.uses > 1 or not (linear or transposed) or "weight" not in module._parameters:
        return None
    if not isinstance(weight, Tensor) or isinstance(weight, DTensor) or weight.is_meta:
        return None
    return (weight, bias, transposed) if weight.is_floating_point() else None


@contextmanager
def hooked(target: nn.Module, hooks: Mapping[Site, Hook], *, once: bool = False) -> Iterator[Counter[str]]:
    """Runs a hook before each site's projection; removes them all at the end, whatever happens.

    Inside, code that ``torch.compile`` made runs as plain Python, since compiled code ignores the hooks. With gradient
    checkpointing, a backward pass inside recomputes with the hooks. Yields how often each path has run.

    Raises:
        SiteError: if a checkpointed pass was not recomputed inside; or, with ``once``, if the sites did not run exactly
            as often as in one forward pass.
    """
    modules: dict[str, dict[int, Site]] = {}
    for site in hooks:
        modules.setdefault(site.path, {})[site.use] = site
    runs = Counter[tuple[str, int]]()  # in each thread
    ran, owed = Counter[str](), Counter[str]()  # owed: runs that a backward pass will repeat
    differentiable = torch.is_grad_enabled()

    def before(path: str, uses: Mapping[int, Site], of: int, module: nn.Module, inputs: Any, named: Any) -> Any:
        repeats = _repeats() if differentiable else None
        if repeats is not None:
            owed[path] += -1 if repeats else 1
        if repeats and of > 1:
            raise SiteError(
                f"{path} runs {of} times in a pass, which gradient checkpointing can't tell apart when it recomputes "
                "them: turn it off while the target is ablated"
            )
        if not repeats:
            ran[path] += 1
            runs[path, get_ident()] += 1
        site = uses.get((runs[path, get_ident()] - 1) % of)
        if site is None:
            return None
        if inputs:
            changed = hooks[site](inputs[0])
            return None if changed is None else ((changed, *inputs[1:]), named)
        name = next(iter(named))
        changed = hooks[site](named[name])
        return None if changed is None else (inputs, {**named, name: changed})

    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(unfused(target.modules()))
        for path, uses in modules.items():
            hook = partial(before, path, uses, next(iter(uses.values())).uses)
            stack.callback(target.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield ran
    if late := [path for path, count in owed.items() if count > 0]:
        raise SiteError(
            f"{late[0]} ran under gradient checkpointing, and its backward pass hasn't run yet: outside this block it "
            "would recompute without the ablation; call backward() inside, or turn checkpointing off"
        )
    for site in hooks if once else ():
        if (count := runs[site.path, get_ident()]) != site.uses:
            raise SiteError(
                f"the site {site.name} ran {count} times in one forward pass, expected {site.uses} as in the first "
                "batch: `evaluate` must run the target once, in the same way for every batch"
            )


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
