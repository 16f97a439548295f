"""The output embedding of a language model, which reads the scored positions alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[], Tensor]
"""Runs a target on a batch: logits ``(batch, seq, vocabulary)``."""


def logits_at(run: Run, head: nn.Module | None, rows: Tensor, places: Tensor) -> Tensor:
    """The logits at positions ``rows``, ``places`` ``(n,)`` int64 of a batch, ``(n, vocabulary)``.

    The output embedding ``head`` reads these alone, as one sequence, unless a hook reads what it reads.
    """
    if head is None or head._forward_pre_hooks or head._forward_hooks:
        return run()[rows, places]

    def select(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return inputs[0][rows, places].unsqueeze(0), *inputs[1:]

    handle = head.register_forward_pre_hook(select)
    try:
        return run()[0]
    finally:
        handle.remove()


def may_select(target: Any, run: Run) -> bool:
    """Whether the output embedding of a target of transformers may read some positions alone.

    It is tried on a batch of one example: half of the positions must get the logits, but for rounding, that they get in
    a whole pass.
    """
    with torch.no_grad():
        whole = run()
        if whole.ndim != 3 or whole.shape[1] < 2:  # a single position shows nothing
            return False
        places = torch.arange(0, whole.shape[1], 2, device=whole.device)
        expected = whole[0, places]
        try:
            found = logits_at(run, target.get_output_embeddings(), torch.zeros_like(places), places)
        except Exception:  # whatever a target raises that does more with its logits
            return False
    noise = torch.finfo(expected.dtype).eps ** 0.75 * float(expected.nan_to_num(0, 0, 0).abs().max())
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=0, atol=noise, equal_nan=True)
