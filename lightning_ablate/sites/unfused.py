"""torch.nn.MultiheadAttention in two pieces, so that its output projection runs as a module and reads the heads."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class _Whole(nn.Module):
    """Stands in for an output projection: by it attention hands on what it made."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = torch.eye(like.shape[1], dtype=like.dtype, device=like.device), None
        self.weight.stands_in = True  # type: ignore[attr-defined]


@contextmanager
def unfused(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Lets every MultiheadAttention among the modules call its ``out_proj``, batch first.

    Those with a ``forward`` of their own are left alone. The fused fast paths, those of the encoder layers around them
    too, are off for as long.
    """
    fused = [one for one in modules if isinstance(one, nn.MultiheadAttention) and _is_plain(one)]
    with ExitStack() as stack:
        if fused:
            stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
            torch.backends.mha.set_fastpath_enabled(False)
        for module in fused:
            module.forward = partial(_forward, module, _Whole(module.out_proj.weight))  # type: ignore[method-assign]
            stack.callback(delattr, module, "forward")
        yield


def _is_plain(module: nn.MultiheadAttention) -> bool:
    return type(module).forward is nn.MultiheadAttention.forward and "forward" not in vars(module)


def _forward(module: nn.MultiheadAttention, whole: _Whole, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    own = module.out_proj
    module.out_proj = whole  # type: ignore[assignment]
    try:
        made, weights = nn.MultiheadAttention.forward(module, *args, **kwargs)
    finally:
        module.out_proj = own
    if made.ndim == 3 and not module.batch_first:
        return own(made.transpose(0, 1)).transpose(0, 1), weights
    return own(made), weights
