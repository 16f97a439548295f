"""Texts with a class, and pairs of texts, from any source that `datasets` can read."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ablate.data.base import Purpose, SourceData
from lightning_ablate.data.examples import Examples, joined
from lightning_ablate.data.source import rows
from lightning_ablate.data.text import padded, padding_id, tokenizer_of


class TextRows(SourceData):
    """Rows of a source, each one example: the calibration examples first, then the evaluation examples.

    Rows that lack a text or a class are passed over, where ``passes_blanks``.

    Args:
        name: a hub name, a local folder, or files or a glob of parquet, json, jsonl, csv or txt.
        columns: those that an example is made from.
        calibration_examples: budget.
        evaluation_examples: budget.
        max_length: tokens of a text, special tokens included; longer ones are cut.
        tokenizer: hub name or folder of another tokenizer than the target's own.
        options: see :class:`SourceData`.
    """

    passes_blanks = True

    def __init__(
        self,
        name: str,
        columns: Sequence[str],
        *,
        calibration_examples: int = 256,
        evaluation_examples: int = 1_000,
        max_length: int = 128,
        tokenizer: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(name, "examples", (calibration_examples, evaluation_examples), **options)
        self.columns, self.max_length, self.tokenizer_name = tuple(columns), max_length, tokenizer

    @abstractmethod
    def example(self, row: dict[str, Any], tokenizer: Any) -> dict[str, Tensor]:
        """The tensors of one row."""

    def load(self, purpose: Purpose) -> Examples:
        """Takes rows until the budget is reached; DataError if they end before, or are not of the expected form."""
        tokenizer = tokenizer_of(self, self.tokenizer_name)
        found = self.taken(purpose, ((one, 1) for one in self._fresh(purpose)))
        made = [self.example(row, tokenizer) for _, row, _ in found]
        arrays = [{name: tensor.numpy() for name, tensor in one.items()} for one in made]
        clusters = joined([self.cluster(row, number)] for number, row, _ in found)
        return Examples(arrays, [content for *_, content in found], clusters=clusters)

    def describe(self) -> dict[str, Any]:
        """Adds the length."""
        return super().describe() | {"max_length": self.max_length}

    def _fresh(self, purpose: Purpose) -> Iterator[tuple[int, dict[str, Any], bytes]]:
        """The rows that are free for the purpose, with their numbers, and what identifies them."""
        for number, row in enumerate(rows(self.source(purpose), self.name, *self.columns, *self.cluster_columns)):
            asked = [row[column] for column in self.columns]
            if self.passes_blanks and any(value is None or not str(value).strip() for value in asked):
                continue
            content = "\0".join(map(str, asked)).encode(errors="surrogatepass")
            if self.may_use(content, purpose):
                yield number, row, content

    def tokens(self, tokenizer: Any, *texts: str) -> dict[str, Tensor]:
        """What the target takes of one text or a pair, cut and padded: each ``(length,)`` int64."""
        made = tokenizer(*texts, truncation=True, max_length=self.max_length)
        padding = {"input_ids": padding_id(tokenizer), "attention_mask": 0, "token_type_ids": 0}
        return {name: padded(made[name], filler, self.max_length) for name, filler in padding.items() if name in made}


class LabelledTexts(TextRows):
    """Texts with a class.

    Args:
        name: a hub name, a local folder, or files or a glob of parquet, json, jsonl, csv or txt.
        text_column: the column with the text.
        second_text_column: the column with the second text, where a pair is classified.
        label_column: the column with the class indices or names.
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

    def source(self, purpose: Purpose) -> Any:
        """The rows for a purpose; their classes are mapped to the target's."""
        found = super().source(purpose)
        self.index = self.class_index(found, self.label_column)
        return found

    def example(self, row: dict[str, Any], tokenizer: Any) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` ``(length,)``, and ``label`` ``()``, int64."""
        label = torch.tensor(self.index(row[self.label_column]))
        return {**self.tokens(tokenizer, *(self.text(row, column) for column in self.texts)), "label": label}


class TextPairs(TextRows):
    """Pairs of a text to read and a text to predict.

    Args:
        name: a hub name, a local folder, or files or a glob of parquet, json, jsonl, csv or txt.
        source_column: the column with the text to read.
        target_column: the column with the text to predict.
        prefix: stands before each text to read (``summarize: ``), where the target was trained so.
        options: see :class:`TextRows`; ``max_length`` holds for each of the two texts.
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
        target = tokenizer(text_target=self.text(row, self.target_column), truncation=True, max_length=self.max_length)
        return {**read, "labels": padded(target["input_ids"], -100, self.max_length)}
