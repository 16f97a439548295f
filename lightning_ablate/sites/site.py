"""Places of a target whose input is read and replaced."""

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
"""Gets a site's activations ``(batch, ..., neurons)``; what it returns, unless None, is used instead."""
T = TypeVar("T")


@dataclass(frozen=True)
class Site:
    """A place whose input is read and replaced.

    Attributes:
        name: path of the projection module in the target; ``path#0``, ``path#1`` ... where it runs several times.
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


def given_for(site: Site, given: Mapping[str, T]) -> T | None:
    """What a mapping holds for a site by its name, or by its path, which stands for all uses of a module."""
    return given.get(site.name, given.get(site.path))


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


def device_of(target: nn.Module) -> torch.device:
    """The device of a target's first parameter; the CPU where it is on ``meta``, as of a target that is offloaded."""
    device = next(target.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def exact_device(device: torch.device) -> torch.device:
    """Where sums in float64 are kept: the device itself, or the CPU if the device has no float64, as Apple's MPS.

    Values are moved to the exact device before they become float64, and become float32 before they are moved back.
    """
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def weights_of(target: nn.Module, site: Site) -> tuple[Tensor, Tensor | None, bool] | None:
    """The weight and bias of the projection that reads a site, and whether the weight is ``(neurons, outputs)``.

    None where others can't take their place: for a module that runs several times, a quantised, sharded or offloaded
    one, or one that is more than a matrix and a bias.
    """
    module = target.get_submodule(site.path)
    kind, weight, bias = type(module), getattr(module, "weight", None), getattr(module, "bias", None)
    linear, transposed = kind is nn.Linear, (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")
    if site.uses > 1 or not (linear or transposed) or "weight" not in module._parameters:
        return None
    if not isinstance(weight, Tensor) or isinstance(weight, DTensor) or weight.is_meta:
        return None
    if not weight.is_floating_point():
        return None
    return weight, bias, transposed


@contextmanager
def hooked(target: nn.Module, hooks: Mapping[Site, Hook], *, once: bool = False) -> Iterator[Counter[str]]:
    """Runs a hook before each site's projection; leaves none behind, whatever happens.

    Inside, code that ``torch.compile`` made runs as plain Python, since compiled code would pass the hooks by. Gradient
    checkpointing is followed: a backward pass inside recomputes with the hooks. Yields how often each path has run.

    Raises:
        SiteError: with ``once``, which expects a single forward pass inside, if a site did not run in it, or too often;
            or if a checkpointed pass was not recomputed inside.
    """
    modules: dict[str, dict[int, Site]] = {}
    for site in hooks:
        modules.setdefault(site.path, {})[site.use] = site
    runs = Counter[tuple[str, int]]()  # of each thread, in which passes can go side by side
    ran, owed = Counter[str](), Counter[str]()  # owed: runs that a backward pass will repeat
    differentiable = torch.is_grad_enabled()

    def before(path: str, uses: Mapping[int, Site], of: int, module: nn.Module, inputs: Any, named: Any) -> Any:
        repeats = _repeats() if differentiable else None
        if repeats is not None:
            owed[path] += -1 if repeats else 1
        if repeats and of > 1:
            raise SiteError(
                f"{path} runs {of} times in a pass, so gradient checkpointing, which recomputes its runs, can't tell "
                "them apart: turn it off while the target is ablated"
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
                f"the site {site.name} ran {count} times in one forward pass, expected {site.uses}, as when "
                "the sites were found: `evaluate` must run the target once, in the same way for every batch"
            )


def _repeats() -> bool | None:
    """Whether gradient checkpointing runs this again in a backward pass, or will; None where it does neither."""
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
