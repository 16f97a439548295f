"""What holds for every statistic."""

import pytest
import torch

from lightning_ablate.errors import StatisticsError
from lightning_ablate.statistics import Covariance, Histogram, MeanByPosition, Moments

EVERY = pytest.mark.parametrize("kind", [Moments, Histogram, Covariance, MeanByPosition])


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def same(one, other):
    ours, theirs = one.metric_state, other.metric_state
    return all(torch.equal(state, theirs[name]) for name, state in ours.items())


@EVERY
def test_padding_never_enters(kind, gathered):
    x = draw(5, 40, 6)
    valid = draw(5, 40) < 0.5
    statistic = gathered(kind, [x.masked_fill(~valid.unsqueeze(2), torch.nan)], valid)
    statistic.check()
    if kind is Covariance:  # which tells the examples apart
        torch.testing.assert_close(statistic.covariance, gathered(kind, [x[valid]]).covariance)
    elif kind is not MeanByPosition:  # which tells the positions apart
        assert same(statistic, gathered(kind, [x[valid]]))
    before = gathered(kind, [x])
    before.update(torch.full_like(x, torch.nan), torch.zeros_like(valid))
    assert same(before, gathered(kind, [x]))


@EVERY
def test_statistics_survive_their_state_dict_and_do_not_write_the_targets_activations(kind, gathered):
    x, copy = draw(5, 40, 6, dtype=torch.float64), kind(6)
    statistic = gathered(kind, [x])
    assert torch.equal(x, draw(5, 40, 6, dtype=torch.float64))
    statistic.reduce()
    copy.load_state_dict(statistic.state_dict())
    assert same(statistic, copy)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_activations_that_are_not_finite_and_no_position_at_all_are_told(bad):
    x, statistic = draw(5, 40, 6), Moments(6)
    assert bool(statistic.finite())
    with pytest.raises(StatisticsError, match="no position that isn't padding"):
        statistic.check()
    x[3, 7, 2] = bad
    statistic.update(x)
    assert not bool(statistic.finite())


@pytest.mark.parametrize(
    ("shape", "valid", "count"),
    [((4, 3, 5, 6), [[1], [0], [1], [1]], 45), ((6, 4, 6), [[1], [1], [0]], 16), ((3, 6), [[1, 0], [1, 1], [0, 0]], 2)],
)
def test_valid_broadcasts_over_patches_windows_and_pooled_examples(shape, valid, count, gathered):
    x = draw(*shape)
    statistic = gathered(Moments, [x], torch.tensor(valid, dtype=torch.bool))
    kept = x[[0, 2, 3]] if len(x) == 4 else x[: len(x) * 2 // 3]
    torch.testing.assert_close(statistic.mean, kept.double().flatten(0, -2).mean(0))
    assert int(statistic.count) == count


@pytest.mark.parametrize("shape", [(12, 3, 6), (3, 11, 6), (5, 12, 6)])  # positions first, too few, other examples
def test_activations_of_another_form_than_the_mask_tells_are_refused(shape):
    with pytest.raises(StatisticsError, match="3 examples of 12 positions are expected"):
        Moments(6).update(draw(*shape), torch.ones(3, 12, dtype=torch.bool))
