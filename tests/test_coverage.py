"""Every architecture of tests/coverage.py, held to what needs no knowledge of it, and some of them head by head."""

import pytest
import torch

from lightning_ablate.errors import SiteError
from lightning_ablate.sites import Prefix, check_mixing, find_sites, hooked, other_mixing
from tests import coverage
from tests.coverage import COVERED, MIXED, REFUSED, Case, moved, tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # as the libraries are


def names(cases):
    return [f"{case.kind}-{case.name}" for case in cases]


@pytest.mark.parametrize("case", COVERED, ids=names(COVERED))
def test_sites_and_mlps_are_as_counted_by_hand_and_sites_hold_all_mixing(case):
    target = tiny(case)
    sites = find_sites(target.model, lambda: target.run(0))
    assert len(sites) == case.sites
    assert {site.width for site in sites} == set(case.width if isinstance(case.width, tuple) else [case.width])
    assert {site.heads for site in sites} == {case.heads}
    assert moved(target, sites) == 1
    check_mixing(target.model, sites, target.run)
    for left_out in range(len(sites)):
        assert moved(target, sites[:left_out] + sites[left_out + 1 :]) > 1
    with pytest.raises(SiteError, match="also mixes positions by other ways"):
        check_mixing(target.model, sites[1:], target.run)
    if isinstance(case.mlps, int):
        sites = find_sites(target.model, lambda: target.run(0), ["mlp"])
        kinds = [site.kind for site in sites]
        assert (len(sites), kinds.count("expert")) == (case.mlps, case.experts) and {*kinds} <= {"mlp", "expert"}
    else:
        reason = "experts" if case.mlps == coverage.EXPERTS else "found no MLP down projection in"
        with pytest.raises(SiteError, match=reason):
            find_sites(target.model, lambda: target.run(0), ["mlp"])


@torch.no_grad()
@pytest.mark.parametrize("case", COVERED, ids=names(COVERED))
def test_layers_before_the_first_ablated_site_are_answered_to_the_bit(case):
    target = tiny(case)
    sites = find_sites(target.model, lambda: target.run(0))
    prefix = Prefix(target.model, sites, len(sites) - 1, 2**30)
    with hooked(target.model, {}):
        with prefix.recorded():
            intact = target.run(0)
        prefix.prove(lambda: all(map(torch.equal, target.run(0), intact)))
    assert not prefix.unproven
    assert bool(prefix._kept) == (sites[0].uses == 1)  # layers that share their weights run several times
    for place, site in reversed(list(enumerate(sites))):
        with hooked(target.model, {site: torch.zeros_like}, once=True):
            whole = target.run(0)
        with hooked(target.model, {site: torch.zeros_like}, once=True), prefix.reused(place):
            found = target.run(0)
        assert all(torch.equal(*pair) for pair in zip(found, whole, strict=True))


@pytest.mark.parametrize(("case", "others"), MIXED, ids=names([case for case, _ in MIXED]))
def test_layers_that_mix_beside_attention_are_counted(case, others):
    target = tiny(case)
    sites = find_sites(target.model, lambda: target.run(0))
    assert other_mixing(target.model, sites, target.run) == others
    with pytest.raises(SiteError, match="also mixes positions by other ways"):
        check_mixing(target.model, sites, target.run)


@pytest.mark.parametrize(("case", "why"), REFUSED, ids=names([case for case, _ in REFUSED]))
def test_what_mixes_without_attention_is_refused(case, why):
    assert why in coverage.reason(case)


def test_enough_are_covered_and_the_table_says_which():
    assert len([case for case in COVERED if case.kind != "timm"]) >= 40
    assert len([case for case in COVERED if case.kind == "timm"]) >= 15
    assert {case.kind for case in COVERED} == {"decoder", "encoder", "encoder-decoder", "vision", "timm"}
    assert coverage.FILE.read_text(encoding="utf-8") == coverage.table()


# by hand: which projection makes the values, in rows from where on, of how many heads; and where the site is
FIRST = 0
BEHIND = 64  # the queries' and keys'
VALUES = {
    "gpt2": ("h.0.attn.c_attn", BEHIND, 4, "h.0.attn.c_proj"),
    "llama": ("layers.0.self_attn.v_proj", FIRST, 2, "layers.0.self_attn.o_proj"),
    "mistral": ("layers.0.self_attn.v_proj", FIRST, 2, "layers.0.self_attn.o_proj"),
    "phi3": ("layers.0.self_attn.qkv_proj", 48, 2, "layers.0.self_attn.o_proj"),
    "bloom": ("h.0.self_attention.query_key_value", None, 4, "h.0.self_attention.dense"),
    "gpt_neox": ("layers.0.attention.query_key_value", None, 4, "layers.0.attention.dense"),
    "mpt": ("blocks.0.attn.Wqkv", BEHIND, 4, "blocks.0.attn.out_proj"),
    "opt": ("decoder.layers.0.self_attn.v_proj", FIRST, 4, "decoder.layers.0.self_attn.out_proj"),
    "bert": ("encoder.layer.0.attention.self.value", FIRST, 4, "encoder.layer.0.attention.output.dense"),
    "modernbert": ("layers.0.attn.Wqkv", BEHIND, 4, "layers.0.attn.Wo"),
    "t5": ("encoder.block.0.layer.0.SelfAttention.v", FIRST, 4, "encoder.block.0.layer.0.SelfAttention.o"),
    "vit_tiny_patch16_224": ("blocks.0.attn.qkv", BEHIND, 4, "blocks.0.attn.proj"),
}


def values(model, path, start, head):
    """The rows of a projection that make the values of a head; without a start they lie beside its query and key."""
    weight = model.get_submodule(path).weight
    weight = weight.T if hasattr(model.get_submodule(path), "nx") else weight
    return weight.view(4, 3, 8, 32)[head, 2] if start is None else weight[start + 8 * head : start + 8 + 8 * head]


def reading(target, path, side):
    """What goes into or comes out of a module for both inputs, ``(inputs, positions, features)``."""
    kept = []
    module = target.model.get_submodule(path)
    if side == "input":
        handle = module.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    else:
        handle = module.register_forward_hook(lambda _, __, output: kept.append(output))
    for number in (0, 1):
        target.run(number)
    handle.remove()
    return torch.stack([x.flatten(0, -2) for x in (kept[0], kept[-1])])


def is_pre_out(case, place, permuted=False):
    """Whether a place holds what each head made: its value weights reach its slice alone, and it looks elsewhere."""
    maker, start, heads, site = VALUES[case.name]
    path, side = {"site": (site, "input"), "output": (site, "output"), "values": (maker, "output")}[place]
    before = reading(tiny(case), path, side)
    # the two inputs differ in one place: attention carries that to the last position, a projection doesn't
    if not bool((before[0, -1] - before[1, -1]).abs().max() > 1e-4):
        return False
    for head in range(heads):
        changed = tiny(case)
        with torch.no_grad():
            values(changed.model, maker, start, head).add_(torch.randn(1))
        change = (reading(changed, path, side) - before).abs()[0].amax(0).unflatten(0, (4, -1)).amax(1)
        moves = (change > 1e-4).roll(1 if permuted else 0)
        own = [2 * head, 2 * head + 1] if heads == 2 else [head]
        if moves.nonzero().flatten().tolist() != own:
            return False
    return True


@pytest.mark.parametrize("case", [case for case in COVERED if case.name in VALUES], ids=lambda case: case.name)
def test_a_heads_value_rows_change_only_its_slice(case):
    target = tiny(case)
    assert find_sites(target.model, lambda: target.run(0))[0].path == VALUES[case.name][3]
    assert is_pre_out(case, "site")
    assert not is_pre_out(case, "output")
    assert not is_pre_out(case, "values")
    assert not is_pre_out(case, "site", permuted=True)


def test_a_tiny_model_that_stayed_large_is_an_error():
    with pytest.raises(ValueError, match="llama has .* parameters: .* it stayed large"):
        tiny(Case("decoder", "llama", options={"intermediate_size": 30_000}))
