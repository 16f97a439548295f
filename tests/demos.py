"""The three embedded targets and their data, as tests run them."""

from lightning_ablate import CausalLM, Digits, ImageClassifier, MaskedLM, PythonTexts
from tests import tiny

NAMES = ["vit", "gpt2", "roberta"]
WIDTH = {"vit": 64, "gpt2": 128, "roberta": 128}


def module_of(name):
    kind = {"vit": ImageClassifier, "gpt2": CausalLM, "roberta": MaskedLM}[name]
    return tiny.built(kind(f"demo:{name}"))


def data_of(name, tokens=10_000):
    if name == "vit":
        return Digits(batch_size=225)
    return PythonTexts(max_length=128, batch_size=16, calibration_tokens=tokens, evaluation_tokens=min(tokens, 8_000))


def batches(module, loader):
    return [module.on_before_batch_transfer(batch, 0) for batch in loader]
