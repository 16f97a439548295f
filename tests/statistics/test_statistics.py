import numpy as np
import pytest
import torch

from lightning_ablate.errors import StatisticsError
from lightning_ablate.statistics import Magnitude, Moments, Range, RangeHistogram, SiteStatistics, Spread

NEURONS = 6


def activations(dtype=torch.float32, rows=(5, 40)):
    """Neurons of unlike shapes: normal, far from zero, tiny, skewed, constant, and half of them exactly 0."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*rows, NEURONS, generator=generator)
    x[..., 1] = 1000 + x[..., 1]
    x[..., 2] *= 1e-20
    x[..., 3] = x[..., 3].exp()
    x[..., 4] = -2.5
    x[..., 5] = x[..., 5].relu()
    return x.to(dtype)


def gathered(parts, valid=None):
    """All three statistics of the activations, given part by part in two epochs."""
    valid = valid or [None] * len(parts)
    moments, bounds = Moments(NEURONS), Range(NEURONS)
    for part, some in zip(parts, valid, strict=True):
        moments.update(part, some)
        bounds.update(part, some)
    histogram = RangeHistogram(NEURONS, SiteStatistics("here", {Range: bounds}))
    for part, some in zip(parts, valid, strict=True):
        histogram.update(part, some)
    return moments, bounds, histogram


def peak_by_numpy(column):
    """The paper's peak of one neuron, with numpy's own histogram."""
    column = np.asarray(column, dtype=np.float64)
    if column.min() == column.max():
        return column.min()
    counts, edges = np.histogram(column, bins=100, range=(column.min(), column.max()))
    fullest = int(counts.argmax())
    return (edges[fullest] + edges[fullest + 1]) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_equal_numpy(dtype):
    x = activations(dtype)
    moments, bounds, histogram = gathered(list(x.split(2)))
    columns = x.double().flatten(0, 1).numpy()
    np.testing.assert_allclose(moments.mean.numpy(), columns.mean(0), rtol=1e-12)
    assert int(moments.count) == 200
    low, high = bounds.compute()
    assert np.array_equal(low.numpy(), columns.min(0)) and np.array_equal(high.numpy(), columns.max(0))
    for neuron in range(NEURONS):
        column = columns[:, neuron]
        if column.min() < column.max():
            counts, _ = np.histogram(column, bins=100, range=(column.min(), column.max()))
            assert np.array_equal(histogram.compute()[neuron].numpy(), counts)
        np.testing.assert_allclose(histogram.peak()[neuron], peak_by_numpy(column), rtol=1e-12)
    histogram.check()
    assert bool(moments.finite() & bounds.finite() & histogram.finite())


def test_values_on_the_edges_of_bins_fall_where_numpy_puts_them():
    """bf16 values lie on a lattice of their own and hit many edges."""
    x = (torch.arange(-128, 129) / 64).to(torch.bfloat16).view(1, -1, 1)
    bounds = Range(1)
    bounds.update(x)
    histogram = RangeHistogram(1, SiteStatistics("here", {Range: bounds}))
    histogram.update(x)
    counts, _ = np.histogram(x.double().flatten().numpy(), bins=100)
    assert np.array_equal(histogram.compute()[0].numpy(), counts)


def test_edges_that_a_division_misses_fall_where_numpy_puts_them():
    """On the edges themselves, (x - low) / step lands on either side of the whole number in about one case of ten."""
    generator = np.random.default_rng(0)
    missed = 0
    for low, high in np.sort(generator.normal(size=(50, 2)), axis=1):
        edges = np.linspace(low, high, 101)
        missed += int((np.floor((edges - low) / ((high - low) / 100)) != np.arange(101)).sum())
        x = torch.from_numpy(edges).view(1, -1, 1)
        bounds = Range(1)
        bounds.update(x)
        histogram = RangeHistogram(1, SiteStatistics("here", {Range: bounds}))
        histogram.update(x)
        assert np.array_equal(histogram.compute()[0].numpy(), np.histogram(edges, bins=100)[0])
    assert missed > 100


def test_statistics_do_not_depend_on_the_split_or_the_order():
    x = activations().flatten(0, 1)
    whole = gathered([x.unsqueeze(0)])
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        shuffled = x[torch.randperm(200, generator=generator)]
        cuts = torch.randint(1, 199, (4,), generator=generator).unique().tolist()
        split = gathered([part.unsqueeze(0) for part in shuffled.tensor_split(cuts)])
        assert torch.equal(whole[2].compute(), split[2].compute())
        assert torch.equal(whole[1].low, split[1].low) and torch.equal(whole[1].high, split[1].high)
        assert int(whole[0].count) == int(split[0].count)
        torch.testing.assert_close(whole[0].total, split[0].total, rtol=1e-12, atol=1e-30)


def test_padding_never_enters():
    x, poisoned = activations(), activations()
    valid = torch.rand(5, 40) < 0.7
    poisoned[~valid] = torch.nan
    kept = x[valid].unsqueeze(0)
    masked, alone = gathered([poisoned], [valid]), gathered([kept])
    assert torch.equal(masked[0].total, alone[0].total) and torch.equal(masked[0].count, alone[0].count)
    assert torch.equal(masked[1].low, alone[1].low) and torch.equal(masked[2].compute(), alone[2].compute())


def test_a_batch_of_padding_alone_adds_nothing():
    x = activations()
    nothing = torch.zeros(5, 1, dtype=torch.bool)
    some, same = gathered([x]), gathered([x, x], [None, nothing])
    assert torch.equal(some[2].compute(), same[2].compute()) and int(same[0].count) == 200
    empty = Moments(NEURONS)
    empty.update(x, nothing)
    with pytest.raises(StatisticsError, match="no position that isn't padding"):
        empty.check()


def test_valid_broadcasts_over_patches_and_windows():
    x = activations(rows=(4, 3, 5))  # (batch, height, width, neurons)
    moments = Moments(NEURONS)
    moments.update(x, torch.tensor([True, False, True, True]).unsqueeze(1))
    torch.testing.assert_close(moments.mean, x[[0, 2, 3]].double().flatten(0, -2).mean(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_finite_is_false_after_a_value_that_is_not(value):
    x = activations()
    x[3, 7, 2] = value
    for statistic in (Moments(NEURONS), Range(NEURONS), Spread(NEURONS), Magnitude(NEURONS)):
        assert bool(statistic.finite())
        statistic.update(x)
        assert not bool(statistic.finite())


def test_histogram_refuses_other_data_than_the_range_was_of():
    x = activations()
    bounds = Range(NEURONS)
    bounds.update(x)
    histogram = RangeHistogram(NEURONS, SiteStatistics("here", {Range: bounds}))
    histogram.update(2 * x)
    with pytest.raises(StatisticsError, match="outside the range of the first calibration epoch"):
        histogram.check()


def test_ties_go_to_the_lowest_bin():
    x = torch.tensor([0.0, 1.0, 0.255, 0.255, 0.705, 0.705]).view(1, -1, 1)
    bounds = Range(1)
    bounds.update(x)
    histogram = RangeHistogram(1, SiteStatistics("here", {Range: bounds}))
    histogram.update(x)
    assert histogram.peak().item() == pytest.approx(0.255, abs=1e-9)


def test_statistics_survive_their_state_dict():
    for statistic in gathered([activations()]):
        copy = type(statistic)(NEURONS)
        copy.load_state_dict(statistic.state_dict())
        for name, value in statistic.state_dict().items():
            assert torch.equal(copy.state_dict()[name], value)


def test_missing_statistic_says_what_to_do():
    with pytest.raises(StatisticsError, match="needs the statistic Range of the site here.*run `fit`"):
        SiteStatistics("here", {})[Range]


def test_epoch_follows_from_what_a_statistic_needs():
    assert (Moments.epoch(), Range.epoch(), RangeHistogram.epoch()) == (0, 0, 1)


def test_spread_and_magnitude_equal_numpy_however_the_activations_are_split():
    x = activations().flatten(0, 1)
    columns = x.double().numpy()
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        shuffled = x[torch.randperm(200, generator=generator)]
        cuts = torch.randint(1, 199, (4,), generator=generator).unique().tolist()
        parts = shuffled.tensor_split(cuts)
        spread, magnitude, ranks = Spread(NEURONS), Magnitude(NEURONS), [Spread(NEURONS), Spread(NEURONS)]
        for number, part in enumerate(parts):
            for statistic in (spread, magnitude, ranks[number % 2]):
                statistic.update(part.unsqueeze(0))
        size = np.abs(columns).max(0)
        np.testing.assert_allclose(spread.sd.numpy() / size, columns.std(0) / size, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(magnitude.mean.numpy(), np.abs(columns).mean(0), rtol=1e-12)
        # ranks are merged by the reduction that the state declares
        merged = Spread(NEURONS)
        merged.parts = merged._reductions["parts"](torch.stack([rank.parts for rank in ranks]))
        np.testing.assert_allclose(merged.sd.numpy(), spread.sd.numpy(), rtol=1e-12, atol=1e-300)


def test_activations_of_another_form_than_the_mask_tells_are_refused():
    valid = torch.ones(3, 12, dtype=torch.bool)
    for shape in ((12, 3, NEURONS), (3, 11, NEURONS), (5, 12, NEURONS)):  # positions first, too few, other examples
        with pytest.raises(StatisticsError, match="3 examples of 12 positions are expected"):
            Moments(NEURONS).update(torch.randn(shape), valid)
    pooled = Moments(NEURONS)
    x = torch.randn(3, NEURONS)
    pooled.update(x, torch.tensor([[True, False], [True, True], [False, False]]))
    torch.testing.assert_close(pooled.mean, x[:2].double().mean(0))
    windows = Moments(NEURONS)
    windows.update(torch.randn(6, 4, NEURONS), torch.tensor([[True], [True], [False]]))
    assert int(windows.count) == 16
