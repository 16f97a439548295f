"""Outputs of blocks, and queries, keys and values: seen by what they do, whatever the architecture."""

from functools import partial

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_ablate import Calibration, ConditionalMean, Covariance, Moments, ablated
from lightning_ablate.errors import SiteError
from lightning_ablate.sites import Prefix, find_sites, hooked, keep
from lightning_ablate.sites.outputs import ROLES
from tests.coverage import COVERED, MIXED, tiny
from tests.reference import conditional_mean, plain_hooks, put

pytestmark = pytest.mark.filterwarnings("ignore")  # as the libraries are
IDS = torch.arange(24).view(2, 12) + 3
# bare weights, or keys put together in place
UNSEEN = {"deepseek_v2", "deepseek_v3", "minicpm3", "youtu"}
BARE = {"deberta", "beit_base_patch16_224", "beitv2_base_patch16_224", "eva02_tiny_patch14_224"}
BARE |= {"swinv2_tiny_window8_256"}
# their own norms, talking heads and masks go across heads
ACROSS = {"bitnet", "cait_xxs24_224", "doge", "flex_olmo", "minimax_m2", "olmo2", "olmo3", "olmoe"}
SHORT = set(
    "gpt2 llama mistral qwen3 phi3 bloom gpt_neox falcon gemma3_text opt bert modernbert t5 bart vit dinov2 swin "
    "vit_tiny_patch16_224 deit3_small_patch16_224 convbert deepseek_v3 beit_base_patch16_224".split()
)


def tiny_gpt2():
    config = GPT2Config(n_layer=3, n_embd=32, n_head=4, vocab_size=64, n_positions=16, bos_token_id=1, eos_token_id=1)
    return GPT2LMHeadModel(config).eval()


def changed(target, hooks, sites):
    """Where the given sites' activations change, bool, when hooks act: ``(batch, positions, neurons)`` each."""
    seen = []
    for own in ({}, hooks):
        found = {}
        reads = {site: partial(keep, found, site) for site in sites}
        with torch.no_grad(), hooked(target.model, own), hooked(target.model, reads):
            target.run(0)
        seen.append(found)
    return [(seen[1][site] - seen[0][site]).abs() > 1e-6 * seen[0][site].abs().max() for site in sites]


def check(case):
    """A head's query, key and value move its slice alone; values are mixed, queries act at their own position."""
    target = tiny(case)
    sites = find_sites(target.model, lambda: target.run(0), ["attention", "query", "key", "value"])
    reads = [site for site in sites if site.kind in ("self-attention", "cross-attention")]
    for role in ("query", "key", "value"):
        made = [site for site in sites if site.kind == role]
        assert len(made) == len(reads)
        for site, read in zip(made, reads, strict=True):
            if site.heads is None or read.heads is None:
                continue
            size = site.width // site.heads

            def noise(x, size=size):
                x = x.clone()
                x[..., -size:] = torch.randn_like(x[..., -size:]) * x.std()  # the last head
                return x

            moved = changed(target, {site: noise}, [read])[0].flatten(0, -2).any(0).view(read.heads, -1).any(1)
            group = read.heads // site.heads  # heads that share a key
            assert moved.tolist() == [False] * (read.heads - group) + [True] * group, (role, site.name)
    return target, sites, reads


@pytest.mark.parametrize("case", [c for c in COVERED if c.name in SHORT - BARE - UNSEEN], ids=lambda case: case.name)
def test_a_heads_query_key_and_value_move_its_slice_alone(case):
    check(case)


@pytest.mark.parametrize(
    "case", [c for c in COVERED if c.name not in SHORT | BARE | UNSEEN | ACROSS], ids=lambda c: c.name
)
def test_they_do_so_in_all_covered_architectures(case, full):
    check(case)


@pytest.mark.parametrize("case", [c for c in COVERED if c.name in BARE | UNSEEN], ids=lambda case: case.name)
def test_keys_that_no_projection_module_makes_are_refused(case):
    target = tiny(case)
    with pytest.raises(SiteError, match="no projection module gives attention its key"):
        find_sites(target.model, lambda: target.run(0), "key")


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "bert", "vit_tiny_patch16_224"])
def test_queries_act_where_they_are_keys_elsewhere_and_constant_values_come_through(name):
    case = next(case for case in COVERED if case.name == name)
    target = tiny(case)
    sites = find_sites(target.model, lambda: target.run(0), ["attention", "query", "key", "value"])
    kinds = ("query", "key", "value", "self-attention")
    query, key, value, read = (next(site for site in sites if site.kind == kind) for kind in kinds)

    def third(x):
        x = x.clone()
        x[:, 3] += 1 + x[:, 3].abs()
        return x

    places = {role: changed(target, {site: third}, [read])[0].any(-1)[0] for role, site in [("q", query), ("k", key)]}
    assert places["q"].nonzero().flatten().tolist() == [3]
    assert places["k"][3 if case.kind == "decoder" else 0 :].all()
    found, constant = {}, torch.arange(float(value.width))
    with torch.no_grad(), hooked(target.model, {value: lambda x: constant.expand_as(x)}):
        with hooked(target.model, {read: lambda x: keep(found, read, x)}):
            target.run(0)
    shared = constant.view(value.heads, -1).repeat_interleave(read.heads // value.heads, 0).flatten()
    torch.testing.assert_close(found[read], shared.expand_as(found[read]))


def test_the_residual_stream_is_what_transformers_calls_hidden_states():
    model = tiny_gpt2()
    sites = find_sites(model, IDS, "residual")
    assert [site.name for site in sites] == [f"transformer.h.{layer}:output" for layer in range(3)]
    assert {(site.side, site.kind, site.width, site.heads) for site in sites} == {("output", "residual", 32, None)}
    found = {}
    with torch.no_grad(), hooked(model, {site: partial(keep, found, site) for site in sites}, once=True):
        states = model(IDS, output_hidden_states=True).hidden_states
    for site, state in zip(sites[:-1], states[1:-1], strict=True):  # the last state is behind the last norm
        assert torch.equal(found[site], state)
    assert torch.equal(model.transformer.ln_f(found[sites[-1]]), states[-1])


@torch.no_grad()
def test_an_output_is_ablated_as_a_plain_hook_would():
    model, mask = tiny_gpt2(), torch.arange(32) % 3 == 0
    with ablated(model, {"transformer.h.1:output": mask}):
        found = model(IDS).logits
    with plain_hooks(model, {"transformer.h.1:output": lambda x: torch.where(mask, 0, x)}):
        assert torch.equal(found, model(IDS).logits)
    assert not torch.equal(found, model(IDS).logits)


@torch.no_grad()
def test_parts_of_one_projection_are_ablated_together_and_alone():
    model, sites = tiny_gpt2(), {}
    for site in find_sites(model, IDS, ["query", "key"]):
        sites.setdefault(site.path, []).append(site)
    query, key = sites["transformer.h.0.attn.c_attn"]
    with hooked(model, {query: torch.zeros_like, key: lambda x: x + 1}, once=True):
        found = model(IDS).logits
    change = lambda x: torch.cat([0 * x[..., :32], x[..., 32:64] + 1, x[..., 64:]], -1)  # noqa: E731
    with plain_hooks(model, {"transformer.h.0.attn.c_attn:output": change}):
        assert torch.equal(found, model(IDS).logits)


def test_grouped_keys_have_their_own_heads():
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, hidden_size=32, vocab_size=64, **heads)).eval()
    found = [(site.kind, site.width, site.heads) for site in find_sites(model, IDS, ["query", "key", "value"])]
    assert found == [("query", 32, 4), ("key", 16, 2), ("value", 16, 2)]


def test_what_is_no_site_is_refused_in_a_line():
    model = tiny_gpt2()
    for word, reason in {
        "*.h.0:input": r"a side is output, query, key, value, expert0, expert1 \.\.\., or none for an input",
        "*.h.7:output": "it matches no module",
        "*.h.0.mlp:query": "no module of these ran and returned",
    }.items():
        with pytest.raises(SiteError, match=reason):
            find_sites(model, IDS, word)


def test_an_output_whose_last_dimension_holds_no_features_is_no_site():
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Flatten(2), nn.Linear(49, 4))
    with pytest.raises(SiteError, match="returned features alone"):
        find_sites(model, torch.rand(2, 3, 7, 7), "0:output")


@pytest.mark.parametrize("case", [case for case, _ in MIXED if case.kind == "decoder"], ids=lambda case: case.name)
def test_layers_without_attention_have_outputs_too(case):
    target = tiny(case)
    sites = find_sites(target.model, lambda: target.run(0), "residual")
    assert [site.name for site in sites] == [f"layers.{number}:output" for number in range(len(target.model.layers))]


def test_a_conv1d_of_transformers_has_an_output():
    (site,) = find_sites(tiny_gpt2(), IDS, "transformer.h.0.attn.c_attn:output")
    assert (site.width, site.basis) == (96, None)


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x)


class Layer(nn.Module):
    """Attention whose query and key may be one projection that runs twice."""

    def __init__(self, kind, tied):
        super().__init__()
        self.proj, self.tied = nn.ModuleList([kind() for _ in range(3)]), tied
        self.o, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        made = self.proj[0](x), self.proj[0 if self.tied else 1](x.flip(1)), self.proj[2](x)
        x = x + self.o(nn.functional.scaled_dot_product_attention(*(one[:, None] for one in made))[:, 0])
        return x + self.down(nn.functional.gelu(self.up(x)))


@torch.no_grad()
@pytest.mark.parametrize("kind", [Wrapped, lambda: nn.Linear(8, 8)])
@pytest.mark.parametrize("words", [["key"], ["*.proj.*:output", "query", "key", "residual"]])
def test_layers_before_outputs_are_answered_to_the_bit(kind, words):
    layers = [Layer(kind, tied) for tied in (True, False, False)]
    model, x = nn.Sequential(nn.Sequential(*layers), nn.Identity()).eval(), torch.randn(2, 5, 8)
    sites = find_sites(model, x, words)
    prefix = Prefix(model, sites, len(sites) - 1, 2**30)
    with hooked(model, {}):
        with prefix.recorded():
            intact = model(x)
        prefix.prove(lambda: torch.equal(model(x), intact))
    assert prefix._kept
    for place, site in reversed(list(enumerate(sites))):
        with hooked(model, {site: torch.zeros_like}, once=True):
            whole = model(x)
        with hooked(model, {site: torch.zeros_like}, once=True), prefix.reused(place):
            assert torch.equal(model(x), whole), site.name


def apart(q, k, v, block):
    """The paths of a layer's queries, keys and values, of whose outputs all features count, and of the layer."""
    return {"query": (q, None), "key": (k, None), "value": (v, None), "residual": (block, None)}


def fused(path, block, *sizes):
    """Those of one projection that gives them one after the other, so many features each."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    parts = [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    return {**{role: (path, own) for role, own in zip(ROLES, parts, strict=True)}, "residual": (block, None)}


def by_head(path, block):
    """Those of one that gives them head by head, 4 of 3 times 8 features."""
    numbers = torch.arange(96).view(4, 3, 8)
    return {
        **{role: (path, numbers[:, i].flatten().tolist()) for i, role in enumerate(ROLES)},
        "residual": (block, None),
    }


def named(block, attention, *names):
    return apart(*(f"{block}.{attention}.{name}" for name in names), block)


PROJ = ("q_proj", "k_proj", "v_proj")
PLACES = {
    "gpt2": fused("h.1.attn.c_attn", "h.1", 32, 32, 32),
    "llama": named("layers.1", "self_attn", *PROJ),
    "qwen3": named("layers.1", "self_attn", *PROJ),
    "phi3": fused("layers.1.self_attn.qkv_proj", "layers.1", 32, 16, 16),
    "bloom": by_head("h.1.self_attention.query_key_value", "h.1"),
    "gpt_neox": by_head("layers.1.attention.query_key_value", "layers.1"),
    "falcon": fused("h.1.self_attention.query_key_value", "h.1", 32, 8, 8),  # one key for all heads
    "gptj": named("h.1", "attn", *PROJ),
    "bert": named("encoder.layer.1", "attention.self", *ROLES),
    "distilbert": named("transformer.layer.1", "attention", "q_lin", "k_lin", "v_lin"),
    "bart": named("decoder.layers.1", "encoder_attn", *PROJ),
    "t5": apart(*(f"encoder.block.1.layer.0.SelfAttention.{name}" for name in "qkv"), "encoder.block.1"),
    "vit": named("layers.1", "attention", *PROJ),
    "vit_tiny_patch16_224": fused("blocks.1.attn.qkv", "blocks.1", 32, 32, 32),
    "deit3_small_patch16_224": fused("blocks.1.attn.qkv", "blocks.1", 32, 32, 32),
}


@torch.no_grad()
@pytest.mark.parametrize("name", PLACES)
def test_outputs_are_replaced_as_plain_hooks_would_on_many_architectures(name):
    target = tiny(next(case for case in COVERED if case.name == name))
    sites = find_sites(target.model, lambda: target.run(0), ["residual", *ROLES])
    intact = target.run(1)
    for role, (path, own) in PLACES[name].items():
        (site,) = (site for site in sites if site.kind == role and site.path == path)
        kept = []
        with plain_hooks(target.model, {f"{path}:output": lambda x, kept=kept: kept.append(x)}):
            target.run(0), target.run(1)
        features = list(range(kept[0].shape[-1])) if own is None else own
        rows = torch.cat([x.flatten(0, -2) for x in kept])[:, features]
        calibration = Calibration(sites=[site])
        statistics = [Moments.of(site), Covariance.of(site)]
        for number in (0, 1):
            found = {}
            with hooked(target.model, {site: partial(keep, found, site)}, once=True):
                target.run(number)
            for statistic in statistics:
                statistic.update(found[site])
        for statistic in statistics:
            calibration.add(site, statistic)
        torch.testing.assert_close(statistics[0].mean, rows.double().mean(0), rtol=1e-6, atol=1e-6)
        mask = torch.rand(site.width, generator=torch.Generator().manual_seed(1)) < 0.5
        changes = {
            "zero": put(mask, torch.zeros(site.width)),
            "mean": put(mask, rows.double().mean(0).float()),
            "conditional-mean": conditional_mean(rows, mask, 0.01),
        }
        for method, change in changes.items():

            def whole(x, change=change, features=features):
                x = x.clone()
                x[..., features] = change(x[..., features])
                return x

            with plain_hooks(target.model, {f"{path}:output": whole}):
                expected = target.run(1)
            chosen = ConditionalMean(0.01) if method == "conditional-mean" else method
            with ablated(target.model, {site.name: mask}, chosen, calibration):
                after = target.run(1)
            for one, other in zip(after, expected, strict=True):
                assert (one - other).abs().max() <= 1e-6 * other.abs().max(), (role, method)
            assert not all(map(torch.equal, after, intact)), (role, method)
