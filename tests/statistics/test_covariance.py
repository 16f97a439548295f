import numpy as np
import pytest
import torch

from lightning_ablate.errors import SiteError
from lightning_ablate.metrics import SweepMetrics
from lightning_ablate.sites import Site
from lightning_ablate.statistics import Covariance, HeadCovariance, Moments
from lightning_ablate.statistics.covariance import RIDGES
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
    mixed, site = tiny.mixed(far=1000), Site("attn.proj", 12, heads=3)
    whole = gathered(Covariance, mixed.split(100))
    heads = tiny.gathered(site, mixed.split([100, 300]), HeadCovariance)[HeadCovariance]
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
        assert Covariance(1025).mean.dtype == torch.float32 and Covariance(1024).mean.dtype == torch.float64
    assert round(whole / 2 / 1e9, 1) == 2.1 and 67e6 < heads / 2 < 69e6  # and twice that while they are gathered


def test_no_large_state_is_kept_twice():
    """Torchmetrics keeps a copy of what a state is at first."""
    for metric in (Covariance(512), SweepMetrics(100, 1000)):
        first = sum(value.nbytes for value in metric._defaults.values())
        assert first < 0.02 * metric.sums.nbytes


def test_fewer_positions_than_neurons_are_noted(gathered):
    few, enough = tiny.mixed(11), tiny.mixed(12)
    note = "calibrated on 11 positions, fewer than the 12 neurons that conditional methods regress: they rest on their "
    note += "ridge; calibrate on more data (--data.calibration_...)"
    site = Site("attn.proj", 12, heads=3)
    assert gathered(Covariance, [few]).note(site) == note and gathered(Covariance, [enough]).note(site) is None
    assert tiny.gathered(site, [few], HeadCovariance)[HeadCovariance].note(site) is None
    assert gathered(Moments, [few]).note(site) is None


def left_by_hand(one, other, kept, ridge):
    """The squared error of a regression by numpy from some rows, on others."""
    x, mean = (one - one.mean(0)), one.mean(0)
    among = x[:, kept].T @ x[:, kept]
    slope = np.linalg.solve(among + ridge * np.diag(among.diagonal()), x[:, kept].T @ x[:, ~kept])
    return np.square((other - mean)[:, ~kept] - (other - mean)[:, kept] @ slope).sum()


@pytest.mark.parametrize("examples", [6, 14, 60, 400])
def test_the_ridge_is_the_one_that_does_best_on_examples_held_out(examples):
    """Whatever the batches, the ranks and what has no example; the more examples, the less of it."""
    x = tiny.mixed(2000).double()[:, [0, 1, 4, 5, 6, 7, 8, 9]].view(400, 5, 8)[:examples]
    x = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    even, odd, kept = x[::2].flatten(0, 1).numpy(), x[1::2].flatten(0, 1).numpy(), np.arange(8) % 2 == 0
    pairs = [(one, other, half) for one, other in ((even, odd), (odd, even)) for half in (kept, ~kept)]
    left = [sum(left_by_hand(*pair, ridge) for pair in pairs) for ridge in RIDGES]
    found = []
    for split in ([list(range(examples))], torch.randperm(examples).tensor_split(3)):
        ranks = [Covariance(8), Covariance(8)]
        for number, indices in enumerate(split):
            index = torch.as_tensor(indices)
            padded = torch.cat([x[index], torch.full((1, 5, 8), torch.nan)])
            valid = torch.tensor([True] * len(index) + [False]).unsqueeze(1)
            ranks[number % 2].update(padded, valid, torch.cat([index, torch.tensor([-1])]))
        ranks[0].merge_state(ranks[1])
        whole = ranks[0].covariance
        ranks[0].reduce()
        torch.testing.assert_close(ranks[0].covariance, whole)
        found.append(ranks[0].ridge)
    assert found == [RIDGES[int(np.argmin(left))]] * 2
    assert len(ranks[0].sums) == 1


def test_where_nothing_can_be_held_out_the_ridge_is_a_hundredth():
    alone = Covariance(4)
    alone.update(torch.randn(1, 30, 4))
    assert alone.ridge == 0.01


def test_heads_share_a_ridge():
    """That of both together, which each of them alone may not have."""
    x, one = tiny.mixed(400).view(40, 10, 12), Site("attn.proj", 6, heads=1)
    both = tiny.gathered(Site("attn.proj", 12, heads=2), [x], HeadCovariance)[HeadCovariance]
    alone = [tiny.gathered(one, [half], HeadCovariance)[HeadCovariance] for half in x.split(6, -1)]
    assert min(own.ridge for own in alone) <= both.ridge <= max(own.ridge for own in alone)


def test_a_reset_forgets_and_goes_on():
    batch = tiny.mixed().unsqueeze(0)
    once, again = Covariance(12), Covariance(12)
    once.update(batch)
    again.update(batch + 1)
    again.reset()
    again.update(batch)
    assert torch.equal(once.covariance, again.covariance)
    assert torch.equal(Covariance(12)(batch), once.covariance)
