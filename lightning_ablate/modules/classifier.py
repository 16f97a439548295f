"""Text classifiers from the Hugging Face hub, or from a local folder of the same form."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_ablate.data.text import padding_id
from lightning_ablate.metrics import Scored
from lightning_ablate.modules.hub import last_states
from lightning_ablate.modules.language import LanguageModel, TextBatch


class SequenceClassifier(LanguageModel):
    """A text classifier; every example is one scored position. There is no generated text.

    Batches hold ``label`` ``(batch,)`` int64 beside what :class:`LanguageModel` names.
    """

    auto_class = "AutoModelForSequenceClassification"

    def build_target(self) -> nn.Module:
        """Loads it with its ``auto_class``."""
        target: Any = super().build_target()
        # by it decoders find an example's last token, so it must be what the data are padded with
        target.config.pad_token_id = padding_id(self.tokenizer)
        return target

    def evaluate(self, batch: TextBatch) -> Scored:
        """One scored position an example."""
        return Scored(self.logits(batch), batch["label"], batch["index"])

    def hidden(self, batch: TextBatch) -> Sequence[Tensor]:
        """The last layer's tokens, of an encoder-decoder those of both."""
        return last_states(self.target(**self.inputs(batch), output_hidden_states=True))
