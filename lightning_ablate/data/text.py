"""Text from any source that `datasets` can read, cut into sequences of one length."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

import torch

from lightning_ablate.data.base import AblationDataModule, Examples, Purpose, SourceData
from lightning_ablate.data.source import rows
from lightning_ablate.errors import ConfigError, DataError, loading
from lightning_ablate.tokens import padding_id, special_frame


class TextData(SourceData):
    """Text for a language model: the calibration sequences first, then the evaluation sequences from other documents.

    Documents longer than ``max_length`` give several sequences. The last sequence is used whole, so a budget is reached
    or passed by less than one sequence.

    Args:
        name: see :func:`~lightning_ablate.data.source.open_source`.
        text_column: the column with the text.
        calibration_tokens: budget of tokens, padding not counted.
        evaluation_tokens: budget of tokens, padding not counted.
        max_length: tokens per sequence, special tokens included.
        packing: ``pad`` gives each document its own sequences, padded at the end (the padding is masked); ``pack``
            joins documents with the end token between and cuts the whole into full sequences.
        tokenizer: hub name or folder of another tokenizer than the target's own.
        evaluation_split: the split that is evaluated; it may be the same one, as no text is used for both.
        shuffle_seed: shuffles the documents with this seed; None keeps their order.
        batch_size: sequences per forward pass and process.
        options: see :class:`SourceData`.
    """

    def __init__(
        self,
        name: str,
        *,
        text_column: str = "text",
        calibration_tokens: int = 10_000,
        evaluation_tokens: int = 100_000,
        max_length: int = 1024,
        packing: Literal["pad", "pack"] = "pad",
        tokenizer: str | None = None,
        evaluation_split: str = "train",
        shuffle_seed: int | None = None,
        batch_size: int = 8,
        **options: Any,
    ) -> None:
        options |= {"evaluation_split": evaluation_split, "shuffle_seed": shuffle_seed, "batch_size": batch_size}
        super().__init__(name, "tokens", (calibration_tokens, evaluation_tokens), **options)
        self.text_column, self.max_length, self.packing, self.tokenizer_name = (
            text_column,
            max_length,
            packing,
            tokenizer,
        )

    def documents(self, purpose: Purpose) -> Iterable[str]:
        """The texts for a purpose, in order. Override it to read from elsewhere."""
        for row in rows(self.source(purpose), self.name, self.text_column):
            text = row[self.text_column]
            if not isinstance(text, str):
                raise DataError(f"{self.name} holds a {type(text).__name__} in {self.text_column!r}, expected text")
            yield text

    def prepare_data(self) -> None:
        """Downloads what the hub has, once a node."""
        if not self.streaming:
            for purpose in get_args(Purpose):
                next(iter(self.documents(purpose)), None)

    def load(self, purpose: Purpose) -> Examples:
        """``input_ids`` and ``attention_mask``, each ``(length,)`` int64, of sequences until the budget is reached.

        Raises:
            DataError: if the documents end before.
        """
        tokenizer = tokenizer_of(self, self.tokenizer_name, self.max_length)
        cut, filler = self._packed if self.packing == "pack" else self._padded, padding_id(tokenizer)
        sequences = self.taken(purpose, ((one, len(one)) for one in cut(tokenizer, self._fresh(purpose))))
        examples = []
        for sequence in sequences:
            short = self.max_length - len(sequence)
            ids, mask = [*sequence, *[filler] * short], [1] * len(sequence) + [0] * short
            examples.append({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)})
        return Examples(examples, [torch.tensor(one, dtype=torch.int32).numpy().tobytes() for one in sequences])

    def describe(self) -> dict[str, Any]:
        """Adds how the text was cut."""
        return super().describe() | {"max_length": self.max_length, "packing": self.packing}

    def _fresh(self, purpose: Purpose) -> Iterator[str]:
        """The documents that are not blank and free for the purpose."""
        for text in self.documents(purpose):
            if text.strip() and self.may_use(text.encode(errors="surrogatepass"), purpose):
                yield text

    def _padded(self, tokenizer: Any, texts: Iterable[str]) -> Iterator[list[int]]:
        before, after = special_frame(tokenizer)
        room = self.max_length - len(before) - len(after)
        for text in texts:
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            for start in range(0, len(ids), room):
                sequence = [*before, *ids[start : start + room], *after]
                if len(sequence) > 1:  # a single token predicts nothing
                    yield sequence

    def _packed(self, tokenizer: Any, texts: Iterable[str]) -> Iterator[list[int]]:
        before, after = special_frame(tokenizer)
        room = self.max_length - len(before) - len(after)
        separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        stream: list[int] = []
        for text in texts:
            stream += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + separator
            while len(stream) >= room:
                yield [*before, *stream[:room], *after]
                stream = stream[room:]


def tokenizer_of(data: AblationDataModule, name: str | None, max_length: int) -> Any:
    """The tokenizer of that name, or else the target's own.

    Raises:
        ConfigError: if there is none, or it doesn't allow sequences of this length.
    """
    if name is not None:
        from transformers import AutoTokenizer

        with loading(name, DataError):
            tokenizer = AutoTokenizer.from_pretrained(name)
    else:
        tokenizer = getattr(data.trainer.lightning_module if data.trainer is not None else None, "tokenizer", None)
    if tokenizer is None:
        raise ConfigError("text needs a tokenizer: name one (--data.tokenizer), as the target brings none")
    before, after = special_frame(tokenizer)
    if not len(before) + len(after) + 1 < max_length <= tokenizer.model_max_length:
        raise ConfigError(
            f"max_length is {max_length}, expected above {len(before) + len(after) + 1} and at most "
            f"{tokenizer.model_max_length}, which the tokenizer gives as the target's longest (--data.max_length)"
        )
    return tokenizer
