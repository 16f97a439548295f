"""Tiny random targets and their tokenizers, made by the libraries' own classes."""

import torch

VOCABULARY = 300
VIT = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 4, "num_classes": 10}
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {"intermediate_size": 32, "max_position_embeddings": 64}


def made(seed, model, config, **options):
    import transformers

    torch.manual_seed(seed)
    return getattr(transformers, model)(getattr(transformers, config)(**options)).eval()


def gpt2(**options):
    sizes = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 4}
    return made(1, "GPT2LMHeadModel", "GPT2Config", **sizes, initializer_range=0.4, **options)


def mistral():
    """Grouped-query attention whose heads together (4 x 8) are wider than the hidden state (24)."""
    sizes = {**SMALL, **WIDE, "hidden_size": 24, "num_key_value_heads": 2, "head_dim": 8}
    return made(2, "MistralForCausalLM", "MistralConfig", **sizes, initializer_range=0.4)


def roberta():
    sizes = {**SMALL, **WIDE, "max_position_embeddings": 66, "type_vocab_size": 1}
    return made(3, "RobertaForMaskedLM", "RobertaConfig", **sizes, initializer_range=0.4)


def distilbert():
    """Its table of positions is cut to the length by a buffer, and not asked for places."""
    sizes = {"vocab_size": VOCABULARY, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 4}
    return made(11, "DistilBertForMaskedLM", "DistilBertConfig", **sizes, max_position_embeddings=64)


def opt():
    sizes = {**SMALL, "word_embed_proj_dim": 16, "ffn_dim": 32, "max_position_embeddings": 64}
    return made(6, "OPTForCausalLM", "OPTConfig", **sizes)


def mixtral(**options):
    """Experts held as three-dimensional parameters, of which two serve each token."""
    sizes = {**SMALL, **WIDE, "num_key_value_heads": 2, "num_local_experts": 4, "initializer_range": 0.4}
    return made(7, "MixtralForCausalLM", "MixtralConfig", **(sizes | options))


def albert():
    """One layer used three times."""
    sizes = {**SMALL, **WIDE, "embedding_size": 8, "num_hidden_layers": 3}
    return made(8, "AlbertForMaskedLM", "AlbertConfig", **sizes)


def t5():
    """An encoder and a decoder of two layers each, whose heads together (4 x 8) are wider than the hidden state."""
    sizes = {"vocab_size": VOCABULARY, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    return made(9, "T5ForConditionalGeneration", "T5Config", **sizes, decoder_start_token_id=0)


def m2m():
    """An encoder-decoder that only makes its decoder's inputs from labels itself."""
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    wide = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64}
    options = {"vocab_size": VOCABULARY, "init_std": 0.4, **layers, **wide}
    return made(10, "M2M100ForConditionalGeneration", "M2M100Config", **options)


def vit():
    import timm

    torch.manual_seed(4)
    config = {"input_size": (1, 8, 8), "mean": (0.4,), "std": (0.2,), "crop_pct": 1.0, "num_classes": 10}
    return timm.create_model("vit_tiny_patch16_224", pretrained_cfg=config, **VIT).eval()


def tokenizer(masked=False, longest=64):
    """A byte-level tokenizer trained on a few sentences."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Tokenizer, RobertaTokenizer

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] if masked else ["<|endoftext|>"]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(TEXTS, vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    kind = RobertaTokenizer if masked else GPT2Tokenizer
    return kind(vocab=trained.get_vocab(), merges=[], model_max_length=longest)


TEXTS = [f"The {word} of number {n} is {n * n}, as every {word} knows." for n in range(40) for word in ("cat", "dog")]


def save_language_model(folder, model, masked=False):
    model.save_pretrained(folder)
    tokenizer(masked).save_pretrained(folder)
    return str(folder)
