"""Evaluates neuron ablation in transformers: what a model loses, and what to put in a neuron's place."""

from lightning_ablate.callback import AblationCallback
from lightning_ablate.metrics import Scored
from lightning_ablate.modules import (
    AblationModule,
    CausalLM,
    ImageClassifier,
    MaskedLM,
    Seq2SeqLM,
    SequenceClassifier,
)
from lightning_ablate.results import Results
from lightning_ablate.sharding import ShardedStrategy

__all__ = [
    "AblationCallback",
    "AblationModule",
    "CausalLM",
    "ImageClassifier",
    "MaskedLM",
    "Results",
    "Scored",
    "Seq2SeqLM",
    "SequenceClassifier",
    "ShardedStrategy",
]
