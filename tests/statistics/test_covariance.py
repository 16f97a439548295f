import numpy as np
import pytest
import torch

from lightning_ablate.errors import StatisticsError
from lightning_ablate.sites import Site
from lightning_ablate.statistics import Covariance, HeadCovariance
from lightning_ablate.statistics.covariance import _merged


def mixed(rows=400, neurons=12):
    """Neurons that depend on one another, some far from zero, one constant, one on another scale."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, neurons, generator=generator) @ torch.randn(neurons, neurons, generator=generator)
    x[:, 1] += 1000
    x[:, 2] = 3.0
    x[:, 3] *= 1e-6
    return x


def test_covariance_equals_numpy():
    x, statistic = mixed(), Covariance(12)
    statistic.update(x.unsqueeze(0))
    expected = np.cov(x.double().numpy().T, bias=True)
    scale = np.sqrt(np.outer(expected.diagonal(), expected.diagonal())) + 1e-300
    assert np.abs((statistic.compute()[0].numpy() - expected) / scale).max() < 1e-12
    np.testing.assert_allclose(statistic.mean.numpy(), x.double().numpy().mean(0), rtol=1e-12)
    assert int(statistic.count) == 400 and bool(statistic.finite())


@pytest.mark.parametrize("sizes", [[1] * 400, [399, 1], [100] * 4, [7, 393]])
def test_parts_and_ranks_merge_to_the_whole(sizes):
    x, whole, parts = mixed(), Covariance(12), Covariance(12)
    whole.update(x.unsqueeze(0))
    ranks = [Covariance(12) for _ in range(3)]
    for number, part in enumerate(x.split(sizes)):
        parts.update(part.unsqueeze(0))
        ranks[number % 2].update(part.unsqueeze(0))  # the third one gets none
    merged = _merged(torch.stack([rank.parts for rank in ranks]))
    scale = whole.covariance[0].diagonal().sqrt()
    for found in (parts.parts[0], merged[0]):
        difference = (found[2:] / found[0] - whole.covariance[0]) / (scale * scale.unsqueeze(1) + 1e-300)
        assert float(difference.abs().max()) < 1e-10
        torch.testing.assert_close(found[:2], whole.parts[0, :2], rtol=1e-12, atol=1e-15)


def test_that_of_heads_is_the_whole_one_within_each_head():
    x, whole = mixed(), Covariance(12)
    heads = HeadCovariance.of(Site("attn.proj", 12, heads=3))
    for statistic in (whole, heads):
        for part in x.split([100, 300]):
            statistic.update(part.unsqueeze(0))
    for head in range(3):
        own = slice(4 * head, 4 * head + 4)
        torch.testing.assert_close(heads.covariance[head], whole.covariance[0, own, own], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(heads.mean, whole.mean)
    with pytest.raises(StatisticsError, match="mlp.proj .* has no heads"):
        HeadCovariance.of(Site("mlp.proj", 12, kind="mlp"))


def test_what_a_model_of_seven_billion_parameters_takes():
    """32 sites of 4,096 neurons in 32 heads, as README says."""
    site = Site("attn.proj", 4096, heads=32)
    with torch.device("meta"):
        whole, heads = 32 * Covariance.of(site).parts.nbytes, 32 * HeadCovariance.of(site).parts.nbytes
    assert round(whole / 1e9, 1) == 2.1 and 67e6 < heads < 69e6


def test_padding_does_not_count():
    x, statistic, other = mixed(12).view(3, 4, 12), Covariance(12), Covariance(12)
    valid = torch.ones(3, 4, dtype=torch.bool)
    valid[1, 2:] = False
    statistic.update(torch.where(valid.unsqueeze(2), x, torch.nan), valid)
    other.update(x[valid].unsqueeze(0))
    torch.testing.assert_close(statistic.parts, other.parts)


def test_wide_sites_take_float32_and_nothing_seen_is_refused():
    assert Covariance(2049).parts.dtype == torch.float32 and Covariance(2048).parts.dtype == torch.float64
    with pytest.raises(StatisticsError, match="saw no position"):
        Covariance(3).check()
    statistic = Covariance(1)
    statistic.update(torch.tensor([[[torch.inf]]]))
    assert not bool(statistic.finite())
