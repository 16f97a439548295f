"""Forms in which a transformer comes: a GGUF file, a LoRA adapter on its base, bfloat16; from command to table."""

import gguf
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lightning_ablate import AblationCallback, CausalLM, TextData
from tests import reference, tiny
from tests.command import found

NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
INNER = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
INNER |= {"self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
INNER |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def llama():
    options = {"num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.4}
    return tiny.made(2, "LlamaForCausalLM", "LlamaConfig", **tiny.SMALL, **tiny.WIDE, **options)


def write_gguf(path, model, tokenizer):
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    for name, value in {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "rope_dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
        "tokenizer_model": "gpt2",
        "bos_token_id": 0,
        "eos_token_id": 0,
    }.items():
        getattr(writer, f"add_{name}")(value)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    pair = next(token for token in tokens if len(token) == 2 and set(token) <= set(tokens))
    writer.add_token_list(tokens + [f"<{i}>" for i in range(len(tokens), config.vocab_size)])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges([" ".join(pair)])
    for name, weight in model.state_dict().items():
        base = name.removesuffix(".weight")
        if base not in NAMES:
            _, _, layer, inner = base.split(".", 3)
            base = f"blk.{layer}.{INNER[inner]}"
            if inner in ("self_attn.q_proj", "self_attn.k_proj"):  # whose rotary halves lie in turn there
                heads = len(weight) // config.head_dim
                weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(f"{NAMES.get(base, base)}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_file(folder):
    write_gguf(folder / "tiny.gguf", model := llama(), tiny.tokenizer())
    return model, ["--model.gguf_file=tiny.gguf"]


def adapter(folder):
    tiny.save_language_model(folder / "base", llama())
    base = tiny.built(CausalLM(str(folder / "base")))
    lora = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    made = get_peft_model(base.target, lora)
    made.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return made.merge_and_unload(), []


def bfloat16(folder):
    tiny.save_language_model(folder, model := llama())
    return model.bfloat16(), ["--model.dtype=bfloat16"]


@pytest.mark.parametrize(("make", "atol"), [(gguf_file, 1e-5), (adapter, 1e-5), (bfloat16, 2e-2)])
@pytest.mark.filterwarnings("ignore")
def test_it_runs_from_the_command_and_zero_is_that_of_plain_hooks(make, atol, tmp_path):
    (tmp_path / "model").mkdir()
    model, options = make(tmp_path / "model")
    Dataset.from_dict({"text": tiny.TEXTS * 3}).to_parquet(tmp_path / "texts.parquet")
    budgets = {"max_length": 32, "calibration_tokens": 300, "evaluation_tokens": 300, "batch_size": 4}
    data = [f"--data.{name}={value}" for name, value in {"name": tmp_path / "texts.parquet", **budgets}.items()]
    options = ["--model=CausalLM", f"--model.name={tmp_path / 'model'}", *options, "--data=TextData", *data]
    methods = ["--ablation.methods=[zero,conditional-mean]", "--ablation.fractions=[1.0]", "--trainer.logger=false"]
    table = found(tmp_path / "run", "fit", *options, *methods).table
    module = CausalLM(str(tmp_path / "model"), gguf_file="tiny.gguf" if make is gguf_file else None)
    data = TextData(str(tmp_path / "texts.parquet"), **budgets)
    data.trainer = type("Trainer", (), {"lightning_module": module, "global_rank": 0, "world_size": 1})
    zeros = {f"model.layers.{i}.self_attn.o_proj": torch.zeros_like for i in (0, 1)}
    for row, replace in ((0, {}), (1, zeros)):
        loss, _, n = reference.evaluation(model.eval(), data.val_dataloader(), replace)
        assert table["n"][row] == n and table["cross_entropy"][row] == pytest.approx(loss, abs=atol)
    assert table["cross_entropy"][2] != table["cross_entropy"][1]


@pytest.mark.parametrize("precision, dtype", [("bf16-true", torch.bfloat16), ("16-true", torch.float16)])
def test_true_half_precision_is_what_loading_in_that_dtype_gives(tmp_path, precision, dtype):
    """Frequencies of RoPE are buffers that no file holds: rounded, they move far positions by a whole turn."""
    folder = tiny.save_language_model(tmp_path / "model", llama())
    module, data = (
        CausalLM(folder),
        TextData.of(tiny.TEXTS, calibration_tokens=200, evaluation_tokens=200, max_length=24),
    )
    tiny.trainer(tmp_path, AblationCallback("zero", [0.5], [1]), precision=precision).fit(module, datamodule=data)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    frequencies = module.target.model.rotary_emb.inv_freq
    assert torch.equal(frequencies, llama().model.rotary_emb.inv_freq)
    assert {parameter.dtype for parameter in module.target.parameters()} == {dtype}
    assert torch.equal(tiny.run(module.target), tiny.run(loaded.eval()))


def test_a_buffer_of_ones_own_model_is_cast_like_its_weights():
    class Centred(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = torch.nn.Linear(3, 2)
            self.register_buffer("mean", torch.rand(3), persistent=False)

        def forward(self, x):
            return self.proj(x - self.mean)

    module = tiny.built(tiny.Own(Centred())).to(torch.bfloat16)
    assert module.target(torch.ones(1, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
