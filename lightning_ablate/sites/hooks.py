"""Reads and replaces the activations of sites while a target runs."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from lightning_ablate.errors import SiteError
from lightning_ablate.sites.experts import Look, opened
from lightning_ablate.sites.site import Site
from lightning_ablate.sites.unfused import unfused

Hook = Callable[[Tensor], Tensor | None]
"""From a site's activations ``(batch, ..., neurons)`` to those to use instead; None leaves them."""


@contextmanager
def hooked(
    target: nn.Module,
    hooks: Mapping[Site, Hook],
    *,
    once: bool = False,
    routed: dict[Site, Tensor] | None = None,
) -> Iterator[Counter[Site]]:
    """Runs a hook on the activations of each site; removes them all at the end, whatever happens.

    Neurons of an expert are 0 where a position isn't routed to it, and what a hook puts there isn't used. Before the
    hook runs, ``routed[site]`` is set to the routed positions, ``(batch, seq)`` bool. A hook with ``of_router`` gets
    the expert's scores in the router, ``(batch, seq, 1)``, instead of its neurons.

    Inside, code that ``torch.compile`` made runs as plain Python, since compiled code ignores the hooks. With gradient
    checkpointing, a backward pass inside recomputes with the hooks. Yields how often each site has run.

    Raises:
        SiteError: if a checkpointed pass was not recomputed inside; or, with ``once``, if the sites did not run exactly
            as often as in one forward pass.
    """
    modules: dict[tuple[str, str], dict[int, list[Site]]] = {}
    for site in hooks:
        modules.setdefault((site.path, site.end), {}).setdefault(site.use, []).append(site)
    runs = Counter[tuple[str, str, int]]()  # in each thread
    ran, owed = Counter[Site](), Counter[str]()  # owed: runs that a backward pass will repeat
    differentiable = torch.is_grad_enabled()

    def due(path: str, end: str, uses: Mapping[int, list[Site]], of: int) -> list[Site]:
        """The sites of this run of a module, which is counted."""
        repeats = _repeats() if differentiable else None
        if repeats is not None:
            owed[path] += -1 if repeats else 1
        if repeats and of > 1:
            raise SiteError(
                f"{path} runs {of} times in a pass, and gradient checkpointing can't tell these runs apart: turn "
                "checkpointing off while the target is ablated"
            )
        key = path, end, get_ident()
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
        for (path, end), uses in modules.items():
            given = path, end, uses, next(iter(uses.values()))[0].uses
            module = target.get_submodule(path)
            if end == "input":
                stack.callback(module.register_forward_pre_hook(partial(before, given), with_kwargs=True).remove)
            elif end == "inside":
                look = partial(_Changes, hooks, partial(due, *given), {} if routed is None else routed)
                stack.enter_context(opened(target, path, look))
            else:
                stack.callback(module.register_forward_hook(partial(after, given)).remove)
        yield ran
    if late := [path for path, count in owed.items() if count > 0]:
        raise SiteError(
            f"{late[0]} ran under gradient checkpointing, and its backward pass hasn't run yet: outside this block it "
            "would recompute without the ablation; call backward() inside, or turn checkpointing off"
        )
    for site in hooks if once else ():
        if (count := runs[site.path, site.end, get_ident()]) != site.uses:
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


class _Changes(Look):
    """Runs hooks on experts; ``due`` counts a run of theirs and gives the sites that it is."""

    def __init__(
        self,
        hooks: Mapping[Site, Hook],
        due: Callable[[], list[Site]],
        routed: dict[Site, Tensor],
        states: Tensor,
    ) -> None:
        sites = due()
        self._path = sites[0].path if sites else "a module of experts"
        if states.ndim < 3:
            raise SiteError(
                f"the module around {self._path} gets {tuple(states.shape)}, expected hidden states (batch, seq, "
                "features), from which positions are known"
            )
        self._hooks, self._routed, self._shape = hooks, routed, states.shape[:-1]
        self._nothing = states.flatten(0, -2)[:0], torch.zeros(0, dtype=torch.int64, device=states.device)
        self._left = {site.expert: site for site in sites}
        of_router = [site for site in self._left.values() if getattr(hooks[site], "of_router", False)]
        self._of_router = [self._left.pop(site.expert) for site in of_router]
        self.routes, self._seen = bool(of_router), set[int]()

    def neurons(self, expert: int, own: Tensor, places: Tensor) -> Tensor:
        site, again = self._left.pop(expert, None), expert in self._seen
        self._seen.add(expert)
        if len(places) != len(own) or again:
            raise SiteError(
                f"expert {expert} of {self._path} can't be read: its tokens aren't taken from the hidden states by an "
                "index, or several products could have its neurons; leave it out"
            )
        return own if site is None else self._changed(site, own, places)

    def scores(self, own: Tensor) -> Tensor:
        columns = list(own.unbind(1))
        for site in self._of_router:
            number = site.expert or 0
            changed = self._hooks[site](columns[number].view(*self._shape, 1))
            columns[number] = columns[number] if changed is None else changed.reshape(-1)
        return torch.stack(columns, 1)

    def end(self) -> None:
        """Runs the hooks of experts to which nothing was routed."""
        if self._left and not self._seen and self._shape.numel():
            raise SiteError(
                f"no expert of {self._path} was seen, expected each to multiply by its own matrix (weight[expert]); "
                "they can't be ablated"
            )
        for site in self._left.values():
            states, places = self._nothing
            self._changed(site, states.new_zeros(0, site.width), places)

    def _changed(self, site: Site, own: Tensor, places: Tensor) -> Tensor:
        count = self._shape.numel()
        routed = torch.zeros(count, dtype=torch.bool, device=own.device).index_fill(0, places, True)
        self._routed[site] = routed.view(self._shape)
        whole = own.new_zeros(count, own.shape[1]).index_copy(0, places, own)
        changed = _changed(site, self._hooks[site], whole.view(*self._shape, -1))
        return changed.reshape(count, -1)[places]


def keep(found: dict[Site, Tensor], site: Site, activations: Tensor) -> None:
    """Puts a copy of the activations of a site into ``found``; a hook once the first two arguments are given."""
    found[site] = activations.clone()


def _repeats() -> bool | None:
    """True while gradient checkpointing recomputes a pass, False in a pass that it will recompute, else None."""
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
