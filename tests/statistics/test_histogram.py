import numpy as np
import pytest
import torch

from lightning_ablate.errors import StatisticsError
from lightning_ablate.statistics import Histogram
from tests import reference


def papers(histogram):
    """The counts in the paper's bins, ten of ours each."""
    return histogram.counts.unflatten(1, (100, 10)).sum(2).numpy()


def test_ten_bins_are_one_of_numpys_and_the_peak_is_its_fullest(adversarial, gathered):
    histogram = gathered(Histogram, adversarial.split(50))
    histogram.check()
    for neuron, column in enumerate(adversarial.double().T):
        near = 1e-12 * float(column.max() - column.min())
        peak = histogram.centres.peak[neuron].item()
        assert peak == pytest.approx(reference.peak(column), rel=1e-12 * (near > 0), abs=near)
        if near:
            assert np.array_equal(papers(histogram)[neuron], np.histogram(column, bins=100)[0])


def test_counts_are_identical_in_every_way(adversarial, every_way):
    whole, *others = every_way(Histogram, adversarial)
    assert whole.counts.sum(1).tolist() == [len(adversarial)] * 10
    assert whole.zeros.tolist() == (adversarial == 0).sum(0).tolist()
    for other in others:
        assert torch.equal(other.counts, whole.counts) and torch.equal(other.zeros, whole.zeros)
        assert torch.equal(other.compute(), whole.compute())


@pytest.mark.parametrize(("low", "high", "step"), [(-128, 129, 2**-6), (0, 101, 1), (-3, 998, 0.1), (7, 50, 1e-30)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_on_a_grid_fall_where_numpy_puts_them(gathered, low, high, step, dtype):
    x = (step * torch.arange(low, high, dtype=torch.float64).unsqueeze(1)).to(dtype)
    assert np.array_equal(papers(gathered(Histogram, [x]))[0], np.histogram(x.double(), bins=100)[0])


def test_values_on_the_edges_belong_to_the_bin_above(gathered):
    """There a division by the width lands on either side of a whole number."""
    low, high = np.sort(np.random.default_rng(0).normal(size=(2, 50)), axis=0)
    edges = low + np.arange(1001)[:, None] / 10 * ((high - low) / 100)
    assert (np.floor((edges - low) / ((high - low) / 1000)) != np.arange(1001)[:, None]).sum() > 1000
    inner = edges[1:1000]
    for values, ends in ((inner, [1, 2]), (np.nextafter(inner, low), [2, 1])):
        counts = gathered(Histogram, [torch.tensor(np.vstack([low, values, high]))]).counts
        assert counts[:, [0, -1]].tolist() == [ends] * 50 and bool((counts[:, 1:-1] == 1).all())


def test_ties_go_to_the_lowest_bin_and_zeros_have_no_sign(gathered):
    histogram = gathered(Histogram, [torch.tensor([[0.0, -0.0, 1.0, 0.255, 0.255, 0.705, 0.255, 0.705, 0.705]]).T])
    assert histogram.centres.peak.item() == pytest.approx(0.255, abs=1e-9) and histogram.zeros.tolist() == [2]


@pytest.mark.parametrize("other", [2.0, torch.nan, torch.inf])
def test_other_data_than_the_range_was_of_are_refused(gathered, other):
    x = torch.linspace(-1, 1, 40).view(10, 4)
    gathered(Histogram, [x * (1 + 1e-6)], first=[x]).check()
    changed = x.clone()
    changed[3:5, 2] = other
    with pytest.raises(StatisticsError, match="2 activations lie outside the range of the first calibration epoch"):
        gathered(Histogram, [changed], first=[x]).check()


def test_what_is_left_is_small_and_tells_the_same(adversarial, gathered):
    histogram, copy = gathered(Histogram, [adversarial]), Histogram(10)
    before = histogram.compute()
    # for any number of positions
    assert sum(state.nbytes for state in histogram.metric_state.values()) == 10 * 8 * (2 * 1000 + 3) + 8
    histogram.reduce()
    copy.load_state_dict(histogram.state_dict())
    assert sum(tensor.nbytes for tensor in histogram.state_dict().values()) == 10 * 8 * (2 + 4 + 1) + 8
    for one in (histogram, copy):
        found = one.described()
        assert torch.equal(found, before) and not one.counts.numel()


def test_the_median_of_heavy_tails_is_exact_to_a_bin_of_the_middle(gathered):
    """1,000 bins between minimum and maximum are off by up to 0.03 standard deviations here."""
    x = torch.tensor(np.random.default_rng(0).standard_t(1.7, size=(20_001, 30)) * 10.0 ** np.arange(-15, 15))
    found, sd = gathered(Histogram, x.split(700)).centres.median, x.std(0, correction=0)
    assert float(((found - x.median(0).values) / sd).abs().max()) < 5e-4
    few = torch.tensor([[-1.0, 0.0], [1.0, 1e30], [1.0, 3.0], [5.0, 3.0]])
    places = gathered(Histogram, [few]).centres.median
    assert places[0].item() == pytest.approx(1.0, abs=0.01) and places[1] < 1e27


def test_quantiles_are_those_of_torch_to_half_a_bin_and_the_values_rank_by_rank(adversarial, gathered):
    histogram, x, shares = gathered(Histogram, adversarial.split(50)), adversarial.double(), torch.linspace(0, 1, 41)
    found, expected = histogram.quantile(shares), torch.quantile(x, shares.double(), dim=0)
    assert found.shape == (41, 10) and found.dtype == torch.float32
    bins = (histogram.high - histogram.low) / 1000
    rounding = 1e-6 * expected.abs() + torch.finfo(torch.float32).tiny
    assert bool(((found - expected).abs() <= (0.5 + 1e-6) * bins + rounding)[:, :8].all())  # the rest is beyond float32
    assert torch.equal(histogram.quantile(0.5), histogram.quantile(torch.tensor([0.5]))[0])


def test_quantiles_by_hand_and_where_there_are_none(gathered):
    histogram = gathered(Histogram, [torch.tensor([[0.0], [0.2505], [0.2505], [1.0]])])
    # the centres of bins 0, 250 and 999; 0.9 is the rank 2.7
    expected = [0.0005, 0.2505, 0.3 * 0.2505 + 0.7 * 0.9995]
    assert histogram.quantile(torch.tensor([0.0, 0.5, 0.9])).flatten().tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match="q is 1.5, expected shares from 0 to 1"):
        histogram.quantile(1.5)
    histogram.reduce()
    with pytest.raises(StatisticsError, match="ask for quantiles before"):
        histogram.quantile(0.5)
