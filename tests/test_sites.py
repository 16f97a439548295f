import pytest
import torch
from torch import nn

from lightning_ablate.errors import SiteError
from lightning_ablate.sites import Site, find_sites, fingerprint, hooked
from tests import tiny


def hooks(model):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize(
    ("make", "names", "width"),
    [
        (tiny.gpt2, ["transformer.h.0.attn.c_proj", "transformer.h.1.attn.c_proj"], 16),
        (tiny.mistral, ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"], 32),
        (
            tiny.roberta,
            ["roberta.encoder.layer.0.attention.output.dense", "roberta.encoder.layer.1.attention.output.dense"],
            16,
        ),
        (tiny.vit, ["blocks.0.attn.proj", "blocks.1.attn.proj"], 16),
    ],
)
def test_find_sites_takes_every_attention_output_projection(make, names, width):
    assert find_sites(make()) == [Site(name, width) for name in names]


def test_site_width_is_heads_times_head_dim_not_hidden_size():
    model = tiny.mistral()
    config = model.config
    assert {site.width for site in find_sites(model)} == {config.num_attention_heads * config.head_dim}
    assert config.num_attention_heads * config.head_dim != config.hidden_size


def test_find_sites_pattern_chooses_layers():
    assert [site.name for site in find_sites(tiny.gpt2(), ["*.1.attn.c_proj"])] == ["transformer.h.1.attn.c_proj"]
    assert find_sites(tiny.gpt2(), ["*.0.mlp.c_proj"]) == [Site("transformer.h.0.mlp.c_proj", 64)]


@pytest.mark.parametrize(
    ("model", "patterns", "message"),
    [
        (tiny.gpt2(), ["*.7.attn.c_proj"], r"'\*.7.attn.c_proj' matches no module.*h.0.attn.c_attn \(16\)"),
        (tiny.gpt2(), ["transformer.h.0.ln_1"], "LayerNorm, which is no projection"),
        (nn.Sequential(nn.Linear(2, 3)), [], r"no attention output projection.*--ablation.sites.*0 \(2\)"),
    ],
)
def test_find_sites_says_what_is_wrong(model, patterns, message):
    with pytest.raises(SiteError, match=message):
        find_sites(model, patterns)


def test_hooked_passes_the_projections_input_and_uses_what_is_returned():
    model = tiny.gpt2()
    site = find_sites(model)[1]
    seen = []
    by_hand = model.transformer.h[1].attn.c_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = tiny.tokens()["input_ids"]
    read = []
    with torch.no_grad(), hooked(model, [site], lambda _, x: read.append(x)):
        clean = model(batch).logits
    assert torch.equal(read[0], seen[0]) and read[0].shape == (3, tiny.LENGTH, 16)
    by_hand.remove()
    with torch.no_grad(), hooked(model, [site], lambda _, x: x + 1):
        assert not torch.allclose(model(batch).logits, clean)


def test_hooked_leaves_no_hook_behind_even_after_an_exception():
    model = tiny.gpt2()
    sites = find_sites(model)
    with hooked(model, sites, lambda *_: None):
        assert hooks(model) == 2
    assert hooks(model) == 0

    def fail(*_):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"), hooked(model, sites, fail):
        model(tiny.tokens()["input_ids"])
    assert hooks(model) == 0
    with pytest.raises(AttributeError), hooked(model, [sites[0], Site("nowhere", 1)], fail):
        pass
    assert hooks(model) == 0


def test_fingerprint_tells_targets_apart_by_one_bit():
    model, same = tiny.gpt2(), tiny.gpt2()
    assert fingerprint(model) == fingerprint(same)
    with torch.no_grad():
        weight = same.transformer.h[0].mlp.c_fc.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))
    assert fingerprint(model) != fingerprint(same)
    assert fingerprint(model) != fingerprint(tiny.gpt2().bfloat16())


@pytest.mark.parametrize("make", [tiny.gpt2, tiny.mistral, tiny.roberta, tiny.vit])
def test_sites_hold_all_mixing_between_positions(make):
    assert mixing(make(), find_sites(make())) < 1e-5


@pytest.mark.parametrize("make", [tiny.gpt2, tiny.mistral, tiny.roberta, tiny.vit])
def test_one_site_left_out_mixes(make):
    for left_out in range(2):
        sites = find_sites(make())
        del sites[left_out]
        assert mixing(make(), sites) > 1e-3


@pytest.mark.parametrize("place", ["input", "output"])
def test_value_rows_of_a_head_reach_only_its_slice_of_the_site(place):
    """Head 1's value columns of GPT-2's fused projection; the projection's output would show it everywhere."""
    model = tiny.gpt2()
    moved = head_change(model, "transformer.h.0.attn.c_proj", place, lambda: perturb_gpt2_value(model, head=1))
    slices = moved.view(4, 4).amax(1)
    only_its_own = bool(slices[1] > 1e-3) and bool((slices[[0, 2, 3]] == 0).all())
    assert only_its_own == (place == "input")


def perturb_gpt2_value(model, head, size=4):
    weight = model.transformer.h[0].attn.c_attn.weight  # (inputs, 3 x 16): query, key, value
    width = model.config.n_embd
    with torch.no_grad():
        value = weight[:, 2 * width + head * size : 2 * width + (head + 1) * size]
        value += torch.randn_like(value)


def head_change(model, name, place, perturb):
    """The largest change of each neuron at a projection's input or output when ``perturb`` changes the weights."""

    def read():
        kept = []
        module = model.get_submodule(name)
        handle = (
            module.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
            if place == "input"
            else module.register_forward_hook(lambda _, __, output: kept.append(output))
        )
        with torch.no_grad():
            model(tiny.tokens()["input_ids"])
        handle.remove()
        return kept[0].flatten(0, -2)

    before = read()
    perturb()
    return (read() - before).abs().amax(0)


def mixing(model, sites):
    """How far the last hidden state at one place moves when every other place changes and the sites are constant."""
    if hasattr(model, "config"):
        first, second = tiny.tokens(1, seed=0)["input_ids"], tiny.tokens(1, seed=1)["input_ids"]
        second[:, 5] = first[:, 5]
        place = 5
    else:
        first, second = torch.randn(1, 1, 8, 8), torch.randn(1, 1, 8, 8)
        second[..., :4, 4:] = first[..., :4, 4:]
        place = 2  # after the class token, the second patch
    with torch.no_grad(), hooked(model, sites, lambda site, x: torch.full_like(x, 0.3)):
        return (last_hidden(model, first) - last_hidden(model, second))[0, place].abs().max().item()


def last_hidden(model, inputs):
    if hasattr(model, "config"):
        return model(inputs, output_hidden_states=True).hidden_states[-1]
    return model.forward_features(inputs)
