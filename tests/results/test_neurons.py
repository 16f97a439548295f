"""What the calibration found out about each neuron."""

from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from lightning_ablate import AblationCallback, Calibration, Site
from lightning_ablate.results.neurons import Neurons
from lightning_ablate.statistics import Histogram, Moments
from tests import reference, tiny


def neurons_of(activations, kinds=(Moments, Histogram)):
    made = Calibration(sites=[Site(name, x.shape[1]) for name, x in activations.items()])
    for site, x in zip(made.sites, activations.values(), strict=True):
        found = tiny.gathered(site, [x.unsqueeze(0)], *kinds)
        for kind in kinds:
            made.add(site, found[kind])
    return Neurons.of(made, "models/own", "data")


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
    np.testing.assert_allclose(found["median"], np.median(values, 0), atol=0.05 * np.ptp(values))
    for name in ("mode", "half_sample_mode"):
        assert ((found[name] >= values.min(0)) & (found[name] <= values.max(0))).all()
    neurons = Neurons(found, {}, ("model", "data"))
    for name, distance in (("offset", values.mean(0)), ("gap", values.mean(0) - peak)):
        np.testing.assert_allclose(neurons.shape(name), np.abs(distance) / values.std(0), rtol=1e-3, atol=1e-4)


def test_after_one_epoch_there_are_no_columns_that_need_a_histogram_and_files_come_back(tmp_path, drawn):
    activations = {"a": torch.randn(99, 5), "b": torch.randn(99, 3)}
    one, two = neurons_of(activations, [Moments]), neurons_of(activations)
    assert list(one.table) == ["site", "neuron", "mean", "sd", "skewness", "excess_kurtosis", "minimum", "maximum"]
    more = ["zeros", "peak", "mode", "median", "half_sample_mode", "abs_mean_minus_peak", "abs_peak"]
    assert list(two.table) == [*one.table, *more] and two.table[list(one.table)].equals(one.table)
    two.to_tensorboard(writer := Mock())
    told = [(call.args[0], len(call.args[1]), call.args[2]) for call in writer.add_histogram.call_args_list]
    assert len(told) == 8 and told[4:6] == [("neurons/gap", 5, 0), ("neurons/gap", 3, 1)]
    for made in (one, two):
        made.save(tmp_path, ["png", "svg"])
        assert {path.name for path in tmp_path.glob("neurons.*")} == {f"neurons.{e}" for e in ("parquet", "png", "svg")}
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "neurons.parquet"), made.table)


@pytest.mark.parametrize("sites", [5, 30])
def test_a_box_is_seen_for_every_site(sites):
    """Looked for in the picture, by their colour: as many columns of it, apart from one another."""
    figure = neurons_of({f"h.{n}.attn.proj": torch.randn(300, 40).exp() for n in range(sites)}).plot()
    figure.canvas.draw()
    picture = np.asarray(figure.canvas.buffer_rgba())[::-1, :, :3].astype(int)
    assert len(figure.subfigs[0].axes) == 4
    for axes in figure.subfigs[0].axes:
        left, low, right, high = axes.bbox.extents.astype(int)
        boxes = np.abs(picture[low:high, left:right] - (0x56, 0xB4, 0xE9)).sum(2) < 40
        columns = boxes.any(0)
        assert np.count_nonzero(np.diff(columns.astype(int)) == 1) == sites
        assert columns.sum() >= 2 * sites and boxes.any(1).sum() >= 3


def test_the_histograms_are_those_of_the_most_atypical_neurons():
    x = torch.randn(500, 12)
    x[:, 7], x[:, 3] = x[:, 7].exp().pow(2), 7.0
    found = neurons_of({"here": x})
    assert next(iter(found.histograms)) == 7 == found.most_atypical(1)[0] and len(found.histograms) == 8
    counts, _ = np.histogram(x[:, 7].numpy(), 100)
    assert found.histograms[7].reshape(100, 10).sum(1).tolist() == counts.tolist()
    assert f"neuron 7\nskewness {found.table['skewness'][7]:.2f}" in found.plot().subfigs[1].axes[0].get_title()
    assert found.shape("gap")[3] == found.shape("offset")[3] == 0  # a constant has no standard deviation
