"""What the calibration found out about each neuron."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from lightning_ablate import AblationCallback, Calibration, Site
from lightning_ablate.results import neurons
from lightning_ablate.statistics import Histogram, Moments
from tests import reference, tiny


def calibrated(activations, kinds=(Moments, Histogram), heads=None):
    made = Calibration(sites=[Site(name, x.shape[1], heads) for name, x in activations.items()])
    for site, x in zip(made.sites, activations.values(), strict=True):
        found = tiny.gathered(site, [x.unsqueeze(0)], *kinds)
        for kind in kinds:
            made.add(site, found[kind])
    return made


def test_the_table_is_numpys_on_raw_activations(tmp_path):
    _, made = tiny.fit(tmp_path, callback=AblationCallback(["peak"], [0.5], [1]))
    found = pd.read_parquet(made.folder / "neurons.parquet")
    paths = [f"transformer.h.{n}.attn.c_proj" for n in range(2)]
    raw = list(reference.raw_activations(tiny.gpt2(), tiny.loader(seed=1), paths).values())
    values, peak = torch.cat(raw, 1).double().numpy(), torch.cat([reference.peaks(x) for x in raw]).numpy()
    assert found["site"].tolist() == [paths[0]] * 16 + [paths[1]] * 16
    assert found["neuron"].tolist() == [*range(16), *range(16)]
    expected = [values.mean(0), values.std(0), stats.skew(values), stats.kurtosis(values), values.min(0), values.max(0)]
    expected += [(values == 0).mean(0), peak, np.abs(peak), np.abs(values.mean(0) - peak)]
    names = "mean sd skewness excess_kurtosis minimum maximum zeros peak abs_peak abs_mean_minus_peak".split()
    for name, column in zip(names, expected, strict=True):
        np.testing.assert_allclose(found[name], column, rtol=1e-4, atol=1e-5, err_msg=name)
    assert set(found["positions"]) == {len(values)}
    np.testing.assert_allclose(found["median"], np.median(values, 0), atol=0.05 * np.ptp(values))
    for name in ("mode", "half_sample_mode"):
        assert ((found[name] >= values.min(0)) & (found[name] <= values.max(0))).all()


def test_what_needs_a_histogram_is_there_after_two_epochs_and_files_come_back(tmp_path, drawn):
    activations = {"a": torch.randn(99, 5), "b": torch.randn(99, 3)}
    columns = ["site", "neuron", "positions", "mean", "sd", "skewness", "excess_kurtosis", "minimum", "maximum"]
    more = ["zeros", "peak", "mode", "median", "half_sample_mode", "abs_mean_minus_peak", "abs_peak"]
    both = ([Moments], columns, ["parquet"]), ([Moments, Histogram], columns + more, ["parquet", "png", "svg"])
    for kinds, names, endings in both:
        table = neurons.save(calibrated(activations, kinds), "a model", tmp_path, ["png", "svg"])
        assert list(table) == names
        assert sorted(path.name for path in tmp_path.glob("neurons.*")) == [f"neurons.{one}" for one in endings]
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "neurons.parquet"), table)


def test_the_histograms_are_those_of_the_least_normal_neurons(tmp_path):
    x = torch.randn(500, 12)
    x[:, 7] = x[:, 7].exp().pow(2)
    calibration = calibrated({"here": x})
    table = neurons.save(calibration, "a model", tmp_path)
    panels = neurons.plot(table, calibration, "a model").axes
    distance = stats.skew(x.double()) ** 2 / 6 + stats.kurtosis(x.double()) ** 2 / 24
    shown = [int(axes.get_title().partition("neuron ")[2].partition("\n")[0]) for axes in panels]
    assert shown == distance.argsort()[::-1][:8].tolist() and shown[0] == 7
    of_heads = neurons.plot(table, calibrated({"here": x}, heads=3), "a model").axes[0]
    assert of_heads.get_title().startswith("here, neuron 7 (head 1, dim 3)\n")
    assert f"neuron 7\nskewness {table['skewness'][7]:.2f}" in panels[0].get_title()
    counts, edges = np.histogram(x[:, 7].numpy(), 125)
    heights, drawn_edges, _ = panels[0].patches[0].get_data()
    assert drawn_edges == pytest.approx(edges, rel=1e-5) and np.abs(heights - counts).sum() <= 4  # rounding at edges
