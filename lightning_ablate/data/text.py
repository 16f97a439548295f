"""Text from any source that `datasets` can read, cut into sequences of one length."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_ablate.data.base import AblationDataModule, Examples, Purpose, SourceData
from lightning_ablate.data.source import rows
from lightning_ablate.errors import ConfigError, DataError, loading


class TextData(SourceData):
    """Text for a language model: the calibration sequences first, then the evaluation sequences from other documents.

    Documents longer than ``max_length`` give several sequences. The last sequence is used whole, so a budget is reached
    or passed by less than one sequence.

    Args:
        name: a hub name, a local folder, or files or a glob of parquet, json, jsonl, csv or txt.
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
        self.text_column, self.tokenizer_name = text_column, tokenizer
        self.max_length, self.packing = max_length, packing

    def load(self, purpose: Purpose) -> Examples:
        """``input_ids`` and ``attention_mask``, each ``(length,)`` int64, of sequences until the budget is reached."""
        tokenizer = tokenizer_of(self, self.tokenizer_name, self.max_length)
        filler, length = padding_id(tokenizer), self.max_length
        sequences = self.taken(purpose, ((one, len(one)) for one in self._cut(tokenizer, purpose)))
        examples = [
            {"input_ids": padded(one, filler, length), "attention_mask": padded([1] * len(one), 0, length)}
            for one in sequences
        ]
        return Examples(examples, [torch.tensor(one, dtype=torch.int32).numpy().tobytes() for one in sequences])

    def describe(self) -> dict[str, Any]:
        """Adds how the text was cut."""
        return super().describe() | {"max_length": self.max_length, "packing": self.packing}

    def _cut(self, tokenizer: Any, purpose: Purpose) -> Iterator[list[int]]:
        """Sequences of the documents that are not blank and free for the purpose."""
        before, after = special_frame(tokenizer)
        room = self.max_length - len(before) - len(after)
        pack = self.packing == "pack"
        separator = [tokenizer.eos_token_id] if pack and tokenizer.eos_token_id is not None else []
        ids: list[int] = []
        for row in rows(self.source(purpose), self.name, self.text_column):
            text = self.text(row, self.text_column)
            if not (text.strip() and self.may_use(text.encode(errors="surrogatepass"), purpose)):
                continue
            ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + separator
            while len(ids) >= (room if pack else 1):
                sequence, ids = [*before, *ids[:room], *after], ids[room:]
                if len(sequence) > 1:  # a single token predicts nothing
                    yield sequence


def tokenizer_of(data: AblationDataModule, name: str | None, max_length: int) -> Any:
    """The tokenizer of that name, or else the target's own; ConfigError unless it allows sequences of this length."""
    if name is not None:
        from transformers import AutoTokenizer

        with loading(name, DataError, "--data.tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(name)
    else:
        tokenizer = getattr(getattr(data.trainer, "lightning_module", None), "tokenizer", None)
    if tokenizer is None:
        raise ConfigError("text needs a tokenizer: name one (--data.tokenizer), as the target brings none")
    least = 1 + sum(map(len, special_frame(tokenizer)))
    if not least < max_length <= tokenizer.model_max_length:
        raise ConfigError(
            f"max_length is {max_length}, expected above {least} and at most {tokenizer.model_max_length}, "
            "which the tokenizer gives as the target's longest (--data.max_length)"
        )
    return tokenizer


def special_frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text."""
    framed, plain = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    start = next(i for i in range(len(framed)) if framed[i : i + len(plain)] == plain)
    return framed[:start], framed[start + len(plain) :]


def padded(ids: list[int], filler: int, length: int) -> Tensor:
    """The numbers, filled up to ``(length,)`` int64."""
    return torch.tensor(ids + [filler] * (length - len(ids)))


def padding_id(tokenizer: Any) -> int:
    """The padding token, or another one where there is none: padded positions are masked anyway."""
    return next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
