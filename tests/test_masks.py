import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from lightning_ablate.masks import RandomNeurons, Selection, seed_of
from lightning_ablate.sites import Site


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
