"""Places of a target whose input is read and replaced."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_ablate.errors import SiteError

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


@contextmanager
def hooked(target: nn.Module, hooks: Mapping[Site, Hook], *, once: bool = False) -> Iterator[None]:
    """Runs a hook before each site's projection; leaves none behind, whatever happens.

    Args:
        target: the model the sites are in.
        hooks: by site.
        once: whether a single forward pass is expected inside.

    Raises:
        SiteError: if ``once``, and a site did not run, or ran more than once.

    Example:
        >>> import torch
        >>> target = nn.Sequential(nn.Identity(), nn.Linear(2, 1, bias=False))
        >>> with hooked(target, {Site("1", 2): torch.zeros_like}), torch.no_grad():
        ...     target(torch.ones(1, 2))
        tensor([[0.]])
    """
    modules: dict[str, dict[int, Site]] = {}
    for site in hooks:
        modules.setdefault(site.path, {})[site.use] = site
    runs = dict.fromkeys(modules, 0)

    def before(path: str, uses: Mapping[int, Site], of: int) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
        def pre_hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            site = uses.get(runs[path] % of)
            runs[path] += 1
            changed = None if site is None else hooks[site](inputs[0])
            return None if changed is None else (changed, *inputs[1:])

        return pre_hook

    with ExitStack() as stack:
        for path, uses in modules.items():
            pre_hook = before(path, uses, next(iter(uses.values())).uses)
            stack.callback(target.get_submodule(path).register_forward_pre_hook(pre_hook).remove)
        yield
    for site in hooks if once else ():
        if runs[site.path] != site.uses:
            raise SiteError(
                f"the site {site.name} ran {runs[site.path]} times in one forward pass, expected {site.uses}, as when "
                "the sites were found: `evaluate` must run the target once, in the same way for every batch, and not "
                "compiled by torch.compile before"
            )
