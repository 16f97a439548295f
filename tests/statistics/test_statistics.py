import numpy as np
import pytest
import torch

from lightning_ablate.errors import StatisticsError
from lightning_ablate.statistics import LatticeHistogram, Magnitude, Moments, RangeHistogram, SiteStatistics
from tests.statistics.test_lattice import adversarial

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
    moments, bounds = Moments(NEURONS), LatticeHistogram(NEURONS)
    for part, some in zip(parts, valid, strict=True):
        moments.update(part, some)
        bounds.update(part, some)
    histogram = RangeHistogram(NEURONS, SiteStatistics("here", {LatticeHistogram: bounds}))
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
    assert np.array_equal(bounds.low.numpy(), columns.min(0)) and np.array_equal(bounds.high.numpy(), columns.max(0))
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
    bounds = LatticeHistogram(1)
    bounds.update(x)
    histogram = RangeHistogram(1, SiteStatistics("here", {LatticeHistogram: bounds}))
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
        bounds = LatticeHistogram(1)
        bounds.update(x)
        histogram = RangeHistogram(1, SiteStatistics("here", {LatticeHistogram: bounds}))
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
        torch.testing.assert_close(whole[0].mean, split[0].mean, rtol=1e-12, atol=1e-30)


def test_padding_never_enters():
    x, poisoned = activations(), activations()
    valid = torch.rand(5, 40) < 0.7
    poisoned[~valid] = torch.nan
    kept = x[valid].unsqueeze(0)
    masked, alone = gathered([poisoned], [valid]), gathered([kept])
    assert torch.equal(masked[0].parts, alone[0].parts)
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
    for statistic in (Moments(NEURONS), LatticeHistogram(NEURONS), Magnitude(NEURONS)):
        assert bool(statistic.finite())
        statistic.update(x)
        assert not bool(statistic.finite())


def test_histogram_refuses_other_data_than_the_range_was_of():
    x = activations()
    bounds = LatticeHistogram(NEURONS)
    bounds.update(x)
    histogram = RangeHistogram(NEURONS, SiteStatistics("here", {LatticeHistogram: bounds}))
    histogram.update(2 * x)
    with pytest.raises(StatisticsError, match="outside the range of the first calibration epoch"):
        histogram.check()


def test_ties_go_to_the_lowest_bin():
    x = torch.tensor([0.0, 1.0, 0.255, 0.255, 0.705, 0.705]).view(1, -1, 1)
    bounds = LatticeHistogram(1)
    bounds.update(x)
    histogram = RangeHistogram(1, SiteStatistics("here", {LatticeHistogram: bounds}))
    histogram.update(x)
    assert histogram.peak().item() == pytest.approx(0.255, abs=1e-9)


def test_statistics_survive_their_state_dict():
    for statistic in gathered([activations()]):
        copy = type(statistic)(NEURONS)
        copy.load_state_dict(statistic.state_dict())
        for name, value in statistic.state_dict().items():
            assert torch.equal(copy.state_dict()[name], value)


def test_missing_statistic_says_what_to_do():
    with pytest.raises(StatisticsError, match="needs the statistic LatticeHistogram of the site here.*run `fit`"):
        SiteStatistics("here", {})[LatticeHistogram]


def test_epoch_follows_from_what_a_statistic_needs():
    assert (Moments.epoch(), LatticeHistogram.epoch(), RangeHistogram.epoch()) == (0, 0, 1)


def standardised(column):
    """Mean, standard deviation, skewness and excess kurtosis in extended precision, the last two 0 for a constant."""
    column = column.astype(np.longdouble)
    deviation = column - column.mean()
    sd = np.sqrt((deviation**2).mean())
    if column.min() == column.max():
        return column[0], 0.0, 0.0, 0.0
    return column.mean(), sd, (deviation**3).mean() / sd**3, (deviation**4).mean() / sd**4 - 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(10))
def test_moments_are_those_of_extended_precision_for_every_split_into_batches_and_ranks(dtype, seed):
    x = adversarial(dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    shuffled = x[torch.randperm(len(x), generator=generator)]
    cuts = torch.randint(1, len(x), (5,), generator=generator).unique().tolist()
    parts = shuffled.tensor_split(cuts)
    whole, split, ranks = Moments(x.shape[1]), Moments(x.shape[1]), [Moments(x.shape[1]) for _ in range(3)]
    whole.update(x.unsqueeze(0))
    for number, part in enumerate(parts):
        for statistic in (split, ranks[number % 2]):  # the third rank gets nothing
            statistic.update(part.unsqueeze(0))
    merged = Moments(x.shape[1])  # by the reduction that the state declares
    merged.parts = merged._reductions["parts"](torch.stack([rank.parts for rank in ranks]))
    expected = [standardised(column) for column in x.double().numpy().T]
    for statistic in (whole, split, merged):
        figures = statistic.mean, statistic.sd, statistic.skewness, statistic.kurtosis
        found = torch.stack(figures).numpy()
        for neuron, (mean, sd, skewness, kurtosis) in enumerate(expected):
            assert abs(found[0, neuron] - mean) <= 1e-10 * sd
            assert found[1, neuron] == pytest.approx(float(sd), rel=1e-10)
            assert found[2, neuron] == pytest.approx(float(skewness), abs=1e-8)
            assert found[3, neuron] == pytest.approx(float(kurtosis), abs=1e-8, rel=1e-8)


def test_magnitude_equals_numpy():
    x, magnitude = activations().flatten(0, 1), Magnitude(NEURONS)
    for part in x.split(70):
        magnitude.update(part.unsqueeze(0))
    np.testing.assert_allclose(magnitude.mean.numpy(), np.abs(x.double().numpy()).mean(0), rtol=1e-12)


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
