import numpy as np
import pytest
import torch
from scipy.linalg import hadamard

from lightning_ablate import ConditionalMean, ConditionalMeanPerHead, Mean
from tests.tiny import mixed


@pytest.mark.parametrize("centred", [True, False])
def test_an_ablated_neuron_is_its_regression_on_the_kept_ones(edit, centred):
    """By numpy's least squares, with an intercept or without."""
    x, new = mixed(800)[None, ..., torch.tensor([0, 1, 4, 5, 6, 7, 8, 9])], torch.randn(5, 3, 8)
    mask = torch.tensor([True, False, True, False, False, True, False, False])
    found = edit(ConditionalMean(ridge=1e-12, centred=centred), x, mask)(new)
    kept, given = (activations[..., ~mask].double().numpy() for activations in (x[0], new))
    if centred:
        kept, given = (np.insert(values, 0, 1, axis=-1) for values in (kept, given))
    weights, *_ = np.linalg.lstsq(kept, x[0, :, mask].double().numpy(), rcond=None)
    np.testing.assert_allclose(found[..., mask].numpy(), given @ weights, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[..., ~mask], new[..., ~mask])


def test_where_nothing_is_kept_or_neurons_do_not_vary_together_it_is_the_mean_exactly(edit):
    apart = torch.tensor(hadamard(8), dtype=torch.float32)[:, 1:] * torch.arange(1, 8) + 2
    for x, mask in ((apart[None], torch.arange(7) % 2 == 0), (mixed()[None], torch.ones(12, dtype=torch.bool))):
        new = torch.randn(4, len(mask))
        assert torch.equal(edit(ConditionalMean(), x, mask)(new), edit(Mean(), x, mask)(new))
    assert not edit(ConditionalMean(centred=False), x, mask)(new).any()  # nothing is kept of the last


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 5, 12, 400])
def test_singular_covariances_give_finite_sensible_values(edit, rows, dtype):
    """Constant and duplicated neurons, and fewer positions than neurons."""
    x, mask = mixed(rows)[None], torch.zeros(12, dtype=torch.bool)
    x[..., 1], x[..., 5], x[..., 6], mask[[2, 3, 5, 7, 6]] = x[..., 1] - 100, x[..., 4], 0.0, True
    found = edit(ConditionalMean(ridge=1e-6), x, mask)(x.to(dtype))
    assert found.dtype == dtype and bool(found.isfinite().all())
    assert bool(edit(ConditionalMean(), x, mask)(x.to(dtype)).isfinite().all())
    off, spread = (found - x)[..., mask].abs().max(), (x - x.mean(1)).abs().max()
    assert float(off) <= 1.5 * float(spread) + 0.05
    if rows > 1:
        near = 2e-2 if dtype == torch.bfloat16 else 1e-3
        torch.testing.assert_close(found[..., 5].float(), x[..., 5], rtol=2e-2, atol=near)


def test_per_head_it_is_the_regression_on_the_kept_neurons_of_the_same_head(edit):
    x, mask, new = mixed(800)[None], torch.arange(12) % 3 == 0, torch.randn(5, 12)
    found = edit(ConditionalMeanPerHead(), x, mask, heads=3)(new)
    for own in (slice(0, 4), slice(4, 8), slice(8, 12)):
        alone = edit(ConditionalMean(), x[..., own], mask[own])(new[:, own])
        torch.testing.assert_close(found[:, own], alone, rtol=1e-4, atol=1e-4)


def test_fewer_positions_than_neurons_in_float32_are_solved(edit):
    x, mask = torch.randn(1, 64, 2112) + torch.randn(1, 64, 1), torch.arange(2112) % 4 == 0
    found = edit(ConditionalMean(), x, mask)(x)  # such wide sites keep float32
    assert bool(found.isfinite().all()) and float((found - x)[..., mask].abs().mean()) < float(x.std())
