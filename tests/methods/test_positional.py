import numpy as np
import pytest
import torch

from lightning_ablate.errors import DataError, StatisticsError
from lightning_ablate.methods import Ablation, Batch, PositionalMean
from lightning_ablate.sites import Site
from lightning_ablate.statistics import MeanByPosition, Moments, SiteStatistics


def gathered(*batches):
    found = {Moments: Moments(3), MeanByPosition: MeanByPosition(3)}
    for statistic in found.values():
        for activations, valid in batches:
            statistic.update(activations, valid)
    return found


def padded():
    x = torch.randn(5, 7, 3)
    valid = torch.arange(7) < torch.tensor([7, 3, 1, 4, 6]).unsqueeze(1)
    return torch.where(valid.unsqueeze(2), x, torch.nan), valid


def test_means_by_position_equal_numpy_whatever_the_batches_and_lengths():
    x, valid = padded()
    whole = gathered((x, valid))[MeanByPosition]
    parts = gathered((x[1:4, :4], valid[1:4, :4]), (x[:1], valid[:1]), (x[4:, :6], valid[4:, :6]))[MeanByPosition]
    expected = np.nanmean(x.double().numpy(), 0)
    for found in (whole, parts):
        np.testing.assert_allclose(found.mean.numpy(), expected, rtol=1e-12)
        assert found.count.tolist() == valid.sum(0).tolist() and bool(found.finite())


def test_the_replacement_is_the_mean_there_and_beyond_that_of_all_positions():
    x, valid = padded()
    found = gathered((x[:, :5], valid[:, :5]))
    batch = Batch(torch.tensor([3, 9]))
    mask = torch.ones(3, dtype=torch.bool)
    replace = PositionalMean().prepare(Ablation(Site("a", 3), mask, SiteStatistics("a", found), None, batch))
    values = replace(torch.zeros(2, 7, 3, dtype=torch.bfloat16))
    assert values.dtype == torch.bfloat16
    values = replace(torch.zeros(2, 7, 3))
    np.testing.assert_allclose(values[1, :5].numpy(), np.nanmean(x[:, :5].double().numpy(), 0), rtol=1e-5)
    torch.testing.assert_close(values[:, 5:], found[Moments].mean.float().expand(2, 2, 3))
    assert torch.equal(replace(torch.zeros(14, 3)).view(2, 7, 3), values)  # examples and positions in one dimension
    with pytest.raises(DataError, match="doesn't divide by the 2 examples"):
        replace(torch.zeros(3, 7, 3))


def test_nothing_seen_is_refused():
    with pytest.raises(StatisticsError, match="saw no position"):
        MeanByPosition(3).check()
