import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

from lightning_ablate.errors import ConfigError, SiteError, StatisticsError
from lightning_ablate.masks import ByImportance, EachHead, EachLayer, RandomNeurons, Selection, seed_of
from lightning_ablate.sites import Site
from lightning_ablate.statistics import Magnitude, Moments, SiteStatistics


def mask_of(site, fraction, seed):
    return RandomNeurons().mask(Selection(fraction, seed), site)


SITE = Site("model.layers.3.self_attn.o_proj", 37)


@pytest.mark.parametrize("width", [1, 7, 37, 64, 4096])
def test_mask_takes_the_rounded_share(width):
    for fraction in (0, 0.1, 0.25, 0.5, 0.9, 1.0):
        assert int(mask_of(Site("a", width), fraction, 42).sum()) == round(fraction * width)


def test_masks_are_nested_in_the_fraction():
    masks = [mask_of(SITE, step / 20, 42) for step in range(21)]
    for smaller, larger in pairwise(masks):
        assert bool((smaller <= larger).all())
    assert bool(masks[-1].all()) and not bool(masks[0].any())


def test_mask_depends_on_seed_site_and_width_alone():
    mask = mask_of(SITE, 0.5, 42)
    torch.manual_seed(99)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(mask, mask_of(SITE, 0.5, 42))
    finally:
        torch.set_default_dtype(torch.float32)
    assert mask.device.type == "cpu" and mask.dtype == torch.bool
    assert not torch.equal(mask, mask_of(SITE, 0.5, 43))
    assert not torch.equal(mask, mask_of(Site("model.layers.4.self_attn.o_proj", 37), 0.5, 42))


def test_mask_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    mask_of(SITE, 0.5, 42)
    assert torch.equal(before, torch.random.get_rng_state())


def test_mask_is_the_same_in_another_process():
    code = (
        "from lightning_ablate.masks import RandomNeurons, Selection; from lightning_ablate.sites import Site;"
        f"print(RandomNeurons().mask(Selection(0.5, 42), Site({SITE.name!r}, 37)).nonzero().flatten().tolist())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert other.strip() == str(mask_of(SITE, 0.5, 42).nonzero().flatten().tolist())


def test_each_neuron_is_chosen_about_as_often():
    chosen = torch.stack([mask_of(SITE, 0.5, seed) for seed in range(400)]).float().mean(0)
    assert bool(((chosen > 0.38) & (chosen < 0.62)).all())  # 0.5 within 4.5 standard errors of 400 draws


def test_seed_of_separates_its_parts():
    assert seed_of(1, "ab", "c") != seed_of(1, "a", "bc")
    assert 0 <= seed_of(42, "x") < 2**63


HEADS = Site("h.0.attn.proj", 12, heads=3, layer="h.0")
MLP = Site("h.0.mlp.down", 20, kind="mlp", layer="h.0")
NEXT = Site("h.1.attn.proj", 12, heads=3, layer="h.1")


def test_a_head_goes_whole():
    choice = RandomNeurons(unit="head")
    for seed in range(5):
        mask = choice.mask(Selection(1 / 3, seed), HEADS).view(3, 4)
        assert int(mask.sum()) == 4 and int(mask.all(1).sum()) == 1
        larger = choice.mask(Selection(2 / 3, seed), HEADS).view(3, 4)
        assert bool((mask <= larger).all()) and int(larger.all(1).sum()) == 2
    chosen = {int(choice.mask(Selection(1 / 3, seed), HEADS).view(3, 4).all(1).nonzero()) for seed in range(20)}
    assert chosen == {0, 1, 2}


def test_heads_are_refused_where_there_are_none():
    for choice in (RandomNeurons(unit="head"), EachHead()):
        with pytest.raises(SiteError, match="h.0.mlp.down .mlp, 20 neurons. has no heads that lie side by side"):
            choice.mask(Selection(0.5, 1, "h.0.mlp.down", 0), MLP)


def test_each_head_is_taken_once_and_alone():
    selections = EachHead().selections([HEADS, NEXT], [0.5], [1, 2])
    assert [(s.part, s.head) for s in selections] == [(site.name, head) for site in (HEADS, NEXT) for head in range(3)]
    assert {(s.fraction, s.seed) for s in selections} == {(1.0, None)}
    masks = torch.stack([torch.cat([EachHead().mask(s, site) for site in (HEADS, NEXT)]) for s in selections])
    assert torch.equal(masks, torch.eye(6, dtype=torch.bool).repeat_interleave(4, dim=1))


def test_each_layer_is_taken_once_with_all_its_sites():
    alone = Site("head.o", 4, kind="other")
    sites = [HEADS, MLP, NEXT, alone]
    selections = EachLayer().selections(sites, [0.5], [1, 2])
    assert [s.part for s in selections] == ["h.0", "h.1", "head.o"]
    taken = [[bool(EachLayer().mask(s, site).all()) for site in sites] for s in selections]
    assert taken == [[True, True, False, False], [False, False, True, False], [False, False, False, True]]
    assert not any(EachLayer().mask(selections[0], NEXT))


def statistics_of(activations):
    spread, magnitude = Moments(activations.shape[-1]), Magnitude(activations.shape[-1])
    spread.update(activations)
    magnitude.update(activations)
    return SiteStatistics("here", {Moments: spread, Magnitude: magnitude})


@pytest.mark.parametrize("first", ["lowest", "highest"])
@pytest.mark.parametrize("by", ["sd", "magnitude"])
def test_importance_orders_neurons_as_numpy_does(by, first):
    x = torch.randn(4, 50, 12) * torch.rand(12) + 3 * torch.randn(12)
    choice, statistics = ByImportance(by, first), statistics_of(x)
    flat = x.flatten(0, 1).double().numpy()
    importance = flat.std(0) if by == "sd" else np.abs(flat).mean(0)
    expected = np.argsort(importance if first == "lowest" else -importance, kind="stable")
    assert choice.order(HEADS, 0, statistics).tolist() == expected.tolist()
    mask = choice.mask(Selection(0.25), HEADS, statistics)
    assert mask.nonzero().flatten().tolist() == sorted(expected[:3].tolist())


def test_importance_of_a_head_is_the_mean_over_its_neurons():
    x = torch.tensor([1.0, 9.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 4.0, 4.0, 4.0, 4.0]).view(1, 1, 12)
    choice = ByImportance("magnitude", unit="head")  # means 3, 2 and 4
    assert choice.order(HEADS, 0, statistics_of(x)).tolist() == [1, 0, 2]


def test_importance_depends_on_no_seed_and_on_statistics():
    assert ByImportance().selections([HEADS], [0.0, 0.5, 1.0], [1, 2]) == [Selection(0.5), Selection(1.0)]
    with pytest.raises(StatisticsError, match="needs the statistic Moments of the site here"):
        ByImportance().mask(Selection(0.5), HEADS, SiteStatistics("here", {}))
    with pytest.raises(ConfigError, match="needs the statistics"):
        ByImportance().mask(Selection(0.5), HEADS)


def test_fractions_that_take_the_same_heads_are_taken_once_and_none_that_takes_nothing():
    fractions = [0.1, 0.2, 0.3, 0.4, 1.0]
    taken = RandomNeurons("head").selections([HEADS, NEXT], fractions, [1])  # 0, 1, 1, 1 and 3 of 3 heads
    assert taken == [Selection(0.2, 1), Selection(1.0)]
    assert len(RandomNeurons().selections([HEADS, NEXT], fractions, [1])) == 5
