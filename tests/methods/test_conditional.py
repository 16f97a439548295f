import numpy as np
import pytest
import torch
from scipy.linalg import hadamard

from lightning_ablate.errors import ConfigError
from lightning_ablate.masks import NeuronChoice, Selection
from lightning_ablate.methods import Ablation, Conditional, ConditionalPerHead, Mean, ablate
from lightning_ablate.sites import Site
from lightning_ablate.statistics import Covariance, HeadCovariance, Moments, SiteStatistics
from lightning_ablate.sweep import Condition, Sweep
from tests import tiny
from tests.statistics.test_covariance import mixed
from tests.test_sweep import calibrated


def here(x, mask):
    gathered = {kind: kind(x.shape[-1]) for kind in (Moments, Covariance)}
    for statistic in gathered.values():
        statistic.update(x.unsqueeze(0))
    return Ablation(Site("attn.proj", x.shape[-1]), mask, SiteStatistics("attn.proj", gathered), 1)


def conditional(x, mask, of, **options):
    return ablate(of, mask, Conditional(**options).prepare(here(x, mask)))


def test_an_ablated_neuron_is_its_regression_on_the_kept_ones():
    """By numpy's least squares with an intercept."""
    x = mixed(800)[:, torch.tensor([0, 1, 4, 5, 6, 7, 8, 9])]
    x[:, 1] -= 1000
    mask = torch.tensor([True, False, True, False, False, True, False, False])
    new = torch.randn(5, 3, 8)
    found = conditional(x, mask, new, ridge=1e-12)
    kept = np.column_stack([np.ones(800), x[:, ~mask].double().numpy()])
    weights, *_ = np.linalg.lstsq(kept, x[:, mask].double().numpy(), rcond=None)
    expected = np.concatenate([np.ones((5, 3, 1)), new[..., ~mask].double().numpy()], -1) @ weights
    np.testing.assert_allclose(found[..., mask].numpy(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[..., ~mask], new[..., ~mask])


def test_neurons_that_do_not_vary_together_are_their_means_exactly():
    x = torch.tensor(hadamard(8), dtype=torch.float32)[:, 1:] * torch.arange(1, 8) + 2
    mask, new = torch.arange(7) % 2 == 0, torch.randn(4, 7)
    assert torch.equal(conditional(x, mask, new), ablate(new, mask, Mean().prepare(here(x, mask))))


def test_with_nothing_kept_it_is_the_mean_exactly():
    x, mask, new = mixed(), torch.ones(12, dtype=torch.bool), torch.randn(4, 12)
    assert torch.equal(conditional(x, mask, new), ablate(new, mask, Mean().prepare(here(x, mask))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 5, 12, 400])
def test_singular_covariances_give_finite_sensible_values(rows, dtype):
    """Constant and duplicated neurons, and fewer positions than neurons."""
    x = mixed(rows)
    x[:, 1] -= 1000
    x[:, 5], x[:, 6] = x[:, 4], 0.0
    mask = torch.zeros(12, dtype=torch.bool)
    mask[[2, 3, 5, 7, 6]] = True
    found = conditional(x, mask, x.to(dtype))
    assert found.dtype == dtype and bool(found.isfinite().all())
    assert float((found - x)[:, mask].abs().max()) <= 1.5 * float((x - x.mean(0)).abs().max()) + 0.05
    if rows > 1:
        torch.testing.assert_close(
            found[:, 5].float(), x[:, 5], rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 1e-3
        )


def test_per_head_it_is_the_regression_on_the_kept_neurons_of_the_same_head():
    x, mask = mixed(800), torch.arange(12) % 3 == 0
    x[:, 1] -= 1000
    statistics = {Moments: Moments(12), HeadCovariance: HeadCovariance(12, blocks=3)}
    for statistic in statistics.values():
        statistic.update(x.unsqueeze(0))
    ablation = Ablation(Site("attn.proj", 12, heads=3), mask, SiteStatistics("attn.proj", statistics), 1)
    new = torch.randn(5, 12)
    found = ablate(new, mask, ConditionalPerHead().prepare(ablation))
    for head in range(3):
        own = slice(4 * head, 4 * head + 4)
        alone = conditional(x[:, own], mask[own], new[:, own])
        torch.testing.assert_close(found[:, own], alone, rtol=1e-4, atol=1e-5)


class Odd(NeuronChoice):
    """One neuron of each pair."""

    def selections(self, sites, fractions, seeds):
        return [Selection(0.5, None)]

    def mask(self, selection, site, statistics=None):
        return torch.arange(site.width) % 2 == 1


def test_a_target_that_holds_every_neuron_twice_loses_nothing_with_one_of_each_pair():
    model = tiny.gpt2()
    for block in model.transformer.h:
        for parameter in (block.attn.c_attn.weight.data, block.attn.c_attn.bias.data):
            values = parameter[..., 32:]  # behind queries and keys
            values[..., 1::2] = values[..., ::2]
    methods, plain = [Conditional(), Mean()], tiny.run(model)
    conditions = [Condition("none", 0.0, None), *(Condition(method.name, 0.5, None) for method in methods)]
    sweep = Sweep(calibrated(model, methods=methods), methods, conditions, Odd())
    sweep.prepare()
    change = []
    for condition in conditions[1:]:
        with sweep.applied(condition):
            change.append(float((tiny.run(model) - plain).abs().max()))
    assert change[0] < 1e-4 < 0.1 < change[1]


def test_a_ridge_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="ridge is 0, expected"):
        Conditional(0)


def test_fewer_positions_than_neurons_in_float32_are_solved_and_autocast_changes_nothing():
    x, mask = torch.randn(64, 2112) + torch.randn(64, 1), torch.arange(2112) % 4 == 0
    found = conditional(x, mask, x)  # such wide sites keep float32
    assert bool(found.isfinite().all()) and float((found - x)[:, mask].abs().mean()) < float(x.std())
    plain, cast = Covariance(2112), Covariance(2112)
    plain.update(x.unsqueeze(0))
    with torch.autocast("cpu", torch.bfloat16):
        cast.update(x.unsqueeze(0))
    assert torch.equal(plain.parts, cast.parts)
