"""Texts with a class, and pairs of a text to read and a text to predict."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_ablate.data.base import Purpose
from lightning_ablate.data.examples import Examples
from lightning_ablate.data.text import TokenData


@dataclass(kw_only=True, eq=False, repr=False)
class TextRows(TokenData):
    """Rows of texts, each one example.

    Args:
        calibration_examples: examples that calibrate.
        evaluation_examples: examples that are evaluated.
    """

    calibration_examples: int = 256
    evaluation_examples: int = 1_000

    @abstractmethod
    def example(self, row: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
        """The tokens of a row, as lists that are padded later, and its numbers."""

    def load(self, purpose: Purpose) -> Examples:
        """Takes rows until the budget is reached; DataError if they end before, or are not of the expected form."""
        tokenizer = self.load_tokenizer()
        rows, contents, clusters = zip(*self.taken(purpose, self.fresh(purpose, self.rows(purpose))), strict=True)
        tokens = [self.example(row, tokenizer) for row in rows]
        return self.padded(tokenizer, tokens, contents, ([one] for one in clusters))

    def tokens(self, tokenizer: Any, *texts: str, truncation: bool = True) -> dict[str, list[int]]:
        """What the target takes of a text, or of a pair of texts that it reads together, cut to ``max_length``."""
        made = tokenizer(*texts, truncation=truncation, max_length=self.max_length if truncation else None)
        return {name: made[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in made}


@dataclass(kw_only=True, eq=False, repr=False)
class LabelledTexts(TextRows):
    """Texts, or pairs of texts, with a class. Rows that lack a text or a class are passed over.

    Args:
        text_column: the column with the text.
        second_text_column: the column with the second text, where a pair is classified.
        label_column: the column with the class indices or names.
    """

    text_column: str = "text"
    second_text_column: str | None = None
    label_column: str = "label"

    def example(self, row: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
        """``input_ids`` and ``attention_mask`` of the text or pair, and ``label``."""
        texts = [self.text(row, column) for column in self.columns[:-1]]
        return {**self.tokens(tokenizer, *texts), "label": row[self.label_column]}


@dataclass(kw_only=True, eq=False, repr=False)
class TextPairs(TextRows):
    """Pairs of a text to read and a text to predict, each of ``max_length`` tokens. Rows that lack one are passed over.

    Args:
        source_column: the column with the text to read.
        target_column: the column with the text to predict.
        prefix: stands before each text to read (``summarize: ``), where the target was trained so.
    """

    source_column: str = "source"
    target_column: str = "target"
    prefix: str = ""

    def example(self, row: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
        """``input_ids`` and ``attention_mask`` of the text to read, and ``labels``, which padding fills with -100."""
        read = self.tokens(tokenizer, self.prefix + self.text(row, self.source_column))
        predicted = self.text(row, self.target_column)
        made = tokenizer(text_target=predicted, truncation=True, max_length=self.max_length)
        return {**read, "labels": made["input_ids"]}
