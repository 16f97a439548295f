import torch
from scipy import stats

from lightning_ablate import Noise
from lightning_ablate.methods import Batch

EVERY = torch.ones(4, dtype=torch.bool)
X = torch.randn(1, 400, 4, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 5.0, 0.0, 1e-3]) + 3


def drawn(edit, *shape, seed=1, examples=(0, 1, 2), site="attn.proj"):
    return edit(Noise(), X, EVERY, seed=seed, site=site, batch=Batch(torch.tensor(examples)))(torch.zeros(*shape, 4))


def test_it_is_normal_with_the_mean_and_standard_deviation_of_each_neuron(edit):
    found = drawn(edit, 200, 100, examples=range(200))
    for neuron in (0, 1, 3):
        normal = stats.norm(float(X[..., neuron].mean()), float(X[..., neuron].std(correction=0)))
        assert stats.kstest(found[..., neuron].flatten().double().numpy(), normal.cdf).pvalue > 1e-3
    assert bool((found[..., 2] == 3).all())
    first = found[..., 0]  # neurons, positions and examples don't go together
    for one, other in ((first, found[..., 1]), (first[:, 1:], first[:, :-1]), (first[1:], first[:-1])):
        assert abs(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) < 0.03


def test_it_depends_on_seed_site_example_and_position_and_on_nothing_else(edit):
    whole = drawn(edit, 3, 50)
    assert torch.equal(drawn(edit, 2, 20, examples=(2, 0)), whole[[2, 0], :20])
    assert torch.equal(drawn(edit, 150).view(3, 50, 4), whole)  # examples and positions in one dimension
    for other in (drawn(edit, 3, 50, seed=2), drawn(edit, 3, 50, site="other")):
        assert not bool((other[..., 0] == whole[..., 0]).any())
