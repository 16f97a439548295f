"""Every architecture of tests/coverage.py, held to what needs no knowledge of it, and some of them head by head."""

import pytest
import torch

from lightning_ablate.errors import SiteError
from lightning_ablate.sites import check_mixing, find_sites
from tests import coverage
from tests.coverage import COVERED, REFUSED, Case, moved, tiny, uses


def names(cases):
    return [f"{case.kind}-{case.name}" for case in cases]


@pytest.fixture(autouse=True)
def _as_the_libraries_are():
    """Loading the libraries' many models may warn of what they themselves do."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("case", COVERED, ids=names(COVERED))
def test_sites_are_as_counted_by_hand_and_hold_all_mixing(case):
    target = tiny(case)
    sites = find_sites(target.model, lambda: target.run(0))
    assert len(sites) == case.sites
    assert {site.width for site in sites} == set(case.width if isinstance(case.width, tuple) else [case.width])
    assert {site.heads for site in sites} == {case.heads}
    assert moved(target, uses(sites)) == 1
    check_mixing(target.model, sites, target.run)
    for left_out in range(len(sites)):
        others = sites[:left_out] + sites[left_out + 1 :]
        assert moved(target, uses(others)) > 1
    with pytest.raises(SiteError, match="also mixes positions by other ways"):
        check_mixing(target.model, sites[1:], target.run)


@pytest.mark.parametrize("case", COVERED, ids=names(COVERED))
def test_mlp_sites_are_as_counted_by_hand(case):
    target = tiny(case)
    if isinstance(case.mlps, int):
        sites = find_sites(target.model, lambda: target.run(0), ["mlp"])
        assert len(sites) == case.mlps and {site.kind for site in sites} == {"mlp"}
    else:
        reason = "experts" if case.mlps == coverage.EXPERTS else "found no MLP down projection in"
        with pytest.raises(SiteError, match=reason):
            find_sites(target.model, lambda: target.run(0), ["mlp"])


@pytest.mark.parametrize(("case", "why"), REFUSED, ids=names([case for case, _ in REFUSED]))
def test_what_mixes_without_attention_is_refused(case, why):
    assert why in coverage.reason(case)


def test_enough_are_covered_and_the_readme_says_which():
    assert len([case for case in COVERED if case.kind != "timm"]) >= 40
    assert len([case for case in COVERED if case.kind == "timm"]) >= 15
    assert {case.kind for case in COVERED} == {"decoder", "encoder", "encoder-decoder", "vision", "timm"}
    text = coverage.README.read_text(encoding="utf-8")
    assert coverage.MARKS[0] + coverage.table() + coverage.MARKS[1] in text


# by hand: which weights make the values of (key-value) head h, where the site is, and which module makes the values
GROUPED = {"llama", "phi3", "mistral"}  # two key-value heads for four heads
VALUES = {
    "gpt2": (lambda m, h: m.h[0].attn.c_attn.weight[:, 64 + 8 * h : 72 + 8 * h], "h.0.attn.c_proj", "h.0.attn.c_attn"),
    "llama": (
        lambda m, h: m.layers[0].self_attn.v_proj.weight[8 * h : 8 * h + 8],
        "layers.0.self_attn.o_proj",
        "layers.0.self_attn.v_proj",
    ),
    "mistral": (
        lambda m, h: m.layers[0].self_attn.v_proj.weight[8 * h : 8 * h + 8],
        "layers.0.self_attn.o_proj",
        "layers.0.self_attn.v_proj",
    ),
    "phi3": (
        lambda m, h: m.layers[0].self_attn.qkv_proj.weight[48 + 8 * h : 56 + 8 * h],
        "layers.0.self_attn.o_proj",
        "layers.0.self_attn.qkv_proj",
    ),
    "bloom": (
        lambda m, h: m.h[0].self_attention.query_key_value.weight.view(4, 3, 8, 32)[h, 2],
        "h.0.self_attention.dense",
        "h.0.self_attention.query_key_value",
    ),
    "gpt_neox": (
        lambda m, h: m.layers[0].attention.query_key_value.weight.view(4, 3, 8, 32)[h, 2],
        "layers.0.attention.dense",
        "layers.0.attention.query_key_value",
    ),
    "mpt": (
        lambda m, h: m.blocks[0].attn.Wqkv.weight[64 + 8 * h : 72 + 8 * h],
        "blocks.0.attn.out_proj",
        "blocks.0.attn.Wqkv",
    ),
    "opt": (
        lambda m, h: m.decoder.layers[0].self_attn.v_proj.weight[8 * h : 8 * h + 8],
        "decoder.layers.0.self_attn.out_proj",
        "decoder.layers.0.self_attn.v_proj",
    ),
    "bert": (
        lambda m, h: m.encoder.layer[0].attention.self.value.weight[8 * h : 8 * h + 8],
        "encoder.layer.0.attention.output.dense",
        "encoder.layer.0.attention.self.value",
    ),
    "modernbert": (
        lambda m, h: m.layers[0].attn.Wqkv.weight[64 + 8 * h : 72 + 8 * h],
        "layers.0.attn.Wo",
        "layers.0.attn.Wqkv",
    ),
    "t5": (
        lambda m, h: m.encoder.block[0].layer[0].SelfAttention.v.weight[8 * h : 8 * h + 8],
        "encoder.block.0.layer.0.SelfAttention.o",
        "encoder.block.0.layer.0.SelfAttention.v",
    ),
    "vit_tiny_patch16_224": (
        lambda m, h: m.blocks[0].attn.qkv.weight[64 + 8 * h : 72 + 8 * h],
        "blocks.0.attn.proj",
        "blocks.0.attn.qkv",
    ),
}


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
    value, site, fused = VALUES[case.name]
    path, side = {"site": (site, "input"), "output": (site, "output"), "values": (fused, "output")}[place]
    target = tiny(case)
    before = reading(target, path, side)
    # the two inputs differ in one place: attention carries that to the last position, a projection doesn't
    if not bool((before[0, -1] - before[1, -1]).abs().max() > 1e-4):
        return False
    for head in range(2 if case.name in GROUPED else 4):
        changed = tiny(case)
        with torch.no_grad():
            value(changed.model, head).add_(torch.randn(1))
        change = (reading(changed, path, side) - before).abs()[0].amax(0).unflatten(0, (4, -1)).amax(1)
        moves = (change > 1e-4).roll(1 if permuted else 0)
        own = [2 * head, 2 * head + 1] if case.name in GROUPED else [head]
        if moves.nonzero().flatten().tolist() != own:
            return False
    return True


@pytest.mark.parametrize("case", [case for case in COVERED if case.name in VALUES], ids=lambda case: case.name)
def test_a_heads_value_rows_change_only_its_slice(case):
    target = tiny(case)
    assert find_sites(target.model, lambda: target.run(0))[0].path == VALUES[case.name][1]
    assert is_pre_out(case, "site")
    assert not is_pre_out(case, "output")
    assert not is_pre_out(case, "values")
    assert not is_pre_out(case, "site", permuted=True)


def test_a_tiny_model_that_stayed_large_is_an_error():
    with pytest.raises(
        ValueError, match="llama has .* parameters: its configuration has other fields, it stayed large"
    ):
        tiny(Case("decoder", "llama", options={"intermediate_size": 30_000}))
