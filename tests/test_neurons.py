import io

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from scipy import stats

from lightning_ablate import AblationCallback
from lightning_ablate.masks import ByShape, Selection
from lightning_ablate.neurons import Neurons, figure, parquet, save, tensorboard
from lightning_ablate.report import png
from lightning_ablate.statistics import LatticeHistogram, Moments
from tests import tiny
from tests.statistics.test_statistics import peak_by_numpy
from tests.test_callback import raw_activations


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    module, _ = tiny.fit(folder, callback=AblationCallback(["peak"], [0.5], [1]))
    return module.calibration, folder


@pytest.fixture(scope="module")
def raw():
    found = raw_activations(tiny.gpt2(), tiny.loader(seed=1))
    return {name: values.double().numpy() for name, values in found.items()}


def test_neurons_are_described_as_numpy_and_scipy_do(calibrated, raw):
    found = Neurons.of(calibrated[0])
    assert list(found.sites) == list(raw) and found.site.tolist() == [0] * 16 + [1] * 16
    assert found.columns["neuron"].tolist() == [*range(16), *range(16)]
    values = np.concatenate(list(raw.values()), axis=1)
    peak = np.array([peak_by_numpy(column) for column in values.T])
    expected = {
        "mean": values.mean(0),
        "sd": values.std(0),
        "skewness": stats.skew(values),
        "excess_kurtosis": stats.kurtosis(values),
        "minimum": values.min(0),
        "maximum": values.max(0),
        "zeros": (values == 0).mean(0),
        "peak": peak,
        "peak_error": 0 * peak,
        "abs_peak": np.abs(peak),
        "abs_mean_minus_peak": np.abs(values.mean(0) - peak),
    }
    for name, column in expected.items():
        np.testing.assert_allclose(found.columns[name].numpy(), column, rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(found.columns["median"].numpy(), np.median(values, 0), atol=0.05 * np.ptp(values))
    inside = (found.columns["mode"].numpy() >= values.min(0)) & (found.columns["mode"].numpy() <= values.max(0))
    assert inside.all() and found.columns["modes"].min() >= 1
    np.testing.assert_allclose(found.shape("offset").numpy(), np.abs(values.mean(0)) / values.std(0), rtol=1e-4)
    gap = np.abs(values.mean(0) - peak) / values.std(0)
    np.testing.assert_allclose(found.shape("gap").numpy(), gap, rtol=1e-3, atol=1e-4)
    order = np.argsort(-(expected["skewness"] ** 2 / 6 + expected["excess_kurtosis"] ** 2 / 24))
    assert found.most_atypical(3) == order[:3].tolist()
    total = found.histogram(20)
    assert int(total.counts.sum() + total.zeros) == len(values) and total.low.item() == pytest.approx(
        values[:, 20].min()
    )


def test_without_a_second_epoch_the_peak_is_within_its_error(tmp_path, raw):
    module, _ = tiny.fit(tmp_path, callback=AblationCallback(["zero"], [0.5], [1]))
    found = Neurons.of(module.calibration)
    values = np.concatenate(list(raw.values()), axis=1)
    exact = np.array([peak_by_numpy(column) for column in values.T])
    off = np.abs(found.columns["peak"].numpy() - exact)
    assert (off <= found.columns["peak_error"].numpy() + 1e-5 * np.abs(values).max()).all()
    assert found.columns["peak_error"].max() > 0


def test_the_table_is_written_by_fit_and_reads_as_it_was_written(calibrated):
    calibration, folder = calibrated
    table = pyarrow.parquet.read_table(folder / "neurons.parquet")
    found = Neurons.of(calibration)
    assert table.column("site").to_pylist() == [found.sites[site] for site in found.site]
    for name, column in found.columns.items():
        assert table.column(name).to_pylist() == column.tolist(), name
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert metadata["model"] == "own" and len(metadata["target"]) == 64
    again = pyarrow.parquet.read_table(io.BytesIO(parquet(found, {"a": "b"})))
    assert again.schema.metadata[b"a"] == b"b"


def test_the_figure_shows_every_panel(calibrated, tmp_path, drawn):
    found = Neurons.of(calibrated[0])
    image = Image.open(io.BytesIO(png(figure(found))))
    assert image.width > 1000 and len(image.convert("L").getcolors()) > 20
    titles = [axes.get_title() for panels in figure(found).subfigs for axes in panels.axes]
    assert len(titles) == 12 and titles[0] == "skewness"
    first = found.most_atypical(1)[0]
    assert titles[4].startswith(
        f"site {first // 16}, neuron {first % 16}\nskewness {found.columns['skewness'][first]:.2f}"
    )
    assert all(path.stat().st_size > 1000 for path in save(found, tmp_path, {}))


def test_a_site_of_few_neurons_and_constant_ones_are_drawn(tmp_path):
    from lightning_ablate.calibration import Calibration
    from lightning_ablate.sites import Site

    site = Site("here", 3)
    moments, lattice = Moments(3), LatticeHistogram(3)
    for statistic in (moments, lattice):
        statistic.update(torch.tensor([[[0.0, 7.0, 1.0], [0.0, 7.0, 2.0]]]))
    calibration = Calibration(torch.nn.Identity(), [])
    calibration.sites, calibration.statistics = (site,), {site: {Moments: moments, LatticeHistogram: lattice}}
    found = Neurons.of(calibration)
    assert found.shape("gap")[:2].tolist() == found.shape("offset")[:2].tolist() == [0, 0]
    assert found.columns["mode"][:2].tolist() == pytest.approx([0, 7])
    assert len([axes for panels in figure(found).subfigs for axes in panels.axes]) == 4 + 3


def test_tensorboard_gets_a_histogram_of_each_shape_at_every_site(calibrated, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        tensorboard(Neurons.of(calibrated[0]), writer)
    events = EventAccumulator(str(tmp_path), {"histograms": 0})
    events.Reload()
    tags = events.Tags()["histograms"]
    assert sorted(tags) == ["neurons/excess_kurtosis", "neurons/gap", "neurons/offset", "neurons/skewness"]
    assert [(event.step, event.histogram_value.num) for event in events.Histograms("neurons/gap")] == [(0, 16), (1, 16)]


@pytest.mark.parametrize("by", ["skewness", "kurtosis", "gap"])
def test_a_choice_by_shape_splits_typical_from_atypical_neurons(calibrated, raw, by):
    calibration, _ = calibrated
    for site, values in zip(calibration.sites, raw.values(), strict=True):
        found = Neurons.of(calibration)
        mode = found.columns["mode"].view(2, 16)[calibration.sites.index(site)].numpy()
        score = {
            "skewness": np.abs(stats.skew(values)),
            "kurtosis": np.abs(stats.kurtosis(values)),
            "gap": np.abs(values.mean(0) - mode) / values.std(0),
        }[by]
        half = Selection(0.5)
        typical, atypical = (
            ByShape(by, first).mask(half, site, calibration[site]).numpy() for first in ("typical", "atypical")
        )
        assert (typical != atypical).all() and score[typical].max() <= score[atypical].min()


def test_results_can_be_split_by_shape(tmp_path):
    losses = {}
    for first in ("typical", "atypical"):
        callback = AblationCallback(["mean", "mode"], [0.25], [1, 2], choice=ByShape("skewness", first))
        tiny.fit(tmp_path / first, callback=callback)
        assert [(row.method, row.seed) for row in callback.results.rows] == [
            ("none", None),
            ("mean", None),
            ("mode", None),
        ]
        losses[first] = [row.cross_entropy for row in callback.results.rows]
    assert losses["typical"][0] == losses["atypical"][0] and losses["typical"][1] != losses["atypical"][1]
