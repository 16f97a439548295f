"""By what targets, options, functions and data are known: their content, never the name of a class alone."""

import hashlib
import sys
import uuid
from collections.abc import Mapping
from functools import cached_property, partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

_UNSAID = ("training", "phase", "loader_index", "target")  # attributes of a module that a run changes, and its weights


def content(*values: Any) -> str:
    """A hash of the tensors, data and functions in values, and of the code of classes that aren't installed.

    A value that can't be pickled gets a random hash.
    """
    from datasets.fingerprint import Hasher

    try:
        return Hasher.hash([values, *map(_code, values)])
    except Exception:  # pickling raises errors of any kind
        return uuid.uuid4().hex


def described(value: Any, within: tuple[int, ...] = ()) -> Any:
    """An option as run.json holds it: an object as its class, name and attributes; tensors and functions as hashes."""
    again = partial(described, within=(*within, id(value)))
    if isinstance(value, str | int | float | bool | type(None)):
        return value
    if isinstance(value, list | tuple):
        return list(map(again, value))
    if isinstance(value, Mapping):
        return {str(key): again(one) for key, one in value.items()}
    if isinstance(value, Tensor | FunctionType | type) or not hasattr(value, "__dict__") or id(value) in within:
        return f"{type(value).__name__} {content(value)}"
    kind, named = type(value), {"name": value.name} if hasattr(value, "name") else {}
    kept = {name: again(one) for name, one in vars(value).items() if name != "statistics"}
    if kind.__module__.startswith("lightning_ablate."):
        return {"class": kind.__name__, **named, **kept}
    return {"class": f"{kind.__module__}.{kind.__qualname__}", "code": content(kind), **named, **kept}


def options_of(module: Any) -> dict[str, Any]:
    """The attributes of a user's module but its weights: arguments, and what its constructor made."""
    values = [name for kind in type(module).__mro__ for name, v in vars(kind).items() if isinstance(v, cached_property)]
    return {k: v for k, v in vars(module).items() if not (k.startswith("_") or k in values or k in _UNSAID)}


def fingerprint(target: nn.Module) -> str:
    """SHA-256, in hexadecimal, of a target: its modules' classes and whole numbers, and its state dict.

    Whole numbers count, as the same weights with another number of heads are another target. Those of modules with
    buffers that no state dict holds don't: such caches, RoPE's longest text for example, change as the target runs.
    Every process of a sharded target must call it.
    """
    digest = hashlib.sha256()
    for name, module in target.named_modules():
        fixed = not module._non_persistent_buffers_set
        numbers = sorted((key, value) for key, value in vars(module).items() if type(value) is int and fixed)
        # below the class that sharding puts on top
        kind = next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))
        digest.update(f"{name} {kind.__name__} {numbers};".encode())
    for name, value in sorted(target.state_dict().items()):
        for tensor in tree_leaves(value):  # a packed weight is a tuple
            if not isinstance(tensor, Tensor):
                digest.update(f"{name} {tensor};".encode())
                continue
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            tensor = _offloaded(target, name) if tensor.is_meta else tensor
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
            tensor = tensor.dequantize() if tensor.is_quantized else tensor
            digest.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def _offloaded(target: nn.Module, name: str) -> Tensor:
    """A tensor that accelerate has moved off the device while the target doesn't run."""
    from accelerate.utils import align_module_device

    path, _, own = name.rpartition(".")
    with align_module_device(module := target.get_submodule(path), "cpu"):
        return getattr(module, own).clone()


def _code(value: Any) -> list[Any]:
    """The code of a function, or of a value's class and its bases, without those of installed packages."""
    if isinstance(value, FunctionType):
        return [value.__code__]
    kinds = [
        kind
        for kind in (value if isinstance(value, type) else type(value)).__mro__
        if "site-packages" not in (getattr(sys.modules.get(kind.__module__), "__file__", None) or "site-packages")
    ]
    held = [one for kind in kinds for one in vars(kind).values()]
    names = ("fget", "func", "__func__")  # where properties, static and class methods hold it
    written = [next((getattr(one, n) for n in names if getattr(one, n, None)), one) for one in held]
    return [one.__code__ for one in written if isinstance(one, FunctionType)]
