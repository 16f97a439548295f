import pytest
import torch

from lightning_ablate import Mean, Peak, PositionalMean, Site, methods
from lightning_ablate.errors import ConfigError, StatisticsError
from lightning_ablate.methods import Ablation, Edit, constant, method_of
from lightning_ablate.statistics import SiteStatistics
from tests import reference

MASK = torch.tensor([True, False, True, False])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_an_edit_replaces_the_masked_neurons_alone_and_never_in_place(dtype):
    x, value = torch.randn(2, 3, 4).to(dtype), torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    before, found = x.clone(), Edit(MASK, constant(value))(x)
    assert torch.equal(x, before) and found.dtype == dtype
    assert torch.equal(found, reference.put(MASK, value)(x))
    nothing = Edit(~MASK & MASK, constant(value))(-torch.zeros(4, dtype=dtype))
    assert bool(nothing.signbit().all())  # no bit changes, not even that


def test_constant_methods_give_what_they_say(edit):
    x = torch.randn(5, 400, 4) * torch.tensor([1.0, 5.0, 0.1, 1.0]) + torch.tensor([0.0, 9.0, -2.0, 0.0])
    x[..., 3] = 7.0  # constant, so that all are exactly it
    columns, every, spread = x.flatten(0, 1).double(), torch.ones(4, dtype=torch.bool), x.flatten(0, 1).std(0)
    names = ["zero", "mean", "peak", "median", "mode", "half-sample-mode"]
    found = {name: edit(method_of(name), x, every)(x)[0, 0] for name in names}
    assert not bool(found.pop("zero").any())
    torch.testing.assert_close(found["mean"], columns.mean(0).float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found["peak"], reference.peaks(columns).float(), rtol=1e-6, atol=1e-7)
    assert bool(((found["median"] - columns.quantile(0.5, 0)).abs() <= 0.02 * spread).all())
    for values in found.values():  # of a normal density all are near the mean
        assert bool(((values - found["mean"]).abs() <= spread + 1e-6).all())


def test_what_is_missing_or_unknown_is_refused():
    seven = type("Seven", (methods.AblationMethod,), {"name": "a-seven", "prepare": None})
    assert isinstance(method_of("a-seven"), seven)
    with pytest.raises(ConfigError, match="has no 'maen'; alike: mean, .*; known: .*conditional-mean "):
        method_of("maen")
    for method in (Mean(), Peak(), PositionalMean()):
        with pytest.raises(StatisticsError, match="needs the statistic .* of the site attn.proj, which.*run `fit`"):
            method.prepare(Ablation(Site("attn.proj", 4), MASK, SiteStatistics("attn.proj", {}), None))
