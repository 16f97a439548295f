"""What attention looks at: the weights of the attention whose output each site reads."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_ablate.sites.hooks import hooked
from lightning_ablate.sites.site import Site


@contextmanager
def attended(target: nn.Module, heads: Mapping[Site, Sequence[int]]) -> Iterator[dict[tuple[Site, int], Tensor]]:
    """Fills a mapping with the attention weights of each of these heads, ``(batch, queries, keys)`` float32.

    They are those of the last ``scaled_dot_product_attention`` or softmax before the site runs. A site is missing where
    neither can be seen (a fused kernel), and where the weights aren't one matrix an example and head (windows).
    """
    seen, found = _Seen(), dict[tuple[Site, int], Tensor]()

    def read(site: Site, activations: Tensor) -> None:
        weights = seen.weights()
        if weights is not None and site.heads and weights.ndim >= 3:
            weights = weights.float().reshape(-1, site.heads, *weights.shape[-2:])
            if len(weights) == len(activations):
                found.update({(site, head): weights[:, head].clone() for head in heads[site]})

    with hooked(target, {site: partial(read, site) for site in heads}), seen:
        yield found


class _Seen(TorchFunctionMode):
    """Remembers the last attention that ran."""

    def __init__(self) -> None:
        super().__init__()
        self._last: tuple[Any, ...] | None = None  # a softmax, or the arguments of attention

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output, name = func(*args, **(kwargs or {})), getattr(func, "__name__", "")
        if name == "softmax" and (self._last is None or len(self._last) == 1):  # a gate's isn't attention
            self._last = (output,)
        elif name == "scaled_dot_product_attention":
            self._last = (args, dict(kwargs or {}))
        return output

    def weights(self) -> Tensor | None:
        """Those of the last attention; None if none ran since the last call."""
        last, self._last = self._last, None
        return None if last is None else last[0] if len(last) == 1 else _weights(*last[0], **last[1])


def _weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What ``scaled_dot_product_attention`` multiplies the values by, ``(..., queries, keys)`` float32."""
    query, key = query.float(), key.float()
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        shut = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if shut else scores + attn_mask.float()
    return scores.softmax(-1).nan_to_num()
