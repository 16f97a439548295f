"""Follows the data through one forward pass, to see which projections read what attention and the MLPs made."""

import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")
_ByTensor = MutableMapping[Tensor, T]

_PRODUCTS = {"matmul", "__matmul__", "bmm", "baddbmm", "einsum"}
_PROJECTIONS = {"linear", "addmm", "mm", "conv1d", "conv2d", "conv3d", "embedding", "bilinear"}
# move numbers without changing them: what they do to the activations, they do to the labels
_MOVES = set(
    "__getitem__ T cat chunk clone concat contiguous expand flatten flip hstack index_select mT movedim "
    "moveaxis narrow permute repeat repeat_interleave reshape reshape_as roll select split "
    "split_with_sizes squeeze stack swapaxes swapdims t tensor_split transpose unbind unflatten unfold "
    "unsqueeze view view_as vstack".split()
)
_NONLINEAR = set(
    "__pow__ celu clamp clamp_min elu erf exp expm1 gelu glu hardsigmoid hardswish hardtanh leaky_relu "
    "log1p logsigmoid mish pow prelu relu relu6 relu_ rrelu selu sigmoid sigmoid_ silu silu_ softplus "
    "softsign square swiglu tanh tanh_ threshold".split()
)
_SUMS = {"add", "__add__", "__radd__", "add_", "__iadd__", "sub", "__sub__"}
_ROWS = 1024


@dataclass(frozen=True)
class Read:
    """A projection that ran.

    Attributes:
        path: of the module.
        width: features of its input.
        positions: how many positions it read: the elements of its input by its width.
        made_by: ``attention`` or ``mlp``, by what its input came from; empty for anything else.
        heads: of attention, if the input holds them side by side in pieces of equal size; else None.
    """

    path: str
    width: int
    positions: int
    made_by: str
    heads: int | None = None


class Trace(NamedTuple):
    """What one forward pass showed.

    Attributes:
        reads: every projection that ran, in order.
        lost: the modules in which attention ran whose output no projection read.
    """

    reads: list[Read]
    lost: list[str]


def features(module: nn.Module) -> int | None:
    """The number of features a projection reads; None for a module that is no projection."""
    width = getattr(module, "in_features", None)
    if isinstance(width, int) and isinstance(getattr(module, "out_features", None), int):
        return width
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or isinstance(module, nn.Embedding):
        return None
    # transformers' Conv1D keeps its weight as (inputs, outputs), every other projection as (outputs, inputs)
    return weight.shape[0 if hasattr(module, "nx") else 1]


def trace(target: nn.Module, run: Callable[[], object]) -> Trace:
    """Runs one forward pass and tells what its projections read.

    What attention makes (the weighted sum of the values, by ``scaled_dot_product_attention`` or by a softmax and a
    product) is followed, with a label for every position of every head, through all that moves or scales it, to the
    projection that reads it. What an MLP makes is a projection's output behind a nonlinearity.

    Args:
        target: the model.
        run: runs it on anything, without gradients.
    """
    tracer = _Tracer()
    with ExitStack() as stack:
        for path, module in target.named_modules():
            stack.callback(module.register_forward_pre_hook(tracer.entering(path)).remove)
            stack.callback(module.register_forward_hook(tracer.leaving, always_call=True).remove)
        stack.enter_context(tracer)
        run()
    return Trace(tracer.reads, [path for call, path in enumerate(tracer.made) if call not in tracer.read])


class _Attended(NamedTuple):
    labels: Tensor  # int64, in the tensor's shape: which position of which head; -1 for what came from elsewhere
    calls: frozenset[int]  # the attention calls it came from


class _Tracer(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.reads: list[Read] = []
        self.made: list[str] = []  # where each attention call ran
        self.read: set[int] = set()  # which of them a projection read
        self._stack: list[tuple[str, bool]] = []  # the modules that are running, and whether they are projections
        self._labels = 0
        # keyed by tensor, and forgotten with it
        self._weights: _ByTensor[bool] = WeakTensorKeyDictionary()  # attention weights
        self._attended: _ByTensor[_Attended] = WeakTensorKeyDictionary()
        self._projected: _ByTensor[bool] = WeakTensorKeyDictionary()  # projections' outputs: behind a nonlinearity?

    def entering(self, path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            projection = features(module) is not None
            outermost = not any(is_projection for _, is_projection in self._stack)
            self._stack.append((path, projection))
            if projection and outermost and inputs and isinstance(inputs[0], Tensor):
                self._read(path, inputs[0])

        return hook

    def leaving(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        _, projection = self._stack.pop()
        if projection and isinstance(output, Tensor) and output not in self._weights:
            self._projected[output] = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name, given = getattr(func, "__name__", ""), list(_tensors([args, kwargs]))
        attended = [entry for tensor in given if (entry := self._attended.get(tensor)) is not None]
        weights = [tensor for tensor in given if tensor in self._weights]
        output = func(*args, **kwargs)
        made = list(_tensors(output))
        if name == "__setitem__":
            self._set(*args)
        elif not made or not given or name == "__get__":
            pass
        elif name == "scaled_dot_product_attention":
            self._label(output, -1)
        elif name in _PRODUCTS and weights:
            self._label(output, _value_axis(args, given, weights[0], output.ndim))
        elif name == "softmax":
            self._weights[output] = True
        elif weights:
            for tensor in made:
                if len(given) == 1 or any(tensor.shape == w.shape for w in weights):
                    self._weights[tensor] = True
        elif name in _PRODUCTS or name in _PROJECTIONS:
            pass
        elif attended:
            self._follow(func, name, args, kwargs, attended, made)
        else:
            self._follow_projected(name, given, made)
        return output

    def _read(self, path: str, activations: Tensor) -> None:
        width = activations.shape[-1]
        entry = self._attended.get(activations)
        made_by = "attention" if entry is not None else "mlp" if self._projected.get(activations) else ""
        heads = None if entry is None else _side_by_side(entry.labels)
        self.read |= frozenset() if entry is None else entry.calls
        self.reads.append(Read(path, width, activations.numel() // max(1, width), made_by, heads))

    def _label(self, output: Tensor, axis: int | None) -> None:
        """Labels an attention output: everything along the axis of a head's values has one label."""
        if axis is None:
            labels = torch.full_like(output, -1, dtype=torch.int64)
        else:
            shape = list(output.shape)
            shape[axis] = 1
            count = output.numel() // max(1, output.shape[axis])
            labels = torch.arange(count, device=output.device) + self._labels
            labels = labels.view(shape).expand(output.shape)
            self._labels += count
        self._attended[output] = _Attended(labels, frozenset([len(self.made)]))
        self.made.append(self._stack[-1][0] if self._stack else "")

    def _follow(
        self, func: Any, name: str, args: Any, kwargs: Any, attended: list[_Attended], made: list[Tensor]
    ) -> None:
        calls = frozenset[int]().union(*(entry.calls for entry in attended))
        if name in _MOVES:
            moved = func(*_mapped(self._labels_of, args), **_mapped(self._labels_of, kwargs))
            labels = list(_tensors(moved))
        else:
            same = {entry.labels.shape: entry.labels for entry in reversed(attended)}
            labels = [same.get(tensor.shape, tensor) for tensor in made]
        for tensor, label in zip(made, labels, strict=True):
            if label is not tensor and tensor.is_floating_point():
                self._attended[tensor] = _Attended(label, calls)

    def _labels_of(self, tensor: Tensor) -> Tensor:
        entry = self._attended.get(tensor)
        if entry is not None:
            return entry.labels
        return torch.full_like(tensor, -1, dtype=torch.int64) if tensor.is_floating_point() else tensor

    def _set(self, whole: Tensor, place: Any, value: Any) -> None:
        entry = self._attended.get(value) if isinstance(value, Tensor) else None
        if entry is not None:
            before = self._attended.get(whole)
            labels = self._labels_of(whole).clone()
            labels[place] = entry.labels
            self._attended[whole] = _Attended(labels, entry.calls | (before.calls if before else frozenset()))

    def _follow_projected(self, name: str, given: list[Tensor], made: list[Tensor]) -> None:
        known = [tensor for tensor in given if tensor in self._projected]
        others = [t for t in given if t not in self._projected and not isinstance(t, nn.Parameter) and t.ndim]
        if not known or (name in _SUMS and others):  # a residual stream is no longer what a projection made
            return
        activated = name in _NONLINEAR or any(self._projected[tensor] for tensor in known)
        for tensor in made:
            if tensor.is_floating_point():
                self._projected[tensor] = activated


def _side_by_side(labels: Tensor) -> int | None:
    """The number of heads, if every position holds each of them in one piece, in the same order, all of one size."""
    rows = labels.reshape(-1, labels.shape[-1])[:_ROWS]
    heads = len(set(rows[0].tolist()))
    if rows.shape[1] % heads or bool((rows < 0).any()):
        return None
    pieces = rows.view(len(rows), heads, -1)
    first = pieces[:, :, 0]
    return heads if bool((pieces == first.unsqueeze(2)).all() & (first[:, 1:] > first[:, :-1]).all()) else None


def _value_axis(args: tuple[Any, ...], given: list[Tensor], weights: Tensor, ndim: int) -> int | None:
    """The axis of a product of weights and values along which one head's values lie; None where that can't be told."""
    if isinstance(args[0], str):
        match = re.fullmatch(r"([\w.]+),([\w.]+)->([\w.]+)", args[0].replace(" ", ""))
        if match is None:
            return None
        first, second, made = match.groups()
        values, others = (second, first) if given[0] is weights else (first, second)
        own = [letter for letter in made if letter in values and letter not in others]
        return made.index(own[0]) - len(made) if len(own) == 1 else None
    if not args or not isinstance(args[0], Tensor) or ndim < 2:
        return None
    return -2 if given[-1] is weights else -1


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _mapped(change: Callable[[Tensor], Tensor], value: T) -> T:
    if isinstance(value, Tensor):
        return cast(T, change(value))
    if isinstance(value, tuple | list):
        return cast(T, type(value)(_mapped(change, item) for item in value))
    if isinstance(value, dict):
        return cast(T, {name: _mapped(change, item) for name, item in value.items()})
    return value
