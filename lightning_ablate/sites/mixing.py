"""Whether attention alone mixes the positions of a target, and which layers mix them in other ways."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ablate.errors import SiteError
from lightning_ablate.sites.hooks import first_of, hooked
from lightning_ablate.sites.prefix import blocks_of
from lightning_ablate.sites.site import Site, exact_device


class MixingError(SiteError):
    """Something beside attention mixes positions."""


def check_mixing(target: nn.Module, sites: Sequence[Site], hidden: Callable[[int], Sequence[Tensor]]) -> None:
    """Raises MixingError if a target mixes positions other than by these attention sites.

    While they are all 0, changing one token or pixel may change the hidden state of its own position only. ``hidden``
    runs the target on input 0 or 1, which differ in one token or pixel. It gives the last hidden states, each
    ``(1, ..., features)``.
    """
    with torch.no_grad(), hooked(target, dict.fromkeys(sites, torch.zeros_like)):
        states = hidden(0), hidden(1)
    for before, after in zip(*states, strict=True):
        moved, count = _moved(before, after)
        if count < 2:
            raise SiteError(
                "the last hidden state has a single position, so it can't show whether only attention mixes positions; "
                "name the sites by a pattern (--ablation.sites)"
            )
        if moved > 1:
            raise MixingError(
                f"one changed place moves the last hidden state at {moved} of {count} positions although every "
                "attention site is constant: the target also mixes positions by other ways (convolution, pooling, "
                "a state space, linear attention); to study these sites, name them by a pattern (--ablation.sites), or "
                "leave out --ablation.strict"
            )


def other_mixing(target: nn.Module, sites: Sequence[Site], hidden: Callable[[int], Sequence[Tensor]]) -> str:
    """How many layers of a target mix positions other than by these attention sites: ``18 of 24 layers``.

    While all sites are 0, each layer is run again on what it was given, once as it was and once with another first
    position. If what it returns moves anywhere else, it mixes. Layers are the modules numbered beside those with sites.
    """
    blocks, given = blocks_of(target, sites), dict[str, tuple[Any, Any]]()
    blocks = [name for name in blocks if not any(name.startswith(f"{other}.") for other in blocks)]

    def keep(name: str, module: nn.Module, inputs: Any, named: Any) -> None:
        given[name] = deepcopy((inputs, named))  # a cache among them changes

    with torch.no_grad(), hooked(target, dict.fromkeys(sites, torch.zeros_like)):
        with ExitStack() as stack:
            for name in blocks:
                hook = target.get_submodule(name).register_forward_pre_hook(partial(keep, name), with_kwargs=True)
                stack.callback(hook.remove)
            hidden(0)
        mixing = sum(_mixes(target.get_submodule(name), *given[name]) for name in given)
    return f"{mixing} of {len(given)} layers" if mixing else "outside of its layers"


def _mixes(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether another first position moves others; also where a layer can't be run by itself."""
    try:
        name = None if inputs else next(iter(named))
        read = inputs[0] if name is None else named[name]
        other = read.clone().flatten(1, -2)
        other[:, 0] = other[:, 0].flip(-1) + 1
        other = other.view(read.shape)
        changed = ((other, *inputs[1:]), named) if name is None else (inputs, {**named, name: other})
        before, after = (first_of(layer(*args, **more)) for args, more in map(deepcopy, ((inputs, named), changed)))
    except Exception:  # it may need what the target keeps while it runs
        return True
    return before is None or after is None or _moved(before, after)[0] > 1


def _moved(before: Tensor, after: Tensor) -> tuple[int, int]:
    """At how many positions a state ``(batch, ..., features)`` moved, and of how many."""
    tolerance, limit = torch.finfo(before.dtype).eps ** 0.5, torch.finfo(before.dtype).max / 2
    before, after = (state.to(exact_device(state.device)).flatten(0, -2) for state in (before, after))
    # masked features are -inf or the least number
    before, after = (torch.where(state.abs() < limit, state, 0).double() for state in (before, after))
    change = (after - before).abs().amax(1)
    return int((change > tolerance * before.abs().max()).sum()), len(change)
