"""What goes into a site's projection is read and changed, and no hook is left."""

import pytest
import torch

from lightning_ablate.calibration import fingerprint
from lightning_ablate.errors import SiteError
from lightning_ablate.sites import Site, hooked
from tests import reference, tiny


def test_hooked_passes_the_projections_input_and_uses_what_is_returned():
    model, read, seen = tiny.gpt2(), [], []
    site = tiny.sites(model)[1]
    with reference.plain_hooks(model, {site.path: seen.append}), hooked(model, {site: read.append}):
        clean = tiny.run(model)
    assert torch.equal(read[0], seen[0]) and read[0].shape == (3, tiny.LENGTH, 16)
    with reference.plain_hooks(model, {site.path: lambda x: x + 1}):
        expected = tiny.run(model)
    with hooked(model, {site: lambda x: x + 1}):
        assert torch.equal(tiny.run(model), expected) and not torch.allclose(expected, clean)


def test_a_module_used_by_every_layer_is_a_site_for_each_use():
    model, seen, by_hand = tiny.albert(), [], []
    path = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    sites = tiny.sites(model)
    assert [site.name for site in sites] == [f"{path}.attention.dense{use}" for use in ("", "#1", "#2")]
    assert [site.layer for site in sites] == [path, f"{path}#1", f"{path}#2"]
    assert {(site.path, site.uses) for site in sites} == {(f"{path}.attention.dense", 3)}
    with reference.plain_hooks(model, {sites[0].path: by_hand.append}), hooked(model, {sites[2]: seen.append}):
        tiny.run(model)
    assert len(by_hand) == 3 and len(seen) == 1 and torch.equal(seen[0], by_hand[2])


@pytest.mark.parametrize("times", [0, 2])
def test_once_refuses_another_number_of_passes(times):
    model = tiny.gpt2()
    hooks = {site: lambda x: None for site in tiny.sites(model)}
    with hooked(model, hooks, once=True):
        tiny.run(model)
    with pytest.raises(SiteError, match=f"0.attn.c_proj ran {times} times in one forward pass, expected 1"):
        with hooked(model, hooks, once=True):
            for _ in range(times):
                tiny.run(model)


def test_hooked_leaves_no_hook_behind_even_after_an_exception():
    def fail(activations):
        raise RuntimeError("on purpose")

    model = tiny.gpt2()
    hooks = dict.fromkeys(tiny.sites(model), fail)
    with pytest.raises(RuntimeError, match="on purpose"), hooked(model, hooks):
        assert reference.hooks(model) == 2
        tiny.run(model)
    assert reference.hooks(model) == 0
    with pytest.raises(AttributeError), hooked(model, {**hooks, Site("nowhere", 1): fail}):
        pass
    assert reference.hooks(model) == 0


def test_fingerprint_tells_targets_apart_by_one_bit():
    model, same = tiny.gpt2(), tiny.gpt2()
    assert fingerprint(model) == fingerprint(same)
    with torch.no_grad():
        weight = same.transformer.h[0].mlp.c_fc.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))
    assert fingerprint(model) != fingerprint(same)
    assert fingerprint(model) != fingerprint(tiny.gpt2().bfloat16())
