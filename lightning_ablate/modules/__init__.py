"""LightningModules that wrap a target."""

from lightning_ablate.modules.base import AblationModule
from lightning_ablate.modules.classifier import SequenceClassifier
from lightning_ablate.modules.language import CausalLM, LanguageModel, PairedLM
from lightning_ablate.modules.masked import MaskedLM
from lightning_ablate.modules.seq2seq import Seq2SeqLM
from lightning_ablate.modules.vision import ImageClassifier
