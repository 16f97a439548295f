"""Experts of a mixture that share one module, whose weights are tensors with a matrix for each expert."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_ablate.errors import SiteError
from lightning_ablate.sites.site import Site

_PRODUCTS = {"linear", "matmul", "__matmul__"}


class Look:
    """What is seen and changed in one run of experts; by default nothing is."""

    routes = False  # whether it changes what the router chooses

    def neurons(self, expert: int, own: Tensor, places: Tensor) -> Tensor:
        """New neurons ``(routed, neurons)`` for those of an expert, whose tokens are at these places ``(routed,)``."""
        return own

    def scores(self, own: Tensor) -> Tensor:
        """New scores for those by which the router chooses, ``(tokens, experts)``."""
        return own

    def end(self) -> None:
        """The experts have run."""


def experts_of(module: nn.Module) -> int | None:
    """How many experts a module holds; None if it can't be such a module.

    It has two weights ``(experts, ..., ...)`` or more. Its forward takes the hidden states ``(tokens, features)``, the
    numbers of the experts that each token goes to, and their shares.
    """
    counts = [len(own) for own in module._parameters.values() if own is not None and own.ndim == 3]
    if len(counts) < 2 or len({*counts}) > 1:
        return None
    takes = len(inspect.signature(type(module).forward).parameters)  # and the module
    return counts[0] if takes == 4 else None


@contextmanager
def one_by_one(target: nn.Module, sites: Iterable[Site]) -> Iterator[None]:
    """Experts run one by one inside, as where sites among them are read: other implementations round otherwise."""
    modules = [target.get_submodule(path) for path in {site.path for site in sites if site.expert is not None}]
    found: dict[int, Any] = {id(config): config for config in (getattr(one, "config", None) for one in modules)}
    chosen = [(one, one._experts_implementation) for one in found.values() if hasattr(one, "_experts_implementation")]
    for config, _ in chosen:
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        for config, own in chosen:
            config._experts_implementation = own


@contextmanager
def opened(target: nn.Module, path: str, look: Callable[[Tensor], Look]) -> Iterator[None]:
    """Sees and changes what is inside a module of experts, while the target runs in the context.

    Experts run one after the other, as in transformers' ``eager`` implementation, whichever is chosen. ``look`` gives a
    Look for each run of the module around them, from its hidden states ``(batch, seq, features)``.

    Raises:
        SiteError: while the target runs, if a Look has ``routes`` and the router doesn't choose by ``topk``, or has too
            few experts left; or if the experts run without the module around them.
    """
    module, around = target.get_submodule(path), target.get_submodule(path.rpartition(".")[0])
    whole, looks = around.forward, list[Look]()

    def run_block(*args: Any, **named: Any) -> Any:
        states = next(one for one in (*args, *named.values()) if isinstance(one, Tensor))
        looks.append(own := look(states))
        router = _Router(experts_of(module) or 0, own)
        with router if own.routes else ExitStack():
            output = whole(*args, **named)
        if own.routes and not router.chose:
            raise SiteError(f"the router of {path} doesn't choose by the largest scores (topk); leave `reroute` out")
        looks.pop().end()
        return output

    def current() -> Look:
        if not looks:
            raise SiteError(f"{path} ran by itself, expected within the module around it, whose router chooses experts")
        return looks[-1]

    with replaced(around, run_block), _watched(module, current):
        yield


@contextmanager
def _watched(module: nn.Module, look: Callable[[], Look]) -> Iterator[None]:
    """Runs a module's experts one by one, under the look of each run."""
    eager, offloaded = _eager(type(module).forward), getattr(module, "_hf_hook", None)

    def run(*args: Any, **named: Any) -> Any:
        if offloaded is not None:  # accelerate puts the weights in place
            args, named = offloaded.pre_forward(module, *args, **named)
        with _Experts(module, next(iter((*args, *named.values())), None), look()):
            output = eager(module, *args, **named)
        return output if offloaded is None else offloaded.post_forward(module, output)

    with replaced(module, run):
        yield


def _eager(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward function beneath transformers' choice of an implementation."""
    chooses = getattr(forward, "__globals__", {}).get("__name__") == "transformers.integrations.moe"
    return inspect.unwrap(forward) if chooses else forward


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward function for a module."""
    own = vars(module).get("forward")  # accelerate's, for example
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def seen_experts(target: nn.Module) -> Iterator[dict[str, tuple[int, int]]]:
    """Notes the modules of experts that run: path → how many experts, and how many neurons each has."""
    found: dict[str, tuple[int, int]] = {}
    with ExitStack() as stack:
        for path, module in target.named_modules():
            if path and (count := experts_of(module)) is not None:
                stack.enter_context(_watched(module, partial(_Note, found, path, count)))
        yield found


class _Note(Look):
    def __init__(self, found: dict[str, tuple[int, int]], path: str, count: int) -> None:
        self._found, self._path, self._count = found, path, count
        self._seen, self._readable = set[int](), True

    def neurons(self, expert: int, own: Tensor, places: Tensor) -> Tensor:
        # an expert has its neurons once in a run, or which ones they are isn't known
        self._readable &= expert not in self._seen and len(places) == len(own)
        self._seen.add(expert)
        if self._readable:
            self._found[self._path] = self._count, own.shape[1]
        else:
            self._found.pop(self._path, None)
        return own


class _Experts(TorchFunctionMode):
    """Finds the neurons of each expert: the input of its last matrix, not of those that read the tokens."""

    def __init__(self, module: nn.Module, hidden: Any, look: Look) -> None:
        super().__init__()
        self._weights = [own for own in module._parameters.values() if own is not None and own.ndim == 3]
        self._hidden, self._look = hidden, look
        self._matrices: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()  # an expert's matrix → its number
        self._tokens: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()  # an expert's tokens → their indices
        self._places = torch.zeros(0, dtype=torch.int64)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        if not args or not isinstance(first := args[0], Tensor):
            return func(*args, **kwargs)
        product = name in _PRODUCTS and len(args) > 1
        if product and args[1] in self._matrices and first not in self._tokens:
            args = (self._look.neurons(self._matrices[args[1]], first, self._places), *args[1:])
        output = func(*args, **kwargs)
        if name == "__getitem__" and any(first is own for own in self._weights):
            if isinstance(args[1], int) or (isinstance(args[1], Tensor) and not args[1].ndim):
                self._matrices[output] = int(args[1])
        elif name == "__getitem__" and first is self._hidden and isinstance(args[1], Tensor):
            self._tokens[output] = self._places = args[1]
        elif isinstance(output, Tensor) and not product:  # a cast, or a scale
            if output.shape == first.shape and first in self._matrices:
                self._matrices[output] = self._matrices[first]
            if output.shape == first.shape and first in self._tokens:
                self._tokens[output] = self._tokens[first]
        return output


class _Router(TorchFunctionMode):
    """Changes the scores from which ``topk`` chooses a token's experts."""

    def __init__(self, experts: int, look: Look) -> None:
        super().__init__()
        self._experts, self._look, self.chose = experts, look, False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        # a topk over groups of experts has another width, and stays as it is
        if getattr(func, "__name__", "") == "topk" and args and args[0].shape[-1:] == (self._experts,):
            changed = self._look.scores(args[0].reshape(-1, self._experts))
            count = args[1] if len(args) > 1 else kwargs["k"]
            left = int((changed > -torch.inf).sum(1).min())
            if left < count:
                raise SiteError(f"a router has {left} experts left and chooses {count}; reroute fewer experts")
            args, self.chose = (changed.reshape(args[0].shape), *args[1:]), True
        return func(*args, **kwargs)
