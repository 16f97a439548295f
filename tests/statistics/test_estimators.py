import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d

from lightning_ablate.statistics import Histogram

SHAPE = 10_000, 60


@pytest.fixture
def histogram_of(gathered):
    return lambda x: gathered(Histogram, [torch.from_numpy(x)])


def half_sample_mode(x):
    x = np.sort(x)
    while len(x) > 2:
        half = (len(x) + 1) // 2
        start = (x[half - 1 :] - x[: len(x) - half + 1]).argmin()
        x = x[start : start + half]
    return x.mean()


@pytest.mark.parametrize(
    "draw",
    [
        lambda g: g.normal(5, 2, SHAPE),
        lambda g: g.gamma(3, 1, SHAPE),
        lambda g: np.where(g.random(SHAPE) < 0.7, g.normal(0, 0.5, SHAPE), g.normal(4, 1, SHAPE)),
    ],
)
def test_estimates_equal_the_plain_ones_to_a_bin(draw, histogram_of):
    x = draw(np.random.default_rng(0))
    histogram, width = histogram_of(x), np.ptp(x, axis=0) / 1000
    assert (np.abs(histogram.centres.median.numpy() - np.median(x, axis=0)) <= width).all()
    plain = np.apply_along_axis(half_sample_mode, 0, x)  # other halves may be as short but for the bins
    assert np.median(np.abs(histogram.centres.half_sample_mode.numpy() - plain) / width) < 2
    for neuron in range(5):
        column = x[:, neuron]
        spread = min(column.std(), np.diff(np.quantile(column, [0.25, 0.75]))[0] / 1.349)
        counts, edges = np.histogram(column, bins=1000)
        density = gaussian_filter1d(counts.astype(float), 0.9 * spread * len(x) ** (-1 / 7) / width[neuron], truncate=8)
        top = edges[density.argmax()] + width[neuron] / 2
        assert abs(histogram.centres.mode[neuron] - top) <= 0.6 * width[neuron]


def test_constants_and_atoms_have_defined_values(histogram_of):
    columns = [[7.0] * 4, [0.1] * 4, [0.0] * 4, [0.0, 0.0, 3.0, 5.0], [0.0, 5.0, 5.0, 5.0]]
    histogram = histogram_of(np.array(columns).T)
    for found in histogram.described()[1:4]:
        assert found[:4].tolist() == [7.0, 0.1, 0.0, 0.0]
        assert found[4].item() == pytest.approx(5.0, abs=0.02)
    # all lie between minimum and maximum
    x = np.concatenate([6 * np.random.default_rng(0).random(100), np.full(300, 6.0)])
    found = histogram_of(np.stack([x, -x], 1)).compute()
    assert bool((found[:, 0] <= 6).all() and (found[:, 1] >= -6).all())
