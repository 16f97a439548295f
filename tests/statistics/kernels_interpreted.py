"""Run by test_kernels.py with TRITON_INTERPRET=1, under which Triton's kernels run on the CPU."""

import sys

import torch

from lightning_ablate.statistics import LatticeHistogram, Moments, base, lattice, moments
from tests.statistics.test_lattice import DTYPES, NEURONS, adversarial


def gathered(kind, parts, by_kernels):
    for module in (base, lattice, moments):
        module.has_kernels = lambda rows: by_kernels
    statistic = kind(parts[0].shape[1])
    for part in parts:
        statistic.update(part.unsqueeze(0))
    return statistic


def check(dtype, seed):
    x = adversarial(dtype, seed)
    x[x.abs() < torch.finfo(dtype).tiny] = 0  # the interpreter takes bfloat16's subnormal values for 0
    x = torch.cat([x, 10 * x[:, :7] if dtype != torch.float16 else x[:, :7]], 1)  # not a whole block of neurons
    parts = x.split(29)
    found, expected = (gathered(LatticeHistogram, parts, by_kernels) for by_kernels in (True, False))
    assert torch.equal(found.lattice, expected.lattice), (dtype, seed)
    if dtype != torch.float64:
        found, expected = (gathered(Moments, parts, by_kernels) for by_kernels in (True, False))
        torch.testing.assert_close(found.parts[:3], expected.parts[:3], rtol=1e-11, atol=0)
        torch.testing.assert_close(found.kurtosis, expected.kurtosis, rtol=1e-9, atol=1e-9)
    x[2, NEURONS - 1] = torch.nan
    assert not bool(gathered(LatticeHistogram, [x], True).finite())
    x[2, NEURONS - 1] = -torch.inf
    assert not bool(gathered(LatticeHistogram, [x], True).finite())


def main(seeds):
    for dtype in DTYPES:
        for seed in range(seeds):
            check(dtype, seed)
    wide = torch.randn(40, 150)[:, 10:140]  # rows that lie apart, three blocks of neurons
    found, expected = (gathered(LatticeHistogram, [wide], by_kernels) for by_kernels in (True, False))
    assert torch.equal(found.lattice, expected.lattice)
    print("kernels agree")


if __name__ == "__main__":
    main(int(sys.argv[1]))
