"""Texts with a class, and pairs of texts, from any source that `datasets` can read."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ablate.data.base import Examples, Purpose, SourceData, budgets_of
from lightning_ablate.data.source import rows
from lightning_ablate.data.text import tokenizer_of
from lightning_ablate.errors import DataError
from lightning_ablate.tokens import padding_id

_IGNORED = -100


class Rows(Examples):
    """Examples that are dicts of tensors already, and what identifies them."""

    def __init__(self, examples: Sequence[dict[str, Tensor]], contents: Sequence[bytes]) -> None:
        self.examples, self.contents = examples, contents

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.examples)

    def example(self, index: int) -> dict[str, Tensor]:
        """One of them."""
        return self.examples[index]

    def content(self, index: int) -> bytes:
        """What it was made from."""
        return self.contents[index]


class TextRows(SourceData):
    """Rows of a source, each one example: the calibration examples first, then the evaluation examples.

    Args:
        name: see :func:`~lightning_ablate.data.source.open_source`.
        columns: those that an example is made from.
        subset: which configuration of a hub data set.
        calibration_split: the split that calibrates.
        evaluation_split: the split that is evaluated; it may be the same one, as no row is used for both.
        streaming: reads only as far as the budgets need, without downloading the rest.
        shuffle_seed: shuffles the rows with this seed, as many sources are sorted by class; None keeps their order.
        calibration_examples: budget.
        evaluation_examples: budget.
        length: tokens of a text, special tokens included; longer ones are cut.
        tokenizer: hub name or folder of another tokenizer than the target's own.
        batch_size: examples per forward pass and process.
        num_workers: processes that load batches ahead; 0 loads them in the main one.
    """

    def __init__(
        self,
        name: str,
        columns: Sequence[str],
        *,
        subset: str | None = None,
        calibration_split: str = "train",
        evaluation_split: str = "validation",
        streaming: bool = False,
        shuffle_seed: int | None = 0,
        calibration_examples: int = 256,
        evaluation_examples: int = 1_000,
        length: int = 128,
        tokenizer: str | None = None,
        batch_size: int = 16,
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
        self.budgets = budgets_of("examples", calibration_examples, evaluation_examples)
        self.columns, self.length, self.tokenizer_name = tuple(columns), length, tokenizer

    @abstractmethod
    def example(self, row: dict[str, Any], tokenizer: Any) -> dict[str, Tensor]:
        """The tensors of one row."""

    def load(self, purpose: Purpose) -> Rows:
        """Takes rows until the budget is reached.

        Raises:
            DataError: if the rows end before, or are not of the expected form.
        """
        tokenizer = tokenizer_of(self, self.tokenizer_name, self.length)
        examples: list[dict[str, Tensor]] = []
        contents: list[bytes] = []
        for row in rows(self.source(purpose), self.name, *self.columns):
            if len(examples) == self.budgets[purpose]:
                break
            content = "\0".join(str(row[column]) for column in self.columns).encode(errors="surrogatepass")
            if self.may_use(content, purpose):
                examples.append(self.example(row, tokenizer))
                contents.append(content)
        if len(examples) < self.budgets[purpose]:
            raise DataError(
                f"{self.name} gives {len(examples):,} {purpose} examples, expected {self.budgets[purpose]:,}; "
                f"bring more or lower --data.{purpose}_examples"
            )
        return Rows(examples, contents)

    def describe(self) -> dict[str, Any]:
        """Adds the length, and the budgets, which are always reached."""
        budgets = {f"{purpose}_examples": self.budgets[purpose] for purpose in self.examples}
        return super().describe() | {"length": self.length, **budgets}

    def text(self, row: dict[str, Any], column: str) -> str:
        """The text of a column."""
        if not isinstance(row[column], str):
            raise DataError(f"{self.name} holds {row[column]!r} in {column!r}, expected text")
        return row[column]

    def tokens(self, tokenizer: Any, *texts: str) -> dict[str, Tensor]:
        """What the target takes of one text or a pair, cut and padded: each ``(length,)`` int64."""
        made = tokenizer(*texts, truncation=True, max_length=self.length)
        padding = {"input_ids": padding_id(tokenizer), "attention_mask": 0, "token_type_ids": 0}
        return {name: self.padded(made[name], filler) for name, filler in padding.items() if name in made}

    def padded(self, numbers: list[int], filler: int) -> Tensor:
        """The numbers, filled up to ``(length,)`` int64."""
        return torch.tensor(numbers + [filler] * (self.length - len(numbers)))


class LabelledTexts(TextRows):
    """Texts with a class.

    Args:
        name: see :func:`~lightning_ablate.data.source.open_source`.
        text_column: the column with the text.
        second_text_column: the column with the second text, where a pair is classified.
        label_column: the column with the class indices.
        options: see :class:`TextRows`.
    """

    def __init__(
        self,
        name: str,
        *,
        text_column: str = "text",
        second_text_column: str | None = None,
        label_column: str = "label",
        **options: Any,
    ) -> None:
        self.texts = [text_column] if second_text_column is None else [text_column, second_text_column]
        self.label_column = label_column
        super().__init__(name, [*self.texts, label_column], **options)

    def example(self, row: dict[str, Any], tokenizer: Any) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` ``(length,)``, and ``label`` ``()``, int64."""
        label = row[self.label_column]
        if not isinstance(label, int):
            raise DataError(f"{self.name} holds {label!r} in {self.label_column!r}, expected a class index")
        texts = [self.text(row, column) for column in self.texts]
        return {**self.tokens(tokenizer, *texts), "label": torch.tensor(label)}


class TextPairs(TextRows):
    """Pairs of a text to read and a text to predict.

    Args:
        name: see :func:`~lightning_ablate.data.source.open_source`.
        source_column: the column with the text to read.
        target_column: the column with the text to predict.
        prefix: stands before each text to read (``summarize: ``), where the target was trained so.
        options: see :class:`TextRows`; ``length`` holds for each of the two texts.
    """

    def __init__(
        self,
        name: str,
        *,
        source_column: str = "source",
        target_column: str = "target",
        prefix: str = "",
        **options: Any,
    ) -> None:
        self.source_column, self.target_column, self.prefix = source_column, target_column, prefix
        super().__init__(name, [source_column, target_column], **options)

    def example(self, row: dict[str, Any], tokenizer: Any) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels`` ``(length,)`` int64, the labels -100 at padding."""
        read = self.tokens(tokenizer, self.prefix + self.text(row, self.source_column))
        target = tokenizer(text_target=self.text(row, self.target_column), truncation=True, max_length=self.length)
        return {**read, "labels": self.padded(target["input_ids"], _IGNORED)}
