import numpy as np
import pytest
import torch

from lightning_ablate.errors import SiteError
from lightning_ablate.sites import Site
from lightning_ablate.statistics import Covariance, HeadCovariance
from tests import tiny


def test_covariance_is_numpys_in_every_way(every_way):
    mixed = tiny.mixed(far=1000)
    expected = np.cov(mixed.double().numpy().T, bias=True)
    scale = np.sqrt(np.outer(expected.diagonal(), expected.diagonal())) + 1e-300
    for statistic in every_way(Covariance, mixed):
        assert np.abs((statistic.covariance[0].numpy() - expected) / scale).max() < 1e-10
        np.testing.assert_allclose(statistic.mean.numpy(), mixed.double().numpy().mean(0), rtol=1e-12)
        assert int(statistic.count) == 400


def test_that_of_heads_is_the_whole_one_within_each_head(gathered):
    mixed = tiny.mixed(far=1000)
    whole, heads = gathered(Covariance, mixed.split(100)), HeadCovariance.of(Site("attn.proj", 12, heads=3))
    for batch in mixed.split([100, 300]):
        heads.update(batch)
    for head, own in enumerate((slice(0, 4), slice(4, 8), slice(8, 12))):
        torch.testing.assert_close(heads.covariance[head], whole.covariance[0, own, own], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(heads.mean, whole.mean)
    with pytest.raises(SiteError, match="mlp.proj .* has no heads"):
        HeadCovariance.of(Site("mlp.proj", 12, kind="mlp"))


def test_what_a_model_of_seven_billion_parameters_takes():
    """32 sites of 4,096 neurons in 32 heads, as README says; wide ones in float32."""
    site = Site("attn.proj", 4096, heads=32)
    with torch.device("meta"):
        whole, heads = 32 * Covariance.of(site).sums.nbytes, 32 * HeadCovariance.of(site).sums.nbytes
        assert Covariance(2049).mean.dtype == torch.float32 and Covariance(2048).mean.dtype == torch.float64
    assert round(whole / 1e9, 1) == 2.1 and 67e6 < heads < 69e6
