"""At which positions of a sequence neurons are ablated."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_ablate.errors import ConfigError, SiteError
from lightning_ablate.sites import Site

Positions = str | tuple[int, ...]
"""``all``, ``first``, ``last``, places counted from either end, or the name of a boolean entry of the batch."""
ALL, _ENDS = "all", {"first": (0,), "last": (-1,)}


def check_positions(positions: Positions) -> None:
    """Raises ConfigError unless they are a word, or whole numbers."""
    whole = isinstance(positions, tuple) and bool(positions) and all(type(place) is int for place in positions)
    if not whole and not (isinstance(positions, str) and positions):
        raise ConfigError(
            f"positions is {positions!r}, expected all, first, last, places such as [0, -1], or the name of a boolean "
            "entry (batch, seq) of the batch (--ablation.positions)"
        )


def places(positions: Positions, real: Tensor) -> Tensor:
    """The places among the real positions of each example, from 0, or from its end, -1: ``(batch, seq)`` bool.

    Args:
        positions: any but the name of an entry. An example that has no such place has none.
        real: which positions aren't padding, ``(batch, seq)`` bool.

    Example:
        >>> places((1, -1), torch.tensor([[False, True, True, True], [True, False, False, False]])).int().tolist()
        [[0, 0, 1, 1], [1, 0, 0, 0]]
    """
    if positions == ALL:
        return real
    wanted = torch.tensor(_ENDS[positions] if isinstance(positions, str) else positions, device=real.device)
    count = real.sum(1, keepdim=True)
    wanted = torch.where(wanted < 0, count + wanted, wanted)  # (batch, places)
    order = real.cumsum(1) - 1
    return real & (order.unsqueeze(2) == wanted.unsqueeze(1)).any(2)


def places_at(positions: Positions, site: Site, shape: torch.Size, valid: Tensor, batch: Any) -> Tensor:
    """Which positions of a site are meant: bool, broadcastable to its activations, ``(batch, ..., 1)``.

    Args:
        positions: which.
        site: the site.
        shape: of its activations ``(batch, ..., neurons)``.
        valid: which positions aren't padding, ``(batch, seq)`` or ``(batch, 1)`` bool.
        batch: may hold the named entry.

    Raises:
        SiteError: if the site has other positions than these.
        ConfigError: if the batch has no such boolean entry.
    """
    named, asked = isinstance(positions, str) and positions not in (ALL, *_ENDS), [valid]
    if named:
        own = batch.get(positions) if isinstance(batch, Mapping) else None
        if not isinstance(own, Tensor) or own.dtype != torch.bool or own.ndim != 2:
            entries = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
            raise ConfigError(
                f"positions is {positions!r}, expected all, first, last, places, or the name of a boolean entry "
                f"(batch, seq) of the batch, which holds {entries} (--ablation.positions)"
            )
        asked += [own.to(valid.device)]
    count = shape[1:-1].numel()
    for one in asked:
        if len(one) != shape[0] or one.shape[1] not in (1, count):
            raise SiteError(
                f"{site.name} has activations {tuple(shape)}, where the positions of {tuple(one.shape)} are asked for: "
                "it works in windows or on another sequence; leave it out (--ablation.sites)"
            )
    real = torch.stack([one.expand(-1, count) for one in asked]).all(0)
    return (real if named else places(positions, real)).view(*shape[:-1], 1)
