"""Which architectures are covered: tiny random models of each, from the libraries' own classes.

``python -m tests.coverage`` prints the table, ``--write`` also writes architectures.md; test_coverage.py holds it true.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from transformers import AutoConfig, AutoModel

from lightning_ablate.errors import SiteError
from lightning_ablate.sites import Site, find_sites
from tests import reference

FILE = Path(__file__).parent / "architectures.md"
LARGEST = 3_000_000  # parameters of a tiny model

# set where an architecture's configuration has such a field
SMALL = {
    **dict.fromkeys("hidden_size d_model n_embd dim embed_dim emb_dim embedding_size word_embed_proj_dim".split(), 32),
    **dict.fromkeys("num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers".split(), 2),
    **dict.fromkeys("num_decoder_layers num_encoder_layers".split(), 2),
    **dict.fromkeys("num_attention_heads n_head n_heads num_heads encoder_attention_heads".split(), 4),
    **dict.fromkeys("decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads".split(), 4),
    **dict.fromkeys("intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim hidden_dim".split(), 48),
    **dict.fromkeys("ffn_hidden_size d_kv head_dim kv_channels".split(), 8),
    **dict.fromkeys("num_experts num_local_experts n_routed_experts moe_num_experts patch_size".split(), 4),
    **dict.fromkeys("num_key_value_heads num_experts_per_tok moe_topk".split(), 2),
    **dict.fromkeys("moe_intermediate_size shared_expert_intermediate_size image_size".split(), 16),
    **{"vocab_size": 96, "max_position_embeddings": 64, "n_positions": 64, "num_shared_experts": 1, "n_group": 1},
    **{"topk_group": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    **{"rotary_dim": 4, "num_channels": 3},
}
# multi-head latent attention: its heads are as wide as their values
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
LATENT |= {"num_key_value_heads": 4, "head_dim": 4}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
WINDOWS = {"embed_dim": 32, "depths": [2, 2], "num_heads": [4, 4], "window_size": 8}
SWIN: dict[str, Any] = {"sites": 4, "width": (32, 64), "mlps": 4}  # two stages of two layers
EXPERTS = "experts"


@dataclass(frozen=True)
class Case:
    """An architecture, what is expected of it, and how it is made small."""

    kind: str  # decoder, encoder, encoder-decoder, vision (all of transformers) or timm
    name: str  # its model_type, or the name of one of timm's models
    sites: int = 2  # attention sites of a model of two layers
    width: int | tuple[int, ...] = 32  # neurons of each
    heads: int | None = 4  # of each; None where they don't lie side by side
    mlps: int | str | None = 2  # MLP sites; EXPERTS where these are refused
    experts: int = 0  # of the MLP sites
    options: dict[str, Any] = field(default_factory=dict)  # of its configuration


def cases(kind: str, names: str, **expected: Any) -> list[Case]:
    return [Case(kind, name, **expected) for name in names.split()]


COVERED = [
    *cases(
        "decoder",
        "apertus arcee beam biogpt bitnet bloom codegen cohere cohere2 ctrl cwm doge ernie4_5 exaone4 falcon flint "
        "gemma gemma2 gemma3_text glm glm4 gpt2 gpt_bigcode gpt_neox gptj granite helium hunyuan_v1_dense hyperclovax "
        "internlm3 jais2 llama ministral ministral3 mistral modernbert-decoder moshi mpt nanochat nemotron olmo olmo2 "
        "olmo3 openai-gpt opt persimmon phi phi3 qwen2 qwen3 seed_oss smollm3 stablelm starcoder2 vaultgemma xglm",
    ),
    *cases("decoder", "flex_olmo gpt_oss granitemoe minimax_m2 mixtral olmoe phimoe qwen3_moe", mlps=8, experts=8),
    *cases("decoder", "aria_text cohere2_moe hunyuan_v1_moe qwen2_moe solar_open", mlps=10, experts=8),
    Case("decoder", "llama4_text", mlps=EXPERTS),
    *cases("decoder", "deepseek_v3 minicpm3 youtu", options=LATENT),
    Case("decoder", "deepseek_v2", mlps=10, experts=8, options=LATENT),
    Case("decoder", "gpt_neo", options={"attention_types": [[["global", "local"], 1]]}),
    Case("decoder", "cpmant", options={"dim_head": 8, "dim_ff": 48}),
    Case("decoder", "diffllama", heads=None),  # two attentions interleaved
    *cases(
        "encoder",
        "bert camembert data2vec-text deberta deberta-v2 distilbert electra ernie esm eurobert gte layoutlm "
        "megatron-bert modernbert mpnet nomic_bert rembert roberta roberta-prelayernorm roformer tapas xlm-roberta "
        "xlm-roberta-xl",
    ),
    Case("encoder", "albert"),
    Case("encoder", "convbert", heads=None),  # a convolution's output lies beside attention's, in the same site
    *cases("encoder", "flaubert ibert xlm", mlps=None),
    *cases(
        "encoder-decoder",
        "bart bigbird_pegasus blenderbot blenderbot-small m2m_100 marian mbart mvp pegasus plbart t5 mt5 umt5",
        sites=6,
        mlps=4,
    ),
    *cases("vision", "beit data2vec-vision deit dinov2 dinov2_with_registers ijepa vit vit_msn"),
    Case("vision", "swin", **SWIN, options={"image_size": 64, **WINDOWS}),
    *cases(
        "timm",
        "vit_tiny_patch16_224 vit_base_patch32_clip_224 vit_base_patch16_siglip_224 vit_small_patch14_reg4_dinov2 "
        "vit_small_patch16_36x1_224 vit_base_patch16_rpn_224 vit_large_patch16_rope_224 vit_medium_patch16_gap_240 "
        "vit_dwee_patch16_reg1_gap_256 vit_wee_patch16_reg1_gap_256 vit_pe_core_tiny_patch16_384 "
        "vit_small_patch16_dinov3 vit_relpos_small_patch16_224 vit_srelpos_small_patch16_224 aimv2_large_patch14_224 "
        "deit_tiny_distilled_patch16_224 deit3_small_patch16_224 beit_base_patch16_224 beitv2_base_patch16_224 "
        "eva02_tiny_patch14_224 naflexvit_base_patch16_gap samvit_base_patch16_224",
        options=VIT,
    ),
    Case("timm", "vit_small_patch16_18x2_224", sites=4, mlps=4, options=VIT),  # two attentions in each layer
    Case("timm", "cait_xxs24_224", sites=4, mlps=4, options=VIT),  # and two layers of class attention
    Case("timm", "convit_tiny", width=128, options=VIT),  # its embed_dim is that of a head
    *cases(
        "timm",
        "swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224",
        **SWIN,
        options={"img_size": 64, **WINDOWS},
    ),
]
_NONE, _BARE = "no attention in the target", "no projection module reads"
REASONS = {
    _NONE: "no attention that can be followed",
    _BARE: "no projection module reads what attention makes",
}
KINDS = {
    "decoder": "decoders",
    "encoder": "encoders",
    "encoder-decoder": "encoder-decoders",
    "vision": "image models of transformers",
    "timm": "of timm, by one of each family's names",
}
REFUSED = [
    *((case, _NONE) for case in cases("decoder", "mamba falcon_mamba rwkv")),
    (Case("decoder", "mamba2", options={"num_heads": 8}), _NONE),
    *((case, _NONE) for case in cases("encoder", "fnet yoso")),
    (Case("decoder", "jetmoe"), _BARE),
    (Case("encoder", "squeezebert"), _BARE),
    *((case, _NONE) for case in cases("timm", "mixer_s32_224 convnext_atto poolformer_s12", options={})),
    (Case("timm", "volo_d1_224"), _BARE),
]


LINEAR, LIGHT = {"layer_types": ["linear_attention", "full_attention"]}, {"layer_types": ["conv", "full_attention"]}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
ZAMBA = {"num_hidden_layers": 3, "layer_types": ["mamba", "hybrid", "hybrid"], "n_mamba_heads": 2, "mamba_dt_rank": 4}
# what mixes positions beside attention, counted by hand
MIXED = [
    *((case, "1 of 2 layers") for case in cases("decoder", "minimax olmo_hybrid")),
    *((case, "1 of 2 layers") for case in cases("decoder", "qwen3_next qwen3_5_text", options=LINEAR)),
    *((case, "1 of 2 layers") for case in cases("decoder", "lfm2 lfm2_moe", options=LIGHT)),
    (Case("decoder", "jamba", options={"attn_layer_period": 2, "attn_layer_offset": 1}), "1 of 2 layers"),
    (Case("decoder", "bamba", options={"attn_layer_indices": [1], **MAMBA}), "1 of 2 layers"),
    (Case("decoder", "granitemoehybrid", options={"layer_types": ["mamba", "attention"], **MAMBA}), "1 of 2 layers"),
    (Case("decoder", "falcon_h1"), "2 of 2 layers"),
    (Case("decoder", "nemotron_h"), "1 of 4 layers"),
    (Case("decoder", "recurrent_gemma", options={"num_hidden_layers": 3}), "2 of 3 layers"),
    (Case("decoder", "zamba", options=ZAMBA), "3 of 3 layers"),
    (Case("encoder", "mobilebert"), "outside of its layers"),
    (Case("timm", "xcit_nano_12_p8_224", options={"depth": 2, "img_size": 64}), "2 of 4 layers"),
    (Case("timm", "pvt_v2_b0"), "4 of 4 layers"),
]


class Tiny(NamedTuple):
    """A tiny random target; ``run`` runs it on input 0 or 1, which differ in one place: its last hidden states."""

    model: torch.nn.Module
    run: Callable[[int], list[torch.Tensor]]


def tiny(case: Case) -> Tiny:
    torch.manual_seed(0)
    model = timm.create_model(case.name, **case.options) if case.kind == "timm" else transformers_model(case)
    with torch.no_grad():  # no initialisation leaves a part without effect
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return Tiny(model.eval(), runner(case, model))


def transformers_model(case: Case) -> torch.nn.Module:
    default = AutoConfig.for_model(case.name)
    known = {default.attribute_map.get(key, key): value for key, value in SMALL.items() if hasattr(default, key)}
    small = {key: value for key, value in known.items() if not isinstance(getattr(type(default), key, None), property)}
    config = AutoConfig.for_model(case.name, **{**small, **case.options})
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModel.from_config(config).parameters())
    if size > LARGEST:  # before it takes memory
        raise ValueError(f"{case.name} has {size:,} parameters: its configuration has other fields, it stayed large")
    return AutoModel.from_config(config)


def runner(case: Case, model: torch.nn.Module) -> Callable[[int], list[torch.Tensor]]:
    if case.kind in ("vision", "timm"):
        size = model.pretrained_cfg["input_size"][1] if case.kind == "timm" else 16
        size = case.options.get("img_size", case.options.get("image_size", size))
        inputs = torch.randn(1, 3, size, size).repeat(2, 1, 1, 1)
        inputs[1, ..., 0, 0] += 100
    else:
        inputs = torch.randint(5, 90, (1, 12)).repeat(2, 1)
        inputs[1, 0] = (inputs[1, 0] + 7) % 80 + 5

    @torch.no_grad()
    def run(number: int) -> list[torch.Tensor]:
        given = inputs[number : number + 1]
        if case.kind == "timm":
            tokens = model.forward_features(given)
            return [tokens.movedim(1, -1) if tokens.shape[-1] != model.num_features else tokens]
        if case.kind == "encoder-decoder":
            output = model(input_ids=given, decoder_input_ids=given[:, :7], use_cache=False)
            return [output.encoder_last_hidden_state, output.last_hidden_state]
        if case.kind == "vision":
            return [model(given).last_hidden_state]
        plain = {"use_cache": False} if case.kind == "decoder" else {}
        return [model(input_ids=given, attention_mask=torch.ones_like(given), **plain).last_hidden_state]

    return run


def moved(target: Tiny, sites: Sequence[Site]) -> int:
    """At how many places the hidden states move, with the given uses of modules constant, by plain hooks."""
    uses: dict[str, set[int]] = {}
    for site in sites:
        uses.setdefault(site.path, set()).add(site.use)

    def constant(path: str) -> Callable[[torch.Tensor], torch.Tensor | None]:
        count = iter(range(1000))
        return lambda x: torch.full_like(x, 0.3) if next(count) in uses[path] else None

    states = []
    for number in (0, 1):
        with reference.plain_hooks(target.model, {path: constant(path) for path in uses}):
            states.append(target.run(number))
    places = 0
    for before, after in zip(*states, strict=True):
        change = (after - before).abs().flatten(0, -2).amax(1)
        places = max(places, int((change > 1e-4 * before.abs().max()).sum()))
    return places


def reason(case: Case) -> str:
    """Why an architecture is refused, in the package's own words; empty if it isn't."""
    target = tiny(case)
    try:
        find_sites(target.model, lambda: target.run(0))
    except SiteError as error:
        return str(error)
    return ""


def table() -> str:
    """As it stands in architectures.md."""
    rows = ["# Architectures, checked on tiny random models of each (`python -m tests.coverage` checks again)", ""]
    rows += ["| covered | architectures |", "| --- | --- |"]
    for kind in dict.fromkeys(case.kind for case in COVERED):
        names = sorted(case.name for case in COVERED if case.kind == kind)
        rows.append(f"| {len(names)} {KINDS[kind]} | {', '.join(names)} |")
    mixed = sorted(f"{case.name} ({others})" for case, others in MIXED)
    rows.append(f"| {len(mixed)} in which other parts mix positions, too | {', '.join(mixed)} |")
    for why, words in REASONS.items():
        names = sorted(case.name for case, expected in REFUSED if expected == why)
        rows.append(f"| refused: {words} | {', '.join(names)} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints which architectures are covered.")
    parser.add_argument("--write", action="store_true", help="write it into architectures.md")
    if parser.parse_args().write:
        FILE.write_text(table(), encoding="utf-8")
    print(table())


if __name__ == "__main__":
    main()
