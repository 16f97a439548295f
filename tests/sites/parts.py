"""Targets of named parts, run by a function, and attention by hand."""

import torch
from torch import nn

from lightning_ablate.sites import find_sites


class Parts(nn.Module):
    def __init__(self, run, **parts):
        super().__init__()
        self.parts, self.run = nn.ModuleDict(parts), run

    def forward(self, x):
        return self.run(self.parts, x)


def found(target, *which):
    """The sites of a target that takes ``(batch, 5, 8)``."""
    return find_sites(target, lambda: target(torch.randn(2, 5, 8)), which or ("attention",))


def attention(parts, x, heads=2):
    """By hand, with everything that may stand between attention and its projection."""
    query, key, value = (parts[name](x).unflatten(-1, (heads, -1)).transpose(1, 2) for name in ("q", "k", "v"))
    weights = (query @ key.transpose(2, 3)).softmax(-1).to(x.dtype)
    mixed = nn.functional.dropout(weights, 0.0) @ value
    return mixed.transpose(1, 2).flatten(2)


def three(width=8):
    return {name: nn.Linear(8, width) for name in ("q", "k", "v")}


def linear(**outputs):
    return {name: nn.Linear(8, width) for name, width in outputs.items()}
