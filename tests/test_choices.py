"""Which units go."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_ablate import EachHead, EachLayer, Only, Random, Ranked, Site
from lightning_ablate.conditions import Condition, Selection
from lightning_ablate.errors import ConfigError, SiteError, StatisticsError
from lightning_ablate.seeds import seed_of
from lightning_ablate.statistics import Covariance, HeadCovariance, Histogram, Moments, SiteStatistics, covariance
from tests import tiny
from tests.command import python

SITE = Site("model.layers.3.self_attn.o_proj", 37)
HEADS = Site("h.0.attn.proj", 12, heads=3, layer="h.0")
MLP = Site("h.0.mlp.down", 20, kind="mlp", layer="h.0")
NEXT = Site("h.1.attn.proj", 12, heads=3, layer="h.1")


def mask_of(site, fraction, seed, unit="neuron"):
    return Random(unit).mask(Selection(fraction, seed), site)


@pytest.mark.parametrize("width", [1, 7, 37, 4096])
def test_a_mask_takes_the_rounded_share_and_masks_are_nested_in_the_fraction(width):
    masks = [mask_of(Site("a", width), step / 20, 42) for step in range(21)]
    assert [int(mask.sum()) for mask in masks] == [round(step / 20 * width) for step in range(21)]
    assert all(bool((smaller <= larger).all()) for smaller, larger in pairwise(masks))


def test_a_mask_depends_on_seed_site_and_width_alone_whatever_the_process():
    mask, state = mask_of(SITE, 0.5, 42), torch.random.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(mask, Random().mask(Condition(0.5, 42, method="peak"), SITE))
    finally:
        torch.set_default_dtype(torch.float32)
    assert mask.device.type == "cpu" and mask.dtype == torch.bool and torch.equal(state, torch.random.get_rng_state())
    for other in (mask_of(SITE, 0.5, 43), mask_of(Site("model.layers.4.self_attn.o_proj", 37), 0.5, 42)):
        assert not torch.equal(mask, other)
    assert seed_of(1, "ab", "c") != seed_of(1, "a", "bc") and 0 <= seed_of(42, "x") < 2**63
    chosen = torch.stack([mask_of(SITE, 0.5, seed) for seed in range(400)]).float().mean(0)
    assert bool(((chosen > 0.38) & (chosen < 0.62)).all())  # 0.5 within 4.5 standard errors of 400 draws
    code = "from lightning_ablate import Random, Site; from lightning_ablate.conditions import Selection;"
    code += f"print(Random().mask(Selection(0.5, 42), Site({SITE.name!r}, 37)).tolist())"
    other = python("-c", code, check=True).stdout
    assert other.strip() == str(mask_of(SITE, 0.5, 42).tolist())


def test_a_head_goes_whole():
    for seed in range(5):
        mask, larger = (mask_of(HEADS, fraction, seed, "head").view(3, 4) for fraction in (1 / 3, 2 / 3))
        assert mask.sum(1).sort().values.tolist() == [0, 0, 4] and larger.sum(1).sort().values.tolist() == [0, 4, 4]
        assert bool((mask <= larger).all())
    assert {int(mask_of(HEADS, 1 / 3, seed, "head").nonzero()[0]) for seed in range(20)} == {0, 4, 8}
    for choice in (Random("head"), EachHead(), Only(heads={MLP.name: [0]})):
        with pytest.raises(SiteError, match="h.0.mlp.down .mlp, 20 neurons. has no heads that lie side by side"):
            choice.mask(Selection(0.5, 1, MLP.name, 0), MLP)
    fractions = [0.1, 0.2, 0.3, 0.4, 1.0]  # 0, 1, 1, 1 and 3 of 3 heads
    assert Random("head").selections([HEADS, NEXT], fractions, [1]) == [Selection(0.2, 1), Selection(1.0)]


def test_each_head_and_each_layer_is_taken_once_and_alone():
    selections = EachHead().selections([HEADS, NEXT], [0.5], [1, 2])
    assert selections == [Selection(1.0, None, site.name, head) for site in (HEADS, NEXT) for head in range(3)]
    masks = torch.stack([torch.cat([EachHead().mask(s, site) for site in (HEADS, NEXT)]) for s in selections])
    assert torch.equal(masks, torch.eye(6, dtype=torch.bool).repeat_interleave(4, dim=1))
    assert {EachHead().draw([HEADS, NEXT], seed) for seed in range(200)} == set(selections)
    sites, parts = [HEADS, MLP, NEXT, Site("head.o", 4, kind="other")], ["h.0", "h.1", "head.o"]
    selections = EachLayer().selections(sites, [0.5], [1, 2])
    assert selections == [Selection(1.0, None, part) for part in parts]
    taken = [[EachLayer().mask(s, site).unique().tolist() for site in sites] for s in selections]
    assert taken == [[[part == (site.layer or site.name)] for site in sites] for part in parts]


def test_only_the_given_heads_and_neurons_go():
    choice = Only(heads={HEADS.name: [0, 2]}, neurons={MLP.name: [19], HEADS.name: [5]})
    label = "h.0.attn.proj heads 0, 2; h.0.mlp.down neuron 19; h.0.attn.proj neuron 5"
    assert choice.selections([HEADS, MLP, NEXT], [0.5], [1, 2]) == [Selection(1.0, None, label)]
    taken = [choice.mask(Selection(1.0, None, label), s).nonzero().flatten().tolist() for s in (HEADS, MLP, NEXT)]
    assert taken == [[0, 1, 2, 3, 5, 8, 9, 10, 11], [19], []]
    assert Only(heads={HEADS.name: [1]}, label="copying").selections([HEADS], [], [])[0].part == "copying"
    assert Only(heads={f"layers.{n}.self_attn.o_proj": [0, 1] for n in range(9)}).label == "18 heads of 9 sites"
    for wrong, message in (
        (Only(heads={"h.9": [0]}), "there is no site 'h.9' .*, expected one of h.0.attn.proj, h.0.mlp.down"),
        (Only(heads={HEADS.name: [3]}), "h.0.attn.proj has no head 3 .*, expected 0 to 2"),
        (Only(neurons={MLP.name: [-1]}), "h.0.mlp.down has no neuron -1 .*, expected 0 to 19"),
    ):
        with pytest.raises(SiteError, match=message):
            wrong.selections([HEADS, MLP], [], [])
    for heads in (None, {HEADS.name: []}):
        with pytest.raises(ConfigError, match="no heads and no neurons are named"):
            Only(heads)


@pytest.mark.parametrize(("first", "sign"), [("lowest", 1), ("highest", -1)])
@pytest.mark.parametrize("by", ["sd", "rms", "skewness", "kurtosis", "gap"])
def test_ranked_orders_neurons_as_numpy_does(by, first, sign):
    x = (torch.randn(4, 500, 12) * torch.rand(12) + torch.randn(12)).exp()
    statistics = tiny.gathered(HEADS, [x], Moments, Histogram)
    flat, mode = x.flatten(0, 1).double().numpy(), statistics[Histogram].centres.mode.numpy()  # tested where it is made
    value = {
        "sd": flat.std(0),
        "rms": np.sqrt((flat**2).mean(0)),
        "skewness": np.abs(stats.skew(flat)),
        "kurtosis": np.abs(stats.kurtosis(flat)),
        "gap": np.abs(flat.mean(0) - mode) / flat.std(0),
    }[by]
    expected = np.argsort(sign * value)
    mask = Ranked(by, first).mask(Selection(0.25), HEADS, statistics)
    assert mask.nonzero().flatten().tolist() == sorted(expected[:3].tolist())
    assert Ranked(by, first).order(HEADS, 0, statistics).tolist() == expected.tolist()
    heads = np.argsort(sign * value.reshape(3, 4).mean(1))
    assert Ranked(by, first, unit="head").order(HEADS, 0, statistics).tolist() == heads.tolist()
    assert Ranked(by).selections([HEADS], [0.0, 0.5, 1.0], [1, 2]) == [Selection(0.5), Selection(1.0)]
    with pytest.raises(StatisticsError, match="needs the statistic Moments of the site here"):
        Ranked(by).mask(Selection(0.5), HEADS, SiteStatistics("here", {}))


@pytest.mark.parametrize("size", [1, 4])
def test_the_surgeon_takes_the_unit_without_which_least_squares_do_best(size):
    """Each time by numpy's least squares of the whole output on the neurons that would be left."""
    x, weight = torch.randn(1, 300, 12) @ torch.randn(12, 12), torch.randn(12, 5).double()
    statistics = tiny.gathered(HEADS, [x], Moments, Covariance, weight=weight)
    statistics[Covariance].chosen.fill_(1e-12)
    centred = (x[0] - x[0].mean(0)).double().numpy()
    output, left, order = centred @ weight.double().numpy(), list(range(12 // size)), []
    while left:
        errors = []
        for unit in left:
            kept = [neuron for one in left if one != unit for neuron in range(one * size, one * size + size)]
            solution = np.linalg.lstsq(centred[:, kept], output, rcond=None)[0]
            errors.append(np.square(output - centred[:, kept] @ solution).sum())
        order.append(left.pop(int(np.argmin(errors))))
    unit, before = "neuron" if size == 1 else "head", weight.clone()
    assert Ranked("surgeon", unit=unit).order(HEADS, 0, statistics).tolist() == order
    assert Ranked("surgeon", "highest", unit).order(HEADS, 0, statistics).tolist() == order[::-1]
    assert torch.equal(weight, before)  # the target's own
    with pytest.raises(StatisticsError, match="not those within heads"):
        HeadCovariance.of(HEADS).order(weight)


def test_scores_of_what_is_lost_are_those_of_numpy_and_solved_once(monkeypatch):
    """Wanda's and FLAP's by neuron, and the optimal brain surgeon's, also by units of several neurons."""
    x = torch.randn(4, 500, 12) @ torch.randn(12, 12) + torch.randn(12)
    weight, flat = torch.randn(12, 5), x.flatten(0, 1).double().numpy()
    statistics = tiny.gathered(HEADS, [x], Moments, Covariance, weight=weight)
    statistics[Covariance].chosen.fill_(1e-12)
    value = {
        "weighted-sd": flat.std(0),
        "weighted-rms": np.sqrt((flat**2).mean(0)),
        "unexplained": 1 / np.sqrt(np.linalg.inv(np.cov(flat.T, bias=True)).diagonal()),
    }
    solved, calls = covariance.solved, []
    monkeypatch.setattr(covariance, "solved", lambda *given: calls.append(given) or solved(*given))
    for by, score in value.items():
        weighted = score * weight.norm(dim=1).double().numpy()
        assert Ranked(by).order(HEADS, 0, statistics).tolist() == np.argsort(weighted).tolist()
        for unit, units in ((4, 3), (6, 2)):
            order = np.argsort(weighted.reshape(units, unit).mean(1))
            assert Ranked(by, unit=unit).order(HEADS, 0, statistics).tolist() == order.tolist()
            mask = Ranked(by, unit=unit).mask(Selection(1 / units), HEADS, statistics)
            assert mask.view(units, unit).all(1).nonzero().flatten().tolist() == [order[0]]
    assert len(calls) == 1  # for all conditions
    statistics[Covariance].update(3 * x)
    Ranked("unexplained").order(HEADS, 0, statistics)
    assert len(calls) == 2


def test_units_that_make_no_sense_are_refused():
    with pytest.raises(SiteError, match=r"h\.0\.attn\.proj has 12 neurons, expected units of 5 to fill it"):
        Random(5).selections([HEADS], [0.5], [1])
    for unit in (0, -1, "layer", 1.5):
        with pytest.raises(ConfigError, match="expected neuron, head or a number of neurons"):
            Random(unit)
