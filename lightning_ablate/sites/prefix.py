"""What the intact pass of a batch returned, for passes that change nothing until a later place."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_ablate.sites.experts import replaced
from lightning_ablate.sites.site import Site, series_of

_PLAIN = (Tensor, bool, int, float, str, type(None))


class _Kept(NamedTuple):
    output: Any  # of a block
    after: int  # how many sites had run when the block ended
    nbytes: int


class Prefix:
    """Answers blocks of a target with what they returned in the intact pass of the same batch.

    A pass whose first ablated site is the one at place ``first`` repeats the intact pass until that site runs. Blocks
    that end before it return copies of what they did then. So the results are the same to the bit, unless a block hands
    on more than it returns, see :meth:`prove`. Blocks are the numbered modules around sites (``h.3``) and their
    siblings. One that runs several times in a pass, or returns anything but tensors and plain values, always runs.

    Args:
        target: the model.
        sites: its sites, in the order in which they run.
        last: the largest ``first`` of all passes to come.
        room: how many bytes may be held.
    """

    def __init__(self, target: nn.Module, sites: Sequence[Site], last: int, room: float) -> None:
        self._last, self._room, paths = last, room, [site.path for site in sites]
        # what ends after all these passes begin, or holds a use of a module that is counted by its runs
        late = {name for path in paths[last:] for name in _within(path)}
        late |= {name for site in sites if site.uses > 1 for name in _within(site.path)}
        self._modules = {name: target.get_submodule(name) for name in blocks_of(target, sites) if name not in late}
        self._sites = [(target.get_submodule(site.path), site) for site in sites]
        self._kept: dict[str, _Kept] = {}
        self._proven = set[str]()

    @property
    def unproven(self) -> bool:
        """Whether a block is kept that :meth:`prove` hasn't seen."""
        return not self._kept.keys() <= self._proven

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keeps what the blocks return in the one intact pass inside."""
        self._kept, room, runs, begun, began = {}, self._room, Counter[str](), 0, Counter[Site]()

        def begins(site: Site, *_: Any) -> None:
            nonlocal begun
            begun += began[site] == site.use  # at its own use of the module
            began[site] += 1

        def ends(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
            nonlocal room
            runs[name] += 1
            leaves = tree_leaves(output)
            size = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
            if begun <= self._last and size <= room and all(isinstance(leaf, _PLAIN) for leaf in leaves):
                for inner in [one for one in self._kept if one.startswith(f"{name}.")]:
                    if self._kept[inner].after == begun:  # whenever it is answered, the block around it is
                        room += self._kept.pop(inner).nbytes
                room -= size
                self._kept[name] = _Kept(_copy(output), begun, size)

        with ExitStack() as stack:
            # a block that is a site itself is kept before that counts, as its answer is what is changed
            for name, module in self._modules.items():
                stack.callback(module.register_forward_hook(partial(ends, name)).remove)
            for module, site in self._sites if self._modules else ():
                reads = site.side == "input"
                hook = module.register_forward_pre_hook if reads else module.register_forward_hook
                stack.callback(hook(partial(begins, site)).remove)
            yield
        self._kept = {name: kept for name, kept in self._kept.items() if runs[name] == 1}

    @contextmanager
    def reused(self, first: int) -> Iterator[None]:
        """Answers, in the pass inside, the blocks that ended before the site at place ``first`` ran.

        What other blocks returned is let go, so passes come in descending order of ``first``.
        """
        self._kept = {name: kept for name, kept in self._kept.items() if kept.after <= first}
        with ExitStack() as stack:
            for name, kept in self._kept.items():
                stack.enter_context(replaced(self._modules[name], partial(_answer, kept.output)))
            yield

    def prove(self, intact: Callable[[], bool]) -> None:
        """Answers no block any more if one hands on more than it returns.

        ``intact`` makes an intact pass, in which all blocks that are kept are answered, and tells whether it is the
        same to the bit. Then each block is run alone on what it was given there, the last one first: so none finds
        what an earlier one would have left in another way. Each must return what it returned in the whole pass.
        """
        if self._is_exact(intact):
            self._proven |= self._kept.keys()
        else:
            self._kept, self._modules = {}, {}

    def _is_exact(self, intact: Callable[[], bool]) -> bool:
        given = dict[str, tuple[Any, Any]]()

        def answer(name: str, *args: Any, **named: Any) -> Any:
            given[name] = args, named
            return _copy(self._kept[name].output)

        with ExitStack() as stack:
            answering = {name: stack.enter_context(ExitStack()) for name in self._kept}
            for name, own in answering.items():
                own.enter_context(replaced(self._modules[name], partial(answer, name)))
            try:
                same = intact()
                for name in reversed(self._kept) if same else ():  # a block comes before those within it
                    answering[name].close()
                    args, named = given[name]
                    same = same and _equal(self._modules[name](*args, **named), self._kept[name].output)
            except Exception:  # a block may need what an earlier one leaves, and miss it in any way
                return False
        return same


def blocks_of(target: nn.Module, sites: Iterable[Site]) -> list[str]:
    """The paths of the numbered modules around sites, such as ``h.3``, and of the modules numbered beside them."""
    around = {series_of(name) for site in sites for name in _within(site.path)} - {None}
    return [name for name, _ in target.named_modules() if series_of(name) in around]


def left_of(target: nn.Module, sites: Sequence[Site]) -> list[float]:
    """For each site, about how much of a pass is left if that is the first one ablated: 0 to 1, by parameters."""
    blocks = blocks_of(target, sites)
    outermost = {name for name in blocks if not {*_within(name)[:-1]} & {*blocks}}
    ends = {name: place for place, site in enumerate(sites) for name in _within(site.path) if name in outermost}
    sizes = {name: sum(own.numel() for own in target.get_submodule(name).parameters()) for name in ends}
    whole = max(1, sum(own.numel() for own in target.parameters()))
    before = [sum(size for name, size in sizes.items() if ends[name] < place) for place in range(len(sites))]
    return [1 - size / whole for size in before]


def _within(path: str) -> list[str]:
    """The paths of the modules around a module, outermost first, and its own."""
    parts = path.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _copy(output: Any) -> Any:
    return tree_map_only(Tensor, torch.clone, output)  # as a target may write into it


def _answer(output: Any, *_: Any, **__: Any) -> Any:
    return _copy(output)


def _equal(one: Any, other: Any) -> bool:
    pairs = [*zip_longest(tree_leaves(one), tree_leaves(other))]
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b for a, b in pairs
    )
