"""Where a target is read and changed: the inputs of its attention output projections."""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from lightning_ablate.errors import SiteError

_ATTENTION = re.compile(r"(^|\.)[a-z_]*(attn|attention)[a-z_]*(\.|$)", re.IGNORECASE)
_OUTPUT_PROJECTION = re.compile(r"\.(o_proj|out_proj|c_proj|proj|dense|out_lin|wo|o|output\.dense)$")


@dataclass(frozen=True)
class Site:
    """A place whose input is read and replaced.

    Attributes:
        name: path of the projection module in the target.
        width: number of neurons, the features of the projection's input (n_heads x head_dim).
    """

    name: str
    width: int


def find_sites(target: nn.Module, patterns: Sequence[str] = ()) -> list[Site]:
    """The sites of a target, in the order of its modules.

    Args:
        target: the model under study.
        patterns: shell-style patterns of module paths (``"*.0.attn.c_proj"``); empty means every attention output
            projection that can be told by its path.

    Raises:
        SiteError: if nothing matches, a pattern matches nothing, or what matches isn't a projection.

    Example:
        >>> from torch import nn
        >>> target = nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(4, 24), "out_proj": nn.Linear(8, 4)})})
        >>> find_sites(target)
        [Site(name='attn.out_proj', width=8)]
    """
    names = [name for name, _ in target.named_modules()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise SiteError(
                f"the site pattern {pattern!r} matches no module; the target's projections are {_candidates(target)}"
            )
    chosen = (
        [name for name in names if any(fnmatchcase(name, p) for p in patterns)]
        if patterns
        else _attention_outputs(target)
    )
    if not chosen:
        raise SiteError(
            "found no attention output projection in the target; name the sites with a pattern (--ablation.sites); "
            f"its projections are {_candidates(target)}"
        )
    return [Site(name, _width(name, target.get_submodule(name))) for name in chosen]


def fingerprint(target: nn.Module) -> str:
    """SHA-256, in hexadecimal, of what makes a target: its modules' classes and whole numbers, parameters and buffers.

    The whole numbers are there because the same weights with another number of heads are another target.
    """
    digest = hashlib.sha256()
    for name, module in target.named_modules():
        numbers = sorted((key, value) for key, value in vars(module).items() if type(value) is int)
        digest.update(f"{name} {type(module).__name__} {numbers};".encode())
    for name, tensor in sorted({**target.state_dict(), **dict(target.named_buffers())}.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


@contextmanager
def hooked(target: nn.Module, sites: Sequence[Site], hook: Callable[[Site, Tensor], Tensor | None]) -> Iterator[None]:
    """Calls ``hook(site, activations)`` before each site's projection runs; leaves no hook behind, whatever happens.

    Args:
        target: the model the sites are in.
        sites: where to hook.
        hook: gets the projection's input, ``(batch, ..., neurons)``; what it returns, unless None, is used instead.
    """

    def before(site: Site) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]:
        def pre_hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            changed = hook(site, inputs[0])
            return None if changed is None else (changed, *inputs[1:])

        return pre_hook

    with ExitStack() as stack:
        for site in sites:
            handle = target.get_submodule(site.name).register_forward_pre_hook(before(site))
            stack.callback(handle.remove)
        yield


def _attention_outputs(target: nn.Module) -> list[str]:
    def is_output(name: str) -> bool:
        match = _OUTPUT_PROJECTION.search(name)
        return match is not None and _ATTENTION.search(name[: match.start() + 1]) is not None

    return [name for name, module in target.named_modules() if is_output(name) and _features(module) is not None]


def _features(module: nn.Module) -> int | None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or isinstance(module, nn.Embedding):
        return None
    # transformers' Conv1D keeps its weight as (inputs, outputs), every other projection as (outputs, inputs)
    return getattr(module, "in_features", None) or weight.shape[0 if hasattr(module, "nx") else 1]


def _width(name: str, module: nn.Module) -> int:
    width = _features(module)
    if width is None:
        raise SiteError(
            f"the site {name!r} is a {type(module).__name__}, which is no projection; a site is a linear module"
        )
    return width


def _candidates(target: nn.Module) -> str:
    found = [f"{name} ({width})" for name, module in target.named_modules() if (width := _features(module)) is not None]
    shown = ", ".join(found[:12]) + (f" and {len(found) - 12} more" if len(found) > 12 else "")
    return shown or "none"
