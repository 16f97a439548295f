"""Evaluates neuron ablation in transformers: what a model loses, and what to put in a neuron's place.

What is named in ``__all__`` is imported when it is asked for, so that ``--help`` doesn't cost the import of torch.
"""
# ruff: noqa: F401, F403 - the names are there for type checkers

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_ablate.ablation import ablated
    from lightning_ablate.calibration import Calibration
    from lightning_ablate.callback import AblationCallback
    from lightning_ablate.choices import Choice, EachHead, EachLayer, Only, Random, Ranked
    from lightning_ablate.data import AblationDataModule, ImageData, LabelledTexts, TextData, TextPairs
    from lightning_ablate.data.demo import Digits, PythonTexts
    from lightning_ablate.methods import *
    from lightning_ablate.metrics import Scored
    from lightning_ablate.modules import *
    from lightning_ablate.results import Results, load
    from lightning_ablate.sharding import ShardedStrategy
    from lightning_ablate.sites import Site
    from lightning_ablate.statistics import ActivationStatistic

_NAMES = {
    "ablation": "ablated",
    "calibration": "Calibration",
    "callback": "AblationCallback",
    "choices": "Choice EachHead EachLayer Only Random Ranked",
    "data": "AblationDataModule ImageData LabelledTexts TextData TextPairs",
    "data.demo": "Digits PythonTexts",
    "methods": "AblationMethod ConditionalMean ConditionalMeanPerHead ConditionalOptimal ConstantMethod HalfSampleMode "
    "LearnedMethod Mean Median Mode Noise Optimal Peak PositionalMean Resample ResampleAnyPosition ResampleCharacters "
    "ResampleGenerated ResampleIds ResamplePixels ResampleSamePosition Zero",
    "metrics": "Scored",
    "modules": "AblationModule CausalLM ImageClassifier MaskedLM Seq2SeqLM SequenceClassifier",
    "results": "Results load",
    "sharding": "ShardedStrategy",
    "sites": "Site",
    "statistics": "ActivationStatistic",
}
_WHERE = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
