"""Follows the data through one forward pass, to see which projections read what attention and the MLPs made."""

import re
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_ablate.sites.experts import seen_experts
from lightning_ablate.sites.hooks import first_of
from lightning_ablate.sites.site import features
from lightning_ablate.sites.unfused import unfused

PRODUCTS = {"matmul", "__matmul__", "bmm", "baddbmm", "einsum"}
PROJECTIONS = {"linear", "addmm", "mm", "conv1d", "conv2d", "conv3d", "embedding", "bilinear"}
# these move numbers without changing them, so they are run on the labels as well
MOVES = set(
    "T __get__ __getitem__ broadcast_to cat chunk clone concat concatenate contiguous expand expand_as flatten flip "
    "hsplit hstack index_select mT moveaxis movedim narrow permute ravel repeat repeat_interleave reshape reshape_as "
    "roll select split split_with_sizes squeeze stack swapaxes swapdims t tensor_split tile transpose unbind unflatten "
    "unfold unsqueeze view view_as vsplit vstack".split()
)
_NONLINEAR = set(
    "__pow__ celu clamp clamp_min elu erf exp expm1 gelu glu hardsigmoid hardswish hardtanh leaky_relu log1p "
    "logsigmoid mish pow prelu relu relu6 relu_ rrelu selu sigmoid sigmoid_ silu silu_ softplus softsign square "
    "swiglu tanh tanh_ threshold".split()
)
SUMS = {"add", "__add__", "__radd__", "add_", "__iadd__", "sub", "__sub__"}
# attention and its projection in one function, without a module in between
_FUSED = {"multi_head_attention_forward", "_transformer_encoder_layer_fwd", "_native_multi_head_attention"}
ROWS = 1024  # of an input are checked


class Read(NamedTuple):
    """One run of a projection."""

    path: str
    width: int  # features of its input
    positions: int  # of its input
    made_by: str  # the input comes from "attention" or "mlp"; "" for anything else
    heads: int | None = None  # of attention, if they lie side by side in the input and are equally wide


class Returned(NamedTuple):
    """What one run of a module returned: a tensor, alone or before others."""

    path: str
    width: int  # its last dimension
    after: int  # how many projections had begun to run


class Trace(NamedTuple):
    """What one forward pass showed."""

    reads: list[Read]  # all runs of projections, in order
    returned: list[Returned]  # in order
    lost: list[str]  # modules with attention whose output no projection read
    shared: list[str]  # modules with attention whose output several projections read
    runs: int  # of the target itself
    experts: dict[str, tuple[int, int]]  # modules of experts → how many there are, and how many neurons each has


def trace(target: nn.Module, run: Callable[[], object], tracer: "Tracer | None" = None) -> Trace:
    """What the projections read in one forward pass, which ``run`` does on any input.

    Attention is ``scaled_dot_product_attention``, or a softmax and a product with the values. Its output gets a label
    for each position of each head. Labels follow it through operations that move or scale it, to the projection that
    reads it. An MLP is a projection, a nonlinearity and a second projection, which reads what the MLP made. A subclass
    of :class:`Tracer` may see more.
    """
    tracer = tracer or Tracer()
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # no operation of compiled code can be seen
        stack.enter_context(unfused(target.modules()))
        experts = stack.enter_context(seen_experts(target))
        for path, module in target.named_modules():
            if isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                continue
            entering = partial(tracer.entering, path)
            stack.callback(module.register_forward_pre_hook(entering, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(tracer.leaving, always_call=True).remove)
        stack.enter_context(tracer)
        run()
    lost = [path for path, readers in tracer.calls if not readers]
    shared = [path for path, readers in tracer.calls if len(readers) > 1]
    for number in tracer.asked:  # these projections belong to attention
        read = tracer.reads[number - 1]
        tracer.reads[number - 1] = read._replace(made_by=read.made_by.replace("mlp", ""))
    return Trace(tracer.reads, tracer.returned, lost, shared, tracer.runs, experts)


class _Attended(NamedTuple):
    labels: Tensor  # int64, in the tensor's shape: a number for a position of a head; -1 for any other origin
    calls: frozenset[int]  # the attention calls it came from


class _Projected(NamedTuple):
    read: int  # the number of the projection's run that made it, from 1
    activated: bool  # whether a nonlinearity came after


class Tracer(TorchFunctionMode):
    """Follows one forward pass; its hooks are :func:`trace`'s."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[Read] = []
        self.returned: list[Returned] = []
        self.calls: list[tuple[str, set[str]]] = []  # the module of each attention call, and who read its output
        self.asked: set[int] = set()  # runs of projections that made queries, keys and values
        self.runs = 0
        self._stack: list[tuple[str, bool]] = []  # the modules that are running, and whether they are projections
        self._labels = 0
        self.weights: MutableMapping[Tensor, bool] = WeakTensorKeyDictionary()  # of attention
        self._attended: MutableMapping[Tensor, _Attended] = WeakTensorKeyDictionary()
        self._projected: MutableMapping[Tensor, _Projected] = WeakTensorKeyDictionary()

    def entering(self, path: str, module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """A module begins to run."""
        projection = features(module) is not None
        outermost = not any(is_projection for _, is_projection in self._stack)
        self._stack.append((path, projection))
        self.runs += path == ""
        read = next(iter((*inputs, *named.values())), None)
        if projection and outermost and isinstance(read, Tensor):
            self._read(path, read)

    def leaving(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """It ends."""
        path, projection = self._stack.pop() if self._stack else ("", False)  # empty if another hook failed before
        if (first := first_of(output)) is not None:
            self.returned.append(Returned(path, first.shape[-1], len(self.reads)))
        if projection and isinstance(output, Tensor) and output not in self.weights:
            self._attended.pop(output, None)
            self._projected[output] = _Projected(len(self.reads), False)

    def __torch_function__(  # noqa: D105
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name, given = getattr(func, "__name__", ""), tensors_of([args, kwargs])
        attended = any(tensor in self._attended for tensor in given)
        weights = [tensor for tensor in given if tensor in self.weights]
        output = func(*args, **kwargs)
        made = tensors_of(output)
        if name in PRODUCTS or name == "scaled_dot_product_attention":
            self.asked |= {entry.read for entry in map(self._projected.get, given) if entry is not None}
        if name == "__setitem__":
            self._set(*args)
        elif not made or not given:
            pass
        elif name == "multi_head_attention_forward" and hasattr(args[11], "stands_in"):
            self._label(torch.unflatten(made[0], -1, (args[4], -1)), -1, made[0])
        elif name in _FUSED:
            self._note_call()
        elif name == "scaled_dot_product_attention":
            self._label(output, -1)
        elif name in PRODUCTS and weights:
            self._label(output, _value_axis(args, given, weights[0], output.ndim))
        elif name == "softmax":
            self.weights[output] = True
        elif weights:
            for tensor in made:
                if len(given) == 1 or name in MOVES or any(tensor.shape == w.shape for w in weights):
                    self.weights[tensor] = True
        elif name in PRODUCTS or name in PROJECTIONS:
            pass
        elif attended:
            self._follow(func, name, args, kwargs, given, made)
        else:
            self._follow_projected(name, given, made)
        return output

    def _read(self, path: str, activations: Tensor) -> None:
        width, heads, made_by = activations.shape[-1], None, ""
        entry, projected = self._attended.get(activations), self._projected.get(activations)
        if entry is not None:
            made_by, heads = "attention", _side_by_side(entry.labels)
            for call in entry.calls:
                self.calls[call][1].add(path)
        elif projected is not None and projected.activated:
            made_by = "mlp"
        self.reads.append(Read(path, width, activations.numel() // max(1, width), made_by, heads))

    def _label(self, output: Tensor, axis: int | None, whole: Tensor | None = None) -> None:
        """Labels an attention output, or ``whole`` that holds it. A head's values along ``axis`` share a label."""
        labels = torch.full_like(output, -1, dtype=torch.int64)
        if axis is not None:
            one = labels.select(axis, 0).unsqueeze(axis)
            numbers = torch.arange(self._labels, self._labels + one.numel(), device=output.device)
            labels = numbers.view(one.shape).expand(output.shape)
            self._labels += one.numel()
        whole = output if whole is None else whole
        self._attended[whole] = _Attended(labels.reshape(whole.shape), frozenset([len(self.calls)]))
        self._note_call()

    def _note_call(self) -> None:
        self.calls.append((self._stack[-1][0] if self._stack else "", set()))

    def _follow(self, func: Any, name: str, args: Any, kwargs: Any, given: list[Tensor], made: list[Tensor]) -> None:
        attended = [entry for entry in map(self._attended.get, given) if entry is not None]
        others = [tensor for tensor in given if tensor not in self._attended and not isinstance(tensor, nn.Parameter)]
        calls = frozenset[int]().union(*(entry.calls for entry in attended))
        if name in MOVES:
            args, kwargs = tree_map_only(Tensor, self._labels_of, (args, kwargs))
            labels = tensors_of(func(*args, **kwargs))
        elif name in SUMS and any(tensor.ndim for tensor in others):
            return  # it is a residual stream now
        else:
            same = {entry.labels.shape: entry.labels for entry in reversed(attended)}
            labels = [same.get(tensor.shape, tensor) for tensor in made]
            if any(not (tensor.is_floating_point() or tensor.dtype == torch.bool) for tensor in others):
                labels = [torch.full_like(label, -1, dtype=torch.int64) for label in labels]  # an index moved it
        for tensor, label in zip(made, labels, strict=True):
            if label is not tensor and tensor.is_floating_point() and label.shape == tensor.shape:
                self._attended[tensor] = _Attended(label, calls)

    def _labels_of(self, tensor: Tensor) -> Tensor:
        if (entry := self._attended.get(tensor)) is not None:
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
        known = [entry for entry in map(self._projected.get, given) if entry is not None]
        others = [t for t in given if t not in self._projected and not isinstance(t, nn.Parameter) and t.ndim]
        if not known or (name in SUMS and (others or len({entry.read for entry in known}) > 1)):
            return  # it is a residual stream now
        activated = name in _NONLINEAR or any(entry.activated for entry in known)
        for tensor in made:
            if tensor.is_floating_point():
                self._projected[tensor] = _Projected(known[0].read, activated)


def _side_by_side(labels: Tensor) -> int | None:
    """The number of heads, if each position holds them one after the other, in one order and equally wide."""
    rows = labels.reshape(-1, labels.shape[-1])[:ROWS]
    heads = len(set(rows[0].tolist()))
    if rows.shape[1] % heads or bool((rows < 0).any()):
        return None
    pieces = rows.view(len(rows), heads, -1)
    first = pieces[:, :, 0]
    return heads if bool((pieces == first.unsqueeze(2)).all() & (first[:, 1:] > first[:, :-1]).all()) else None


def _value_axis(args: tuple[Any, ...], given: list[Tensor], weights: Tensor, ndim: int) -> int | None:
    """The axis along which a head's values lie in the product of attention weights and values; None if unclear."""
    if not args or isinstance(args[0], Tensor):
        return None if ndim < 2 else -2 if given[-1] is weights else -1
    match = re.fullmatch(r"([\w.]+),([\w.]+)->([\w.]+)", str(args[0]).replace(" ", ""))  # of einsum
    if match is None:
        return None
    first, second, made = match.groups()
    values, others = (second, first) if given[0] is weights else (first, second)
    own = [letter for letter in made if letter in values and letter not in others]
    return made.index(own[0]) - len(made) if len(own) == 1 else None


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in a structure."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
