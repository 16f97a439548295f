"""Text from any source that `datasets` can read, cut into sequences of one length."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_ablate.data.base import AblationDataModule, Examples, Purpose, SourceData, budgets_of
from lightning_ablate.data.source import rows
from lightning_ablate.errors import ConfigError, DataError, loading
from lightning_ablate.tokens import padding_id, special_frame


class Sequences(Examples):
    """Token sequences of one length, ``(sequences, length)`` int32, padded behind ``lengths`` ``(sequences,)``."""

    def __init__(self, ids: Tensor, lengths: Tensor) -> None:
        self.ids, self.lengths = ids, lengths

    def __len__(self) -> int:
        """The number of sequences."""
        return len(self.ids)

    def example(self, index: int) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, each ``(length,)`` int64."""
        mask = torch.arange(self.ids.shape[1]) < self.lengths[index]
        return {"input_ids": self.ids[index].long(), "attention_mask": mask.long()}

    def content(self, index: int) -> bytes:
        """The tokens."""
        return self.ids[index, : int(self.lengths[index])].numpy().tobytes()


class TextData(SourceData):
    """Text for a language model: the calibration sequences first, then the evaluation sequences from other documents.

    Documents longer than ``length`` give several sequences. The last sequence is used whole, so a budget is reached or
    passed by less than one sequence.

    Args:
        name: see :func:`~lightning_ablate.data.source.open_source`.
        subset: which configuration of a hub data set.
        calibration_split: the split that calibrates.
        evaluation_split: the split that is evaluated; it may be the same one, as no text is used for both.
        text_column: the column with the text.
        streaming: reads only as far as the budgets need, without downloading the rest.
        shuffle_seed: shuffles the documents with this seed; None keeps their order.
        calibration_tokens: budget of tokens, padding not counted.
        evaluation_tokens: likewise.
        length: tokens per sequence, special tokens included.
        packing: ``pad`` gives each document its own sequences, padded at the end (the padding is masked); ``pack``
            joins documents with the end token between and cuts the whole into full sequences.
        tokenizer: hub name or folder of another tokenizer than the target's own.
        batch_size: sequences per forward pass and process.
        num_workers: processes that load batches ahead; 0 loads them in the main one.
    """

    def __init__(
        self,
        name: str,
        *,
        subset: str | None = None,
        calibration_split: str = "train",
        evaluation_split: str = "train",
        text_column: str = "text",
        streaming: bool = False,
        shuffle_seed: int | None = None,
        calibration_tokens: int = 10_000,
        evaluation_tokens: int = 100_000,
        length: int = 1024,
        packing: Literal["pad", "pack"] = "pad",
        tokenizer: str | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            name,
            subset=subset,
            calibration_split=calibration_split,
            evaluation_split=evaluation_split,
            streaming=streaming,
            shuffle_seed=shuffle_seed,
            batch_size=batch_size,
            num_workers=num_workers,
        )
        self.budgets = budgets_of("tokens", calibration_tokens, evaluation_tokens)
        self.text_column, self.length, self.packing, self.tokenizer_name = text_column, length, packing, tokenizer

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

    def load(self, purpose: Purpose) -> Sequences:
        """Cuts documents into sequences until the budget is reached.

        Raises:
            DataError: if the documents end before.
        """
        tokenizer = tokenizer_of(self, self.tokenizer_name, self.length)
        cut = self._packed if self.packing == "pack" else self._padded
        sequences, reached = [], 0
        for sequence in cut(tokenizer, self._fresh(purpose)):
            sequences.append(sequence)
            reached += len(sequence)
            if reached >= self.budgets[purpose]:
                break
        else:
            raise DataError(
                f"{self.name} gives {reached:,} {purpose} tokens, expected {self.budgets[purpose]:,}; "
                f"bring more text or lower --data.{purpose}_tokens"
            )
        ids = torch.full((len(sequences), self.length), padding_id(tokenizer), dtype=torch.int32)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
        return Sequences(ids, torch.tensor([len(sequence) for sequence in sequences]))

    def describe(self) -> dict[str, Any]:
        """Adds how the text was cut, and the budgets asked and reached."""
        tokens = {
            f"{purpose}_tokens": {"asked": self.budgets[purpose], "reached": int(examples.lengths.sum())}
            for purpose, examples in self.examples.items()
            if isinstance(examples, Sequences)
        }
        return super().describe() | {"length": self.length, "packing": self.packing, **tokens}

    def _fresh(self, purpose: Purpose) -> Iterator[str]:
        """The documents that are not blank and free for the purpose."""
        for text in self.documents(purpose):
            if text.strip() and self.may_use(text.encode(errors="surrogatepass"), purpose):
                yield text

    def _padded(self, tokenizer: Any, texts: Iterable[str]) -> Iterator[list[int]]:
        before, after = special_frame(tokenizer)
        room = self.length - len(before) - len(after)
        for text in texts:
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            for start in range(0, len(ids), room):
                sequence = [*before, *ids[start : start + room], *after]
                if len(sequence) > 1:  # a single token predicts nothing
                    yield sequence

    def _packed(self, tokenizer: Any, texts: Iterable[str]) -> Iterator[list[int]]:
        before, after = special_frame(tokenizer)
        room = self.length - len(before) - len(after)
        separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        stream: list[int] = []
        for text in texts:
            stream += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + separator
            while len(stream) >= room:
                yield [*before, *stream[:room], *after]
                stream = stream[room:]


def tokenizer_of(data: AblationDataModule, name: str | None, length: int) -> Any:
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
    if not len(before) + len(after) + 1 < length <= tokenizer.model_max_length:
        raise ConfigError(
            f"length is {length}, expected above {len(before) + len(after) + 1} and at most "
            f"{tokenizer.model_max_length}, which the tokenizer gives as the target's longest (--data.length)"
        )
    return tokenizer
