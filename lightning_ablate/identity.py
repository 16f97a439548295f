"""What tells options, functions and data from others: their content, never the name of a class alone."""

import hashlib
import pickle
import sys
import uuid
from collections.abc import Mapping, Sequence, Set
from functools import cached_property, partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

_PLAIN = (str, bytes, int, float, complex, bool, type(None), Path, range, slice, torch.dtype, torch.device)


def digest(value: Any, within: tuple[int, ...] = ()) -> str:
    """SHA-256, in hexadecimal, of a value's content: of tensors their bytes, of functions their code, of objects both.

    Classes of installed packages are known by their names, and modules of torch by their class, as their weights are
    known otherwise. What can't be read is like nothing else, not even itself.
    """
    if id(value) in within:
        return "itself"
    again = partial(digest, within=(*within, id(value)))
    parts: Any
    if isinstance(value, _PLAIN):
        parts = value
    elif isinstance(value, Mapping):
        parts = [[str(key), again(one)] for key, one in value.items()]
    elif isinstance(value, Set):
        parts = sorted(map(again, value))
    elif isinstance(value, Tensor | np.ndarray) and value.dtype != object:
        own = value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value))
        raw = own.reshape(-1).contiguous().view(torch.uint8).numpy().data if own.numel() else b""
        parts = [str(own.dtype), list(own.shape), hashlib.sha256(raw).hexdigest()]
    elif isinstance(value, pd.DataFrame | pd.Series):
        parts = [list(map(str, getattr(value, "columns", ()))), again(pd.util.hash_pandas_object(value).to_numpy())]
    elif isinstance(value, Sequence):
        parts = list(map(again, value))
    elif isinstance(value, CodeType):
        parts = [value.co_code, value.co_names, list(map(again, value.co_consts))]
    elif isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        named = {name: value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__}
        known = {name: one for name, one in named.items() if isinstance(one, (*_PLAIN, Tensor))}
        parts = list(map(again, (value.__code__, value.__defaults__, value.__kwdefaults__, cells, known)))
    elif isinstance(value, MethodType):
        parts = [again(value.__func__), again(value.__self__)]
    elif isinstance(value, partial):
        parts = [again(value.func), again(value.args), again(value.keywords)]
    elif isinstance(value, type):
        parts = [
            f"{value.__module__}.{value.__qualname__}",
            *(again(vars(kind)[name]) for kind, name in _written(value)),
        ]
    elif isinstance(value, nn.Module):
        parts = again(type(value))
    elif hasattr(value, "_fingerprint"):  # a data set of `datasets`, which knows itself by content
        parts = value._fingerprint
    elif hasattr(value, "__dict__"):
        parts = [again(type(value)), again(vars(value))]
    else:
        try:
            parts = pickle.dumps(value)
        except Exception:  # whatever an extension's type raises that can't be pickled
            parts = uuid.uuid4().hex
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def described(value: Any) -> Any:
    """An option as run.json says it: of objects their class, name and what they keep, of other content a digest."""
    if isinstance(value, str | int | float | bool | type(None)):
        return value
    if isinstance(value, list | tuple):
        return [described(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): described(one) for key, one in value.items()}
    if isinstance(value, Tensor | FunctionType | type) or not hasattr(value, "__dict__"):
        return f"{type(value).__name__} {digest(value)[:16]}"
    kind, named = type(value), {"name": value.name} if hasattr(value, "name") else {}
    kept = {name: described(one) for name, one in vars(value).items() if name != "statistics"}
    own = kind.__module__.startswith("lightning_ablate.")
    said = (
        {"class": kind.__name__}
        if own
        else {"class": f"{kind.__module__}.{kind.__qualname__}", "code": digest(kind)[:16]}
    )
    return {**said, **named, **kept}


def options_of(module: Any) -> dict[str, Any]:
    """What a module of the user's own was given or made beside its weights."""
    kind = type(module)
    skipped = ("training", "phase", "place", "target")
    return {
        name: value
        for name, value in vars(module).items()
        if not (name.startswith("_") or name in skipped or isinstance(getattr(kind, name, None), cached_property))
    }


def _written(kind: type) -> list[tuple[type, str]]:
    """The functions and values of a class and its bases that no installed package holds."""
    found = []
    for one in kind.__mro__:
        path = getattr(sys.modules.get(one.__module__), "__file__", None) or "site-packages"
        if "site-packages" not in path and not one.__module__.startswith("lightning_ablate."):
            found += [(one, n) for n, v in vars(one).items() if isinstance(v, (FunctionType, Tensor, *_PLAIN))]
    return [(one, name) for one, name in found if name not in ("__module__", "__doc__", "__firstlineno__")]
