import torch
from scipy import stats

from lightning_ablate.methods import Ablation, Batch, Noise
from lightning_ablate.methods.draws import below, hashed, uniform
from lightning_ablate.sites import Site
from lightning_ablate.statistics import Moments, SiteStatistics


def drawn(seed, site="attn.proj", examples=(0, 1, 2), positions=50, dtype=torch.float32):
    x = torch.randn(400, 4, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 5.0, 0.0, 1e-3]) + 3
    moments = Moments(4)
    moments.update(x.unsqueeze(0))
    batch = Batch(torch.tensor(examples))
    mask = torch.ones(4, dtype=torch.bool)
    here = Ablation(Site(site, 4), mask, SiteStatistics(site, {Moments: moments}), seed, batch)
    return Noise().prepare(here)(torch.zeros(len(examples), positions, 4, dtype=dtype)), x


def test_it_is_normal_with_the_mean_and_standard_deviation_of_each_neuron():
    found, x = drawn(1, examples=range(200), positions=100)
    for neuron in (0, 1, 3):
        normal = stats.norm(float(x[:, neuron].mean()), float(x[:, neuron].std(correction=0)))
        assert stats.kstest(found[..., neuron].flatten().double().numpy(), normal.cdf).pvalue > 1e-3
    assert bool((found[..., 2] == 3).all())
    flat = (found[..., [0, 1, 3]] - found[..., [0, 1, 3]].mean((0, 1))).flatten(0, 1)
    assert float(torch.corrcoef(flat.T).fill_diagonal_(0).abs().max()) < 0.03  # neither neurons
    beside = torch.corrcoef(torch.stack([found[:, :-1, 0].flatten(), found[:, 1:, 0].flatten()]))
    across = torch.corrcoef(torch.stack([found[:-1, :, 0].flatten(), found[1:, :, 0].flatten()]))
    assert abs(beside[0, 1]) < 0.03 and abs(across[0, 1]) < 0.03  # nor positions or examples go together


def test_it_depends_on_seed_site_example_and_position_and_on_nothing_else():
    whole, _ = drawn(1)
    again, _ = drawn(1, examples=(2, 0), positions=20)
    assert torch.equal(again, whole[[2, 0], :20])
    for other in (drawn(2)[0], drawn(1, site="other")[0]):
        assert not bool((other[..., 0] == whole[..., 0]).any())
    assert drawn(1, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_draws_are_uniform():
    hashes = hashed(5, torch.arange(200_000))
    assert stats.kstest(uniform(hashes).double().numpy(), "uniform").pvalue > 1e-3
    counts = torch.bincount(below(hashes, torch.tensor(7)), minlength=7)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
