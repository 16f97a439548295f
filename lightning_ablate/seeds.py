"""Seeds and digests: numbers that depend on content alone, the same on every machine."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def seed_of(*keys: object) -> int:
    """A seed of 63 bits that depends on every key, so that nearby seeds and names give unrelated draws."""
    found = hashlib.sha256("\0".join(map(str, keys)).encode()).digest()
    return int.from_bytes(found[:8], "big") >> 1


def digest(state: Any) -> str:
    """SHA-256, in hexadecimal, of tensors on the CPU and plain values, in mappings and lists of them."""
    if isinstance(state, Mapping):
        state = [[str(key), digest(value)] for key, value in state.items()]
    elif isinstance(state, list | tuple):
        state = [digest(value) for value in state]
    elif isinstance(state, Tensor):
        raw = state.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        state = [str(state.dtype), list(state.shape), hashlib.sha256(raw).hexdigest()]
    return hashlib.sha256(repr(state).encode()).hexdigest()
