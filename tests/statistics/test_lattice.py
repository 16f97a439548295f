import math

import numpy as np
import pytest
import torch

from lightning_ablate.methods import HalfSampleMode as HalfSampleModeMethod
from lightning_ablate.methods import Median as MedianMethod
from lightning_ablate.methods import method_named
from lightning_ablate.statistics import (
    HalfSampleMode,
    LatticeHistogram,
    Magnitude,
    Median,
    Moments,
    OnePassPeak,
    RangeHistogram,
    SiteStatistics,
    SmoothedMode,
    count_modes,
)
from tests.benchmarks import peaks

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LARGEST = {torch.float16: 6e4, torch.bfloat16: 1e38, torch.float32: 1e38, torch.float64: 1e300}
SMALLEST = {torch.float16: 1e-6, torch.bfloat16: 1e-37, torch.float32: 1e-37, torch.float64: 1e-300}
NEURONS = 10
NAMES = ["mode", "half-sample-mode", "median", "one-pass-peak"]


def adversarial(dtype, seed):
    """Normal, far from zero, tiny, skewed, constant, half of it zeros, all zeros, one outlier, huge, both signs."""
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(2, 500, (), generator=generator))
    x = torch.randn(n, NEURONS, generator=generator, dtype=torch.float64)
    x[:, 1] += 1000
    x[:, 2] *= SMALLEST[dtype]
    x[:, 3] = x[:, 3].exp().pow(3)
    x[:, 4] = -2.5
    x[:, 5] = x[:, 5].relu()
    x[:, 6] = 0
    x[n // 2, 7] = 3e4
    x[:, 8] *= LARGEST[dtype] / 10
    x[:, 9] = x[:, 9].sign() * (5 + x[:, 9].abs() / 1000)
    return x.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)


def gathered(parts):
    statistic = LatticeHistogram(NEURONS)
    for part in parts:
        statistic.update(part.unsqueeze(0))
    return statistic


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(25))
def test_the_histogram_is_identical_for_every_split_into_batches_and_ranks(dtype, seed):
    x = adversarial(dtype, seed)
    whole = gathered([x])
    generator = torch.Generator().manual_seed(seed)
    shuffled = x[torch.randperm(len(x), generator=generator)]
    cuts = torch.randint(1, len(x), (5,), generator=generator).unique().tolist()
    parts = shuffled.tensor_split(cuts)
    assert torch.equal(gathered(parts).lattice, whole.lattice)
    ranks = torch.stack([gathered(parts[rank::3]).lattice for rank in range(3)])  # a rank may get nothing
    assert torch.equal(LatticeHistogram(NEURONS)._reductions["lattice"](ranks), whole.lattice)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(5))
def test_counts_equal_numpys_on_the_least_lattice_that_holds_them(dtype, seed):
    x = adversarial(dtype, seed)
    statistic = gathered(x.split(50))
    found = statistic.histogram
    digits = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23, torch.float64: 28}[dtype]
    for neuron in range(NEURONS):
        column = x[:, neuron].double().numpy()
        low, high = column.min(), column.max()
        assert (found.low[neuron], found.high[neuron]) == (low, high)
        assert int(found.zeros[neuron]) == int((column == 0).sum())
        if not column.any():
            assert int(found.counts[neuron].sum()) == 0
            continue
        exponent = max(math.frexp(np.abs(column).max())[1] - 1 - digits, -126)
        while np.floor(np.ldexp(high, -exponent)) - np.floor(np.ldexp(low, -exponent)) >= 1024:
            exponent += 1
        first, places = np.floor(np.ldexp(low, -exponent)), np.floor(np.ldexp(column[column != 0], -exponent))
        assert found.width[neuron] == np.ldexp(1.0, exponent)
        assert found.start[neuron] == np.ldexp(first, exponent)
        counts = np.bincount((places - first).astype(int), minlength=1024)
        assert np.array_equal(found.counts[neuron].numpy(), counts)


def test_padding_and_empty_batches_add_nothing():
    x = adversarial(torch.float32, 0)[:40].view(4, -1, NEURONS)
    valid = torch.rand(x.shape[:2]) < 0.6
    padded, statistic = x.masked_fill(~valid.unsqueeze(2), torch.nan), LatticeHistogram(NEURONS)
    statistic.update(padded, valid)
    statistic.update(padded, torch.zeros_like(valid))
    assert torch.equal(statistic.lattice, gathered([x[valid]]).lattice) and bool(statistic.finite())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_told(bad):
    x = adversarial(torch.float32, 1)
    x[1, 3] = bad
    assert not bool(gathered([x]).finite())


def test_values_too_small_beside_others_keep_their_side_of_zero():
    for values in ([1e38, -1e-30], [-4095.0, -1e-45], [1e38, -1e38, 1e-38, -1e-38]):
        x = torch.tensor(values).repeat(NEURONS, 1).T
        one = gathered([x])
        assert torch.equal(gathered(x.flip(0).split(1)).lattice, one.lattice)
        assert one.histogram.counts.sum(1).tolist() == [len(values)] * NEURONS


def test_updates_leave_the_activations_alone():
    x = torch.randn(1, 30, NEURONS, dtype=torch.float64)
    before = x.clone()
    for kind in (LatticeHistogram, Moments, Magnitude):
        kind(NEURONS).update(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("step", [1.0, 0.3, 1e-30])
def test_the_bound_holds_for_zeros_on_the_papers_edges(step):
    for low, high in ((-3, 27), (-1, 9), (-7, 13), (-1, 1), (-20, 80), (-5, 45)):
        values = [low, high, 0, 0, 0, *[(high - low) / 100 * 0.5 + 1e-3] * 2]
        x = (step * torch.tensor(values)).repeat(NEURONS, 1).T
        first = gathered([x])
        second = RangeHistogram(NEURONS, SiteStatistics("here", {LatticeHistogram: first}))
        second.update(x.unsqueeze(0))
        off = (OnePassPeak()(first.histogram) - second.peak()).abs()
        assert bool((off <= OnePassPeak().error(first.histogram) + 1e-9 * step).all()), (low, high)


@pytest.mark.parametrize("estimator", [SmoothedMode(), HalfSampleMode(), Median()])
def test_estimates_lie_between_minimum_and_maximum(estimator):
    clipped = torch.cat([6 * torch.rand(100), torch.full((300,), 6.0)])
    assert estimate(estimator, clipped.tolist())[0] <= 6.0
    assert estimate(estimator, [-1.0] * 5, [0.1] * 5) == [-1.0, 0.1]


def test_zeros_of_both_signs_are_the_same():
    x = torch.tensor([0.0, -0.0, 1.0]).repeat(NEURONS, 1).T
    for order in ([0, 1, 2], [1, 0, 2], [2, 1, 0]):
        found = gathered(x[order].split(1))
        assert torch.equal(found.lattice, gathered([x]).lattice) and found.histogram.zeros.tolist() == [2] * NEURONS


def test_memory_does_not_grow_with_the_positions():
    statistic = LatticeHistogram(NEURONS)
    sizes = set()
    for seed in range(4):
        statistic.update(adversarial(torch.float32, seed).repeat(50, 1).unsqueeze(0))
        sizes.add(sum(state.numel() * state.element_size() for state in statistic.state_dict().values()))
    assert sizes == {NEURONS * (1024 + 6) * 4}


def test_low_precision_does_not_comb():
    """Rounded to bfloat16, a smooth density keeps its mode; no bin between is empty."""
    x = (1.5 + 0.1 * torch.randn(200_000, 1)).bfloat16()
    statistic = LatticeHistogram(1)
    statistic.update(x.unsqueeze(0))
    histogram = statistic.histogram
    middle = (histogram.values[0] > 1.4) & (histogram.values[0] < 1.6)
    assert int(histogram.counts[0, middle].min()) > 0
    assert SmoothedMode()(histogram).item() == pytest.approx(1.5, abs=0.01)
    total = (histogram.counts[0] * histogram.values[0]).sum() / histogram.counts.sum()
    assert total.item() == pytest.approx(x.double().mean().item(), abs=2e-3)


def estimate(estimator, *columns):
    x = torch.tensor(columns, dtype=torch.float64).T
    statistic = LatticeHistogram(x.shape[1])
    statistic.update(x.unsqueeze(0))
    return estimator(statistic.histogram).tolist()


@pytest.mark.parametrize("estimator", [SmoothedMode(), HalfSampleMode(), Median()])
def test_a_constant_neuron_and_one_that_is_mostly_zero_have_defined_values(estimator):
    constant, zero, mostly, rarely = estimate(
        estimator, [7.0] * 4, [0.0] * 4, [0.0, 0.0, 3.0, 5.0], [0.0, 5.0, 5.0, 5.0]
    )
    assert constant == pytest.approx(7.0, rel=1e-6) and zero == mostly == 0.0
    assert rarely == pytest.approx(5.0, abs=0.02)


def test_median_equals_numpys_to_a_bin():
    x = torch.randn(20_001, 6) * torch.tensor([1.0, 5.0, 0.1, 1.0, 1.0, 1.0]) + torch.tensor([0, 3, -9, 100, 0, 0])
    x[:, 4] = x[:, 4].exp()
    statistic = LatticeHistogram(6)
    statistic.update(x.unsqueeze(0))
    found, width = Median()(statistic.histogram), statistic.histogram.width
    assert bool(((found - x.double().median(0).values).abs() <= width).all())


@pytest.mark.parametrize("name", peaks.DISTRIBUTIONS)
def test_the_smoothed_mode_beats_the_papers_peak(name):
    found = peaks.errors(name, 10_000, neurons=60)
    assert found["mode"] < found["peak"] / 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(10))
def test_the_one_pass_peak_is_within_its_stated_bound_of_the_exact_one(dtype, seed):
    x = adversarial(dtype, seed)
    first = gathered([x])
    second = RangeHistogram(NEURONS, SiteStatistics("here", {LatticeHistogram: first}))
    second.update(x.unsqueeze(0))
    histogram, peak = first.histogram, OnePassPeak()
    off = (peak(histogram) - second.peak()).abs()
    size = torch.maximum(histogram.low.abs(), histogram.high.abs())
    assert bool((off <= peak.error(histogram) + 1e-12 * size).all())


@pytest.mark.parametrize("name", peaks.DISTRIBUTIONS)
def test_the_one_pass_peak_is_mostly_the_exact_one_and_its_bound_of_use(name):
    x = peaks.DISTRIBUTIONS[name][0]((20_000, 100))
    first = LatticeHistogram(100)
    first.update(x)
    second = RangeHistogram(100, SiteStatistics("here", {LatticeHistogram: first}))
    second.update(x)
    histogram, peak = first.histogram, OnePassPeak()
    error, off = peak.error(histogram), (peak(histogram) - second.peak()).abs()
    assert bool((off <= error + 1e-9).all())
    assert (off < 1e-9).double().mean() > 0.6
    assert bool((error <= 0.15 * (histogram.high - histogram.low)).all())


@pytest.mark.parametrize(
    ("modes", "draw"),
    [
        (1, torch.randn),
        (1, torch.rand),
        (1, lambda *shape: torch.randn(*shape).exp()),
        (1, lambda *shape: torch.randn(*shape).relu()),
        (2, lambda *shape: torch.randn(*shape) + 4 * (torch.rand(shape) < 0.3)),
        (2, lambda *shape: torch.where(torch.rand(shape) < 0.3, 0.0, torch.randn(*shape) + 5)),
        (3, lambda *shape: torch.randn(*shape) + 5 * torch.randint(3, shape)),
    ],
)
def test_modes_are_those_of_the_density_drawn_from(modes, draw):
    statistic = LatticeHistogram(100)
    statistic.update(draw(10_000, 100))
    assert int((count_modes(statistic.histogram) == modes).sum()) >= 98


def test_a_constant_neuron_has_one_mode():
    statistic = LatticeHistogram(2)
    statistic.update(torch.tensor([[0.0, 7.0], [0.0, 7.0]]))
    assert count_modes(statistic.histogram).tolist() == [1, 1]


def test_methods_take_the_estimates(tmp_path):
    from lightning_ablate import AblationCallback
    from tests import tiny

    module, callback = tiny.fit(tmp_path, callback=AblationCallback(NAMES, [0.5], [1]))
    assert module.trainer.current_epoch <= 1 and len(callback.results.rows) == 5
    assert isinstance(method_named("median"), MedianMethod)
    assert isinstance(method_named("half-sample-mode"), HalfSampleModeMethod)
    site = module.calibration.sites[0]
    raw = []
    model = tiny.gpt2()
    model.get_submodule(site.path).register_forward_pre_hook(lambda _, inputs: raw.append(inputs[0]))
    valid = []
    with torch.no_grad():
        for batch in tiny.loader(seed=1):
            model(batch["input_ids"], attention_mask=batch["attention_mask"])
            valid.append(batch["attention_mask"].bool())
    values = torch.cat([x[v] for x, v in zip(raw, valid, strict=True)]).double().numpy()
    histogram = module.calibration[site][LatticeHistogram].histogram
    found = Median()(histogram).numpy()
    assert (np.abs(found - np.quantile(values, 0.5, axis=0)) <= np.ptp(values, axis=0) / 20).all()
