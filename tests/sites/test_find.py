"""Which places are sites, of which kind and layer; and what is refused."""

import pytest
import torch
from torch import nn

from lightning_ablate.errors import SiteError
from lightning_ablate.sites import Site, check_mixing, find_sites, hooked, mixing
from tests import reference, tiny
from tests.sites.parts import Parts, attention, found, linear, three


@pytest.mark.parametrize(
    ("make", "layer", "projection", "width", "down", "mlp_width"),
    [
        (tiny.gpt2, "transformer.h.{}", "attn.c_proj", 16, "mlp.c_proj", 64),
        (tiny.mistral, "model.layers.{}", "self_attn.o_proj", 32, "mlp.down_proj", 32),  # of a hidden size of 24
        (tiny.roberta, "roberta.encoder.layer.{}", "attention.output.dense", 16, "output.dense", 32),
        (tiny.opt, "model.decoder.layers.{}", "self_attn.out_proj", 16, "fc2", 32),
        (tiny.vit, "blocks.{}", "attn.proj", 16, "mlp.fc2", 64),
    ],
)
def test_find_sites_takes_every_output_and_down_projection(make, layer, projection, width, down, mlp_width):
    layers = [layer.format(number) for number in (0, 1)]
    heads = [Site(f"{name}.{projection}", width, 4, "self-attention", name) for name in layers]
    mlps = [Site(f"{name}.{down}", mlp_width, None, "mlp", name) for name in layers]
    model = make()
    assert tiny.sites(model) == heads
    assert tiny.sites(model, "mlp") == mlps
    assert tiny.sites(model, "mlp", "attention") == [heads[0], mlps[0], heads[1], mlps[1]]


def test_find_sites_takes_any_example_and_prints_a_table():
    model, batch = tiny.gpt2(), tiny.tokens()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    which = ["attention", "*.1.mlp.c_proj"]
    for example in (batch["input_ids"], inputs, lambda: model(**inputs)):
        assert find_sites(model, example, which) == tiny.sites(model, *which)
    assert str(find_sites(model, inputs, which)).splitlines() == [
        "site                         kind            neurons  heads",
        "transformer.h.0.attn.c_proj  self-attention       16      4",
        "transformer.h.1.attn.c_proj  self-attention       16      4",
        "transformer.h.1.mlp.c_proj   mlp                  64      -",
    ]


def test_encoder_decoders_tell_self_from_cross_attention():
    model = tiny.t5()
    kinds = [(site.name.split(".")[0], site.kind) for site in tiny.sites(model)]
    decoder = [("decoder", "self-attention"), ("decoder", "cross-attention")]
    assert kinds == [("encoder", "self-attention")] * 2 + decoder * 2
    crossed = tiny.sites(model, "cross-attention")
    assert [site.layer for site in crossed] == ["decoder.block.0", "decoder.block.1"]
    assert len(tiny.sites(model, "self-attention")) == 4 and len(tiny.sites(model, "mlp")) == 4


def test_find_sites_pattern_chooses_modules_of_any_kind():
    model = tiny.gpt2()
    assert [site.name for site in tiny.sites(model, "*.1.attn.c_proj")] == ["transformer.h.1.attn.c_proj"]
    assert tiny.sites(model, "*.0.mlp.c_proj") == tiny.sites(model, "mlp")[:1]
    (fused,) = tiny.sites(model, "*.0.attn.c_attn")
    assert (fused.kind, fused.width, fused.heads) == ("other", 16, None)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("*.7.attn.c_proj", r"'\*.7.attn.c_proj' .* matches no module.*h.0.attn.c_attn \(16\)"),
        ("transformer.h.0.ln_1", "LayerNorm, which is no projection"),
        ("cross-attention", "no site of the kind 'cross-attention' .*, it has mlp, self-attention"),
    ],
)
def test_what_isnt_there_is_refused(which, message):
    with pytest.raises(SiteError, match=message):
        tiny.sites(tiny.gpt2(), which)


def test_experts_that_are_not_computed_one_by_one_are_refused():
    class Together(nn.Module):
        """All experts in one product, as in Llama 4."""

        def __init__(self):
            super().__init__()
            self.up, self.down = (nn.Parameter(torch.randn(4, *shape)) for shape in ((16, 32), (32, 16)))

        def forward(self, states, index, shares):
            chosen = torch.zeros(len(states), 4).scatter(1, index, shares)
            each = torch.einsum("th,ehn->etn", states, self.up).relu() @ self.down
            return torch.einsum("te,eth->th", chosen, each)

    model = tiny.mixtral()
    assert len(tiny.sites(model)) == 2
    for layer in model.model.layers:
        layer.mlp.experts = Together()
    with pytest.raises(SiteError, match=r"are one parameter model.layers.0.mlp.experts.\w+ \(4, .*leave `mlp`"):
        tiny.sites(model, "mlp")
    with pytest.raises(SiteError, match=r"no site 'experts' .*no experts ran that share a module"):
        tiny.sites(model, "experts")

    def routed(parts, x):
        mixed, layer = parts["h"][0]["o"](attention(parts, x)), parts["h"][0]
        shares = zip(layer["experts"], (mixed[:, :3], mixed[:, 3:]), strict=True)
        return torch.cat([expert["down"](expert["up"](share).relu()) for expert, share in shares], 1)

    experts = [nn.ModuleDict({"up": nn.Linear(8, 16), "down": nn.Linear(16, 8)}) for _ in range(2)]
    layer = nn.ModuleDict({"o": nn.Linear(8, 8), "experts": nn.ModuleList(experts)})
    read = r"\S+h.0.experts.0.down 6, \S+h.0.experts.1.down 4 positions\): they are experts"
    with pytest.raises(SiteError, match=rf"not every position is read by .*{read}"):
        found(Parts(routed, **three(), h=nn.ModuleList([layer])), "mlp")


def blocks(layers, x):
    """Layers of attention and an MLP with residual streams."""
    for layer in layers:
        x = x + layer["o"](attention(layer, x))
        x = x + layer["down"](layer["up"](x).relu())
    return x


def two_layers():
    parts = [{**three(), **linear(o=8, up=16), "down": nn.Linear(16, 8)} for _ in range(2)]
    return nn.ModuleList(map(nn.ModuleDict, parts))


def test_mlps_are_found_behind_a_stem_with_a_nonlinearity_and_in_layers_without_attention():
    target = Parts(lambda parts, x: blocks(parts["h"], parts["stem"](x).relu()), **linear(stem=8), h=two_layers())
    assert [site.name for site in found(target)] == ["parts.h.0.o", "parts.h.1.o"]
    assert [site.name for site in found(target, "mlp")] == ["parts.h.0.down", "parts.h.1.down"]

    def run(parts, x):
        first, second = parts["h"]
        return blocks([second], x + first["down"](first["up"](x).relu()))

    assert [site.name for site in found(Parts(run, h=two_layers()), "mlp")] == ["parts.h.0.down", "parts.h.1.down"]


def test_a_target_that_runs_twice_is_refused():
    model = tiny.gpt2()
    with pytest.raises(SiteError, match="the target ran 2 times for one batch, expected once"):
        find_sites(model, lambda: (tiny.run(model), tiny.run(model)))


def test_finding_changes_nothing_and_no_hook_is_left_even_if_a_module_is_missing():
    model = tiny.gpt2()
    clean, read = tiny.run(model), []
    find_sites(model, lambda: read.append(tiny.run(model)))
    assert torch.equal(read[0], clean) and reference.hooks(model) == 0
    with (
        pytest.raises(AttributeError),
        hooked(model, dict.fromkeys([*tiny.sites(model), Site("nowhere", 1)], read.append)),
    ):
        pass
    assert reference.hooks(model) == 0


def test_layers_that_cannot_be_tried_count_as_mixing():
    assert mixing._mixes(nn.Linear(4, 4), (torch.rand(4),), {})  # no position to change
    assert mixing._mixes(nn.Linear(4, 4), (), {})
    assert not mixing._mixes(nn.Linear(4, 4), (torch.rand(1, 3, 4),), {})


def test_check_mixing_needs_two_positions_and_looks_past_masked_features():
    target = Parts(lambda parts, x: parts["o"](attention(parts, x)), **three(), **linear(o=8))
    first = torch.randn(1, 5, 8)
    inputs = first, first + (torch.arange(5) == 2).float().view(1, 5, 1)
    with pytest.raises(SiteError, match="the last hidden state has a single position"):
        check_mixing(target, found(target), lambda number: [target(inputs[number])[:, :1]])

    def masked(number):
        logits = target(inputs[number]) + inputs[number].roll(1, 1)
        logits[..., 0] = torch.finfo(torch.float32).min
        return [logits + inputs[number]]

    with pytest.raises(SiteError, match="moves the last hidden state at 2 of 5 positions"):
        check_mixing(target, found(target), masked)
