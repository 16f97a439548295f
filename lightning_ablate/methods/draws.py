"""Random draws that depend on a seed and on what is drawn for, never on the batch, the process or the device."""

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15, the step of SplitMix64, as an int64
_FIRST, _SECOND = -4658895280553007687, -7723592293110705685  # 0xBF58476D1CE4E5B9 and 0x94D049BB133111EB


def hashed(seed: int, *counters: Tensor) -> Tensor:
    """A hash of 64 bits of the seed and the counters, which are broadcast: SplitMix64 (Steele, Lea & Flood 2014).

    The seed has 63 bits, at most. The counters are int64, what is drawn for: an example, a position, a neuron.

    Example:
        >>> hashed(1234567, torch.tensor([0, 1])).tolist()  # the first two numbers of SplitMix64 from that seed
        [6457827717110365317, 3203168211198807973]
    """
    value = torch.full((), seed, dtype=torch.int64, device=counters[0].device)
    for counter in counters:
        value = value + _GOLDEN * (counter + 1)
        value = (value ^ _shifted(value, 30)) * _FIRST
        value = (value ^ _shifted(value, 27)) * _SECOND
        value = value ^ _shifted(value, 31)
    return value


def uniform(hashes: Tensor) -> Tensor:
    """Float32 strictly between 0 and 1, from hashes of 64 bits.

    Example:
        >>> uniform(torch.tensor([0, -1])).tolist()
        [5.960464477539063e-08, 0.9999999403953552]
    """
    return (_shifted(hashes, 41).float() + 0.5) * 2.0**-23


def below(hashes: Tensor, bound: Tensor) -> Tensor:
    """Int64 from 0 to below the bound, from hashes of 64 bits; the bounds are broadcast."""
    return _shifted(hashes, 1) % bound


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Shifted to the right, with zeros from the left."""
    return (value >> bits) & (2 ** (64 - bits) - 1)
