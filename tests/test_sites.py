import pytest
import torch
from torch import nn

from lightning_ablate.errors import SiteError
from lightning_ablate.masks import heads_of
from lightning_ablate.sites import Site, check_mixing, find_sites, fingerprint, hooked
from tests import tiny


def hooks(model):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


class Parts(nn.Module):
    """A target of named parts, run by a function."""

    def __init__(self, run, **parts):
        super().__init__()
        self.parts, self.run = nn.ModuleDict(parts), run

    def forward(self, x):
        return self.run(self.parts, x)


def found(target, *which):
    """The sites of a target that takes ``(batch, 5, 8)``."""
    return find_sites(target, lambda: target(torch.randn(2, 5, 8)), which or ("attention",))


def attention(parts, x, heads=2):
    """By hand, with everything that may stand between attention and its projection."""
    query, key, value = (parts[name](x).unflatten(-1, (heads, -1)).transpose(1, 2) for name in ("q", "k", "v"))
    weights = (query @ key.transpose(2, 3)).softmax(-1).to(x.dtype)
    mixed = nn.functional.dropout(weights, 0.0) @ value
    return mixed.transpose(1, 2).flatten(2)


def three(width=8):
    return {name: nn.Linear(8, width) for name in ("q", "k", "v")}


@pytest.mark.parametrize(
    ("make", "names", "width", "layers"),
    [
        (tiny.gpt2, "transformer.h.{}.attn.c_proj", 16, "transformer.h.{}"),
        (tiny.mistral, "model.layers.{}.self_attn.o_proj", 32, "model.layers.{}"),
        (tiny.roberta, "roberta.encoder.layer.{}.attention.output.dense", 16, "roberta.encoder.layer.{}"),
        (tiny.opt, "model.decoder.layers.{}.self_attn.out_proj", 16, "model.decoder.layers.{}"),
        (tiny.vit, "blocks.{}.attn.proj", 16, "blocks.{}"),
    ],
)
def test_find_sites_takes_every_attention_output_projection(make, names, width, layers):
    expected = [Site(names.format(i), width, 4, "self-attention", layers.format(i)) for i in (0, 1)]
    assert tiny.sites(make()) == expected


@pytest.mark.parametrize(
    ("make", "names", "width"),
    [
        (tiny.gpt2, "transformer.h.{}.mlp.c_proj", 64),
        (tiny.mistral, "model.layers.{}.mlp.down_proj", 32),
        (tiny.roberta, "roberta.encoder.layer.{}.output.dense", 32),
        (tiny.opt, "model.decoder.layers.{}.fc2", 32),
        (tiny.vit, "blocks.{}.mlp.fc2", 64),
    ],
)
def test_find_sites_takes_every_mlp_down_projection_and_no_head_of_the_model(make, names, width):
    model = make()
    mlps = tiny.sites(model, "mlp")
    assert [(site.name, site.width, site.kind, site.heads) for site in mlps] == [
        (names.format(i), width, "mlp", None) for i in (0, 1)
    ]
    both = tiny.sites(model, "mlp", "attention")
    assert [site.kind for site in both] == ["self-attention", "mlp"] * 2
    assert [site.layer for site in both] == [layer for site in mlps for layer in [site.layer] * 2]


def test_site_width_is_heads_times_head_dim_not_hidden_size():
    model = tiny.mistral()
    config = model.config
    assert {site.width for site in tiny.sites(model)} == {config.num_attention_heads * config.head_dim}
    assert config.num_attention_heads * config.head_dim != config.hidden_size
    assert config.num_key_value_heads < config.num_attention_heads == tiny.sites(model)[0].heads


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_both_implementations_of_attention_give_the_same_sites(implementation):
    model = tiny.mistral()
    model.set_attn_implementation(implementation)
    assert tiny.sites(model) == tiny.sites(tiny.mistral())


def test_a_module_used_by_every_layer_is_a_site_for_each_use():
    model = tiny.albert()
    path = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    sites = tiny.sites(model)
    assert [site.name for site in sites] == [f"{path}.attention.dense{use}" for use in ("", "#1", "#2")]
    assert [site.layer for site in sites] == [path, f"{path}#1", f"{path}#2"]
    assert {(site.path, site.uses) for site in sites} == {(f"{path}.attention.dense", 3)}
    seen = []
    with hooked(model, [sites[2]], lambda site, x: seen.append((site, x))):
        tiny.run(model)
    by_hand = []
    handle = model.get_submodule(sites[0].path).register_forward_pre_hook(lambda _, inputs: by_hand.append(inputs[0]))
    tiny.run(model)
    handle.remove()
    assert len(by_hand) == 3 and [site for site, _ in seen] == [sites[2]] and torch.equal(seen[0][1], by_hand[2])


def test_encoder_decoders_tell_self_from_cross_attention():
    model = tiny.t5()
    kinds = [(site.name.split(".")[0], site.kind) for site in tiny.sites(model)]
    decoder = [("decoder", "self-attention"), ("decoder", "cross-attention")]
    assert kinds == [("encoder", "self-attention")] * 2 + decoder * 2
    crossed = tiny.sites(model, "cross-attention")
    assert [site.layer for site in crossed] == ["decoder.block.0", "decoder.block.1"]
    assert len(tiny.sites(model, "self-attention")) == 4 and len(tiny.sites(model, "mlp")) == 4


def test_find_sites_pattern_chooses_modules_of_any_kind():
    assert [site.name for site in tiny.sites(tiny.gpt2(), "*.1.attn.c_proj")] == ["transformer.h.1.attn.c_proj"]
    model = tiny.gpt2()
    assert tiny.sites(model, "*.0.mlp.c_proj") == tiny.sites(model, "mlp")[:1]
    (fused,) = tiny.sites(model, "*.0.attn.c_attn")
    assert (fused.kind, fused.width, fused.heads) == ("other", 16, None)


@pytest.mark.parametrize(
    "between",
    [
        lambda parts, x: attention(parts, x) * torch.sigmoid(parts["gate"](x)),
        lambda parts, x: parts["norm"](attention(parts, x)),
        lambda parts, x: torch.cat([attention(parts, x[:, :2]), attention(parts, x[:, 2:])], 1),
        lambda parts, x: attention(parts, x[:, torch.tensor([3, 1])]).roll(1, 1).contiguous().to(torch.float64).float(),
    ],
    ids=["gate", "norm", "windows", "moved"],
)
def test_what_stands_between_attention_and_its_projection_doesnt_hide_it(between):
    gate, norm = nn.Linear(8, 8), nn.LayerNorm(8)
    target = Parts(lambda parts, x: parts["o"](between(parts, x)), **three(), gate=gate, norm=norm, o=nn.Linear(8, 4))
    assert found(target) == [Site("parts.o", 8, 2)]


@pytest.mark.parametrize(
    "product",
    [
        lambda weights, value: weights @ value,
        lambda weights, value: torch.einsum("bhqk,bhkd->bhqd", weights, value),
        lambda weights, value: torch.einsum("bhqk,bhkd->bqhd", weights, value).transpose(1, 2),
        lambda weights, value: (value.transpose(2, 3) @ weights.transpose(2, 3)).transpose(2, 3),
        lambda weights, value: torch.bmm(weights.flatten(0, 1), value.flatten(0, 1)).view(2, 4, 5, 2),
        lambda weights, value: nn.functional.scaled_dot_product_attention(value, value, value),
    ],
    ids=["matmul", "einsum", "einsum heads last", "values first", "flat heads", "fused"],
)
def test_heads_are_counted_however_weights_meet_values(product):
    def run(parts, x):
        heads = x.unflatten(-1, (4, 2)).transpose(1, 2)
        mixed = product((heads @ heads.transpose(2, 3)).softmax(-1), heads)
        return parts["o"](mixed.transpose(1, 2).flatten(2))

    assert found(Parts(run, o=nn.Linear(8, 8))) == [Site("parts.o", 8, 4)]


@pytest.mark.parametrize(
    "order",
    [
        lambda mixed: mixed.permute(0, 2, 3, 1),  # neuron by neuron, head after head
        lambda mixed: mixed.flip(1).transpose(1, 2),  # the last head first
    ],
    ids=["interleaved", "permuted"],
)
def test_heads_that_do_not_lie_side_by_side_in_order_are_not_counted(order):
    def run(parts, x):
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(heads, heads, heads)
        return parts["o"](order(mixed).flatten(2))

    (site,) = found(Parts(run, o=nn.Linear(8, 8)))
    assert site == Site("parts.o", 8, None)
    with pytest.raises(SiteError, match="parts.o .* has no heads that lie side by side"):
        heads_of(site)


def test_a_wrapped_projection_is_one_site():
    class Adapted(nn.Module):
        in_features = out_features = 8

        def __init__(self):
            super().__init__()
            self.base, self.down, self.up = nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(2, 8)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    target = Parts(lambda parts, x: parts["o"](attention(parts, x)), **three(), o=Adapted())
    assert found(target) == [Site("parts.o", 8, 2)]


def test_find_sites_says_why_there_are_none():
    bare = Parts(lambda parts, x: attention(parts, x) @ parts["o"].weight, **three(), o=nn.Linear(8, 8))
    with pytest.raises(SiteError, match=r"no projection module reads what attention makes in the target itself \(1"):
        found(bare)
    mixer = Parts(lambda parts, x: parts["o"](x.cumsum(1)), o=nn.Linear(8, 3))
    with pytest.raises(SiteError, match=r"found no attention.*pattern.*the projections that ran are parts.o \(8\)"):
        found(mixer)
    with pytest.raises(SiteError, match="no site of the kind 'cross-attention', it has mlp, self-attention"):
        tiny.sites(tiny.gpt2(), "cross-attention")


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("*.7.attn.c_proj", r"'\*.7.attn.c_proj' matches no module.*h.0.attn.c_attn \(16\)"),
        ("transformer.h.0.ln_1", "LayerNorm, which is no projection"),
    ],
)
def test_a_pattern_that_means_no_projection_is_refused(which, message):
    with pytest.raises(SiteError, match=message):
        tiny.sites(tiny.gpt2(), which)


def test_experts_without_a_down_projection_of_their_own_are_refused():
    with pytest.raises(
        SiteError,
        match=r"experts of model.layers.0 are one parameter model.layers.0.mlp.experts.\w+ \(4, .*leave `mlp`",
    ):
        tiny.sites(tiny.mixtral(), "mlp")
    assert len(tiny.sites(tiny.mixtral())) == 2

    def routed(parts, x):
        mixed, layer = parts["h"][0]["o"](attention(parts, x)), parts["h"][0]
        shares = zip(layer["experts"], (mixed[:, :3], mixed[:, 3:]), strict=True)
        return torch.cat([expert["down"](expert["up"](share).relu()) for expert, share in shares], 1)

    experts = [nn.ModuleDict({"up": nn.Linear(8, 16), "down": nn.Linear(16, 8)}) for _ in range(2)]
    layer = nn.ModuleDict({"o": nn.Linear(8, 8), "experts": nn.ModuleList(experts)})
    with pytest.raises(
        SiteError,
        match=r"not every position is read by .*h.0.experts.0.down 6, \S+h.0.experts.1.down 4 .*they are experts",
    ):
        found(Parts(routed, **three(), h=nn.ModuleList([layer])), "mlp")


def blocks(parts, x, attend):
    """Two layers of attention and an MLP with residual streams."""
    for layer in parts["h"]:
        x = x + attend(layer, x)
        x = x + layer["down"](layer["up"](x).relu())
    return x


def layers(**extra):
    made = [
        nn.ModuleDict({**three(), "o": nn.Linear(8, 8), "up": nn.Linear(8, 16), "down": nn.Linear(16, 8)})
        for _ in range(2)
    ]
    for layer in made:
        layer.update({name: make() for name, make in extra.items()})
    return nn.ModuleList(made)


def plain_attention(layer, x):
    return layer["o"](attention(layer, x))


def test_a_stem_with_a_nonlinearity_makes_no_mlp_of_what_follows():
    target = Parts(
        lambda parts, x: blocks(parts, parts["stem"](x).relu(), plain_attention), stem=nn.Linear(8, 8), h=layers()
    )
    assert [site.name for site in found(target)] == ["parts.h.0.o", "parts.h.1.o"]
    assert [site.name for site in found(target, "mlp")] == ["parts.h.0.down", "parts.h.1.down"]


def test_mlps_of_layers_without_attention_are_sites_too():
    def run(parts, x):
        first, second = parts["h"]
        x = x + first["down"](first["up"](x).relu())
        return blocks({"h": [second]}, x, plain_attention)

    assert [site.name for site in found(Parts(run, h=layers()), "mlp")] == ["parts.h.0.down", "parts.h.1.down"]


def test_a_softmax_that_weighs_experts_is_no_attention():
    def run(parts, x):
        x = x + parts["o"](attention(parts, x))
        weights = parts["router"](x).softmax(-1)
        made = torch.stack([parts["first"](x), parts["second"](x)], -2)
        return parts["head"](x + torch.einsum("bse,bsed->bsd", weights, made))

    experts = {"first": nn.Linear(8, 8), "second": nn.Linear(8, 8), "head": nn.Linear(8, 3)}
    with pytest.raises(SiteError, match="no projection module reads what attention makes"):
        found(Parts(run, **three(), o=nn.Linear(8, 8), router=nn.Linear(8, 2), **experts))


def test_attention_without_a_projection_of_its_own_is_refused():
    into_a_sum = Parts(lambda parts, x: parts["up"](x + attention(parts, x)), **three(), up=nn.Linear(8, 16))
    with pytest.raises(SiteError, match="no projection module reads what attention makes"):
        found(into_a_sum)
    fused = nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=16, batch_first=True).eval()
    whole = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    for target in (fused, Parts(lambda parts, x: parts["a"](x, x, x)[0], a=whole)):
        with pytest.raises(SiteError, match="no projection module reads what attention makes"):
            found(target)


def test_an_output_that_two_projections_read_is_refused():
    def run(parts, x):
        made = attention(parts, x)
        return parts["base"](made) + parts["up"](parts["down"](made))

    adapted = {"base": nn.Linear(8, 8), "down": nn.Linear(8, 2), "up": nn.Linear(2, 8)}
    with pytest.raises(SiteError, match="read by several projections, among parts.base, parts.down"):
        found(Parts(run, **three(), **adapted))


def test_a_target_that_runs_twice_is_refused():
    model = tiny.gpt2()
    with pytest.raises(SiteError, match="the target ran 2 times for one batch, expected once"):
        find_sites(model, lambda: (tiny.run(model), tiny.run(model)))


def test_heads_moved_by_an_index_are_not_counted():
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    target = Parts(
        lambda parts, x: parts["o"](attention(parts, x).gather(2, order.expand(2, 5, 8))), **three(), o=nn.Linear(8, 8)
    )
    assert found(target) == [Site("parts.o", 8, None)]


def test_finding_changes_nothing_and_leaves_no_hook():
    model = tiny.gpt2()
    clean = tiny.run(model)
    read = []
    find_sites(model, lambda: read.append(tiny.run(model)))
    assert torch.equal(read[0], clean) and hooks(model) == 0


def test_check_mixing_passes_attention_and_refuses_other_ways():
    def last(parts, x):
        return parts["o"](attention(parts, x))

    conv = nn.Conv1d(8, 8, 3, padding=1)
    pure = Parts(last, **three(), o=nn.Linear(8, 8))
    mixed = Parts(lambda parts, x: last(parts, x) + parts["c"](x.mT).mT, **three(), o=nn.Linear(8, 8), c=conv)
    first = torch.randn(1, 5, 8)
    second = first.clone()
    second[:, 2] += 1
    inputs = (first, second)
    check_mixing(pure, found(pure), lambda number: [pure(inputs[number])])
    with pytest.raises(SiteError, match="moves the last hidden state at 3 of 5 positions although every attention"):
        check_mixing(mixed, found(mixed), lambda number: [mixed(inputs[number])])


def test_hooked_passes_the_projections_input_and_uses_what_is_returned():
    model = tiny.gpt2()
    site = tiny.sites(model)[1]
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
    sites = tiny.sites(model)
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


def test_check_mixing_needs_two_positions_and_looks_past_masked_features():
    target = Parts(lambda parts, x: parts["o"](attention(parts, x)), **three(), o=nn.Linear(8, 8))
    inputs = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    with pytest.raises(SiteError, match="the last hidden state has a single position"):
        check_mixing(target, found(target), lambda number: [target(inputs[number])[:, :1]])
    first = torch.randn(1, 5, 8)
    second = first.clone()
    second[:, 2] += 1

    def masked(number):
        logits = target((first, second)[number]) + (first, second)[number].roll(1, 1)
        logits[..., 0] = torch.finfo(torch.float32).min
        return [logits + (first, second)[number]]

    with pytest.raises(SiteError, match="moves the last hidden state at 2 of 5 positions"):
        check_mixing(target, found(target), masked)
