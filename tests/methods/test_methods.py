import pytest
import torch

from lightning_ablate.errors import ConfigError, DataError, StatisticsError
from lightning_ablate.methods import (
    Ablation,
    AblationMethod,
    Batch,
    Mean,
    Peak,
    ResamplePixels,
    Zero,
    ablate,
    constant,
    method_named,
)
from lightning_ablate.sites import Site
from lightning_ablate.statistics import LatticeHistogram, Moments, RangeHistogram, SiteStatistics

SITE = Site("attn.proj", 4)
MASK = torch.tensor([True, False, True, False])


def statistics(activations):
    bounds, moments = LatticeHistogram(4), Moments(4)
    bounds.update(activations)
    moments.update(activations)
    histogram = RangeHistogram(4, SiteStatistics("attn.proj", {LatticeHistogram: bounds}))
    histogram.update(activations)
    return SiteStatistics("attn.proj", {LatticeHistogram: bounds, Moments: moments, RangeHistogram: histogram})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_ablate_replaces_the_masked_neurons_alone_and_never_in_place(dtype):
    x = torch.randn(2, 3, 4).to(dtype)
    before, value = x.clone(), torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    ablated = ablate(x, MASK, constant(value))
    assert torch.equal(x, before) and ablated.dtype == dtype and ablated.shape == x.shape
    assert torch.equal(ablated[..., 1], x[..., 1]) and torch.equal(ablated[..., 3], x[..., 3])
    assert bool((ablated[..., 0] == 1).all()) and bool((ablated[..., 2] == 3).all())


def test_an_empty_mask_changes_no_bit():
    x = torch.randn(2, 3, 4)
    x[0, 0, 0] = -0.0
    ablated = ablate(x, torch.zeros(4, dtype=torch.bool), constant(torch.full((4,), torch.nan)))
    assert torch.equal(ablated.view(torch.int32), x.view(torch.int32))


def test_constant_methods_give_what_they_say():
    x = torch.randn(5, 50, 4)
    here = Ablation(SITE, MASK, statistics(x), None)
    columns = x.double().flatten(0, 1)
    assert torch.equal(Zero().prepare(here)(x), torch.zeros(4))
    torch.testing.assert_close(Mean().prepare(here)(x), columns.mean(0).float(), rtol=1e-6, atol=1e-9)
    for neuron in range(4):
        counts = torch.histogram(columns[:, neuron], bins=100)
        fullest = counts.hist.argmax()
        expected = counts.bin_edges[fullest : fullest + 2].mean()
        torch.testing.assert_close(Peak().prepare(here)(x)[neuron], expected.float(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", [Mean(), Peak()])
def test_a_method_without_its_statistics_refuses(method):
    with pytest.raises(StatisticsError, match="not gathered"):
        method.prepare(Ablation(SITE, MASK, SiteStatistics("attn.proj", {}), None))


def test_resampling_looks_its_activations_up_position_by_position():
    donor = torch.randn(1, 3, 4)
    batch = Batch()
    replace = ResamplePixels().prepare(Ablation(SITE, MASK, SiteStatistics("attn.proj", {}), 42, batch))
    batch.unrelated["pixels", 42] = {SITE: donor}
    x = torch.randn(2, 3, 4)
    ablated = ablate(x, MASK, replace)
    for example in range(2):
        assert torch.equal(ablated[example][:, MASK], donor[0][:, MASK])
        assert torch.equal(ablated[example][:, ~MASK], x[example][:, ~MASK])
    with pytest.raises(DataError, match=r"shape \(3, 4\), expected \(7, 4\)"):
        replace(torch.randn(2, 7, 4))


def test_method_named_finds_every_subclass_and_refuses_other_names():
    class Seven(AblationMethod):
        name = "seven-of-the-tests"

        def prepare(self, ablation):
            return constant(torch.full((4,), 7.0))

    assert isinstance(method_named("seven-of-the-tests"), Seven)
    listed = "mean, median, mode, noise, one-pass-peak, optimal, peak, positional-mean, resample-any-position"
    with pytest.raises(ConfigError, match=f"unknown method 'maen'; expected one of .*{listed}"):
        method_named("maen")
