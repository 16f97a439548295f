"""Activations that are hard on arithmetic, and statistics of them."""

from itertools import product

import pytest
import torch

from lightning_ablate.statistics import SiteStatistics

SIZES = {torch.float16: (1e-6, 6e4), torch.bfloat16: (1e-37, 1e38), torch.float32: (1e-37, 1e38)}
SIZES |= {torch.float64: (1e-70, 1e70)}  # whose fourth powers float64 holds


@pytest.fixture(params=product(SIZES, range(5)), ids=str)
def adversarial(request):
    """Normal, far from zero, tiny, skewed, constant, half of it zeros, all zeros, one outlier, huge, both signs."""
    dtype, seed = request.param
    smallest, largest = SIZES[dtype]
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(8, 500, (), generator=generator))
    x = torch.randn(n, 10, generator=generator, dtype=torch.float64)
    x[:, 1] += 1000
    x[:, 2] *= smallest
    x[:, 3] = x[:, 3].exp().pow(3)
    x[:, 4] = -0.1
    x[:, 5] = x[:, 5].relu()
    x[:, 6] = 0
    x[n // 2, 7] = 3e4
    x[:, 8] *= largest / 10
    x[:, 9] = x[:, 9].sign() * (5 + x[:, 9].abs() / 1000)
    return x.clamp(-largest, largest).to(dtype)


@pytest.fixture
def gathered():
    """Gathers a statistic from batches; what it needs, from ``first`` or the same ones before it."""

    def gather(kind, batches, valid=None, first=None):
        earlier = {need: gather(need, first or batches, valid) for need in kind.needs}
        statistic = kind(batches[0].shape[-1], SiteStatistics("here", earlier))
        for batch in batches:
            statistic.update(batch, valid)
        return statistic

    return gather


@pytest.fixture
def every_way(gathered):
    """A statistic of the whole, of shuffled batches, and of three ranks that share these; the first one has none."""

    def gather(kind, x):
        generator = torch.Generator().manual_seed(len(x))
        cuts = torch.randint(1, len(x), (5,), generator=generator).unique().tolist()
        batches = x[torch.randperm(len(x), generator=generator)].tensor_split(cuts)
        rank, *others = [gathered(kind, [x[:0], *share], first=[x]) for share in ([], batches[::2], batches[1::2])]
        for other in others:
            rank.merge_state(other)
        return gathered(kind, [x]), gathered(kind, batches), rank

    return gather
