import numpy as np
import pytest
import torch

from lightning_ablate.statistics import Moments


def standardised(column):
    """Mean, standard deviation, skewness and excess kurtosis in extended precision, the last two 0 for a constant."""
    column = column.astype(np.longdouble)
    if column.min() == column.max():
        return column[0], 0.0, 0.0, 0.0
    deviation = column - column.mean()
    sd = np.sqrt((deviation**2).mean())
    return column.mean(), sd, (deviation**3).mean() / sd**3, (deviation**4).mean() / sd**4 - 3


def test_moments_are_those_of_extended_precision_and_extremes_exact_in_every_way(adversarial, every_way):
    expected = [standardised(column) for column in adversarial.double().numpy().T]
    ends = adversarial.double().aminmax(dim=0)
    for statistic in every_way(Moments, adversarial):
        assert int(statistic.count) == len(adversarial)
        assert torch.equal(statistic.low, ends.min) and torch.equal(statistic.high, ends.max)
        for found, (mean, sd, skewness, kurtosis) in zip(statistic.compute().T.tolist(), expected, strict=True):
            assert abs(found[0] - mean) <= 1e-10 * sd
            assert found[1] == pytest.approx(float(sd), rel=1e-10, abs=0)
            assert found[2] == pytest.approx(float(skewness), rel=1e-8, abs=1e-8)
            assert found[3] == pytest.approx(float(kurtosis), rel=1e-8, abs=1e-8)
