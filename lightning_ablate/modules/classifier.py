"""Text classifiers that transformers loads."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor

from lightning_ablate.data.text import padding_id
from lightning_ablate.metrics import Scored
from lightning_ablate.modules.hub import HubModule, last_states
from lightning_ablate.modules.language import LanguageModel, TextBatch


class SequenceClassifier(LanguageModel):
    """A text classifier; every example is one scored position. There is no generated text.

    Batches hold ``label`` ``(batch,)`` int64 and the inputs of any language model.
    """

    auto_class = "AutoModelForSequenceClassification"

    def evaluate(self, batch: TextBatch) -> Scored:
        """One scored position an example."""
        return Scored(self.logits(batch), batch["label"], batch["index"])

    def logits(self, batch: TextBatch) -> Tensor:
        """The target's logits, ``(batch, classes)``."""
        with self._padded():
            return super().logits(batch)

    def hidden(self, batch: TextBatch) -> Sequence[Tensor]:
        """The last layer's tokens, of an encoder-decoder those of both."""
        with self._padded():
            return last_states(self.target(**self.inputs(batch), output_hidden_states=True))

    def shown(self, batch: TextBatch) -> list[dict[str, Any]]:
        """The text of each token, and the class."""
        labels = self.class_texts(batch["label"].tolist())
        return [{**one, "label": label} for one, label in zip(super().shown(batch), labels, strict=True)]

    def class_texts(self, classes: Sequence[int]) -> list[str]:
        """The names of the classes."""
        return HubModule.class_texts(self, classes)

    @contextmanager
    def _padded(self) -> Iterator[None]:
        """Tells the target the token that pads the data, by which decoders find an example's last token."""
        config = cast(Any, self.target).config
        own, config.pad_token_id = config.pad_token_id, padding_id(self.tokenizer)
        try:
            yield
        finally:
            config.pad_token_id = own
