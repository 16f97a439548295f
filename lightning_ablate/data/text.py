"""Texts as tokens, and text cut into sequences of one length."""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, pairwise
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_ablate.data.base import Purpose
from lightning_ablate.data.examples import Examples, joined
from lightning_ablate.data.rows import RowData
from lightning_ablate.demo import resolve
from lightning_ablate.errors import ConfigError, DataError, loading


@dataclass(kw_only=True, eq=False, repr=False)
class TokenData(RowData):
    """Data whose rows are texts; an example is the tokens of a text.

    Args:
        max_length: tokens of an example, special tokens included.
        tokenizer: hub name or folder of another tokenizer than the target's own.
    """

    max_length: int = 128
    tokenizer: str | None = None

    facts: ClassVar[tuple[str, ...]] = (*RowData.facts, "max_length")

    def load_tokenizer(self) -> Any:
        """The tokenizer. Lowers ``max_length`` to the longest that the tokenizer allows.

        Raises:
            ConfigError: if there is none, or ``max_length`` leaves no room for a text.
        """
        if self.tokenizer is None:
            tokenizer = getattr(self.module, "tokenizer", None)
        else:
            from transformers import AutoTokenizer

            with loading(self.tokenizer, DataError, "--data.tokenizer"):
                tokenizer = AutoTokenizer.from_pretrained(resolve(self.tokenizer))
        if tokenizer is None:
            raise ConfigError("text needs a tokenizer: name one (--data.tokenizer), as the target brings none")
        least, most = 1 + sum(map(len, special_frame(tokenizer))), tokenizer.model_max_length
        if self.max_length > most:
            was, self.max_length = self.max_length, most
            rank_zero_info(f"max_length lowered from {was} to {most}, the longest that the tokenizer allows")
        if self.max_length <= least:
            raise ConfigError(f"max_length is {self.max_length}, expected above {least} (--data.max_length)")
        return tokenizer

    def text(self, row: Mapping[str, Any], column: str) -> str:
        """The text in a column, or DataError."""
        if not isinstance(row[column], str):
            raise DataError(f"{self.name} holds {row[column]!r} in {column!r}, expected text")
        return row[column]

    def padded(
        self, tokenizer: Any, tokens: Sequence[Mapping[str, Any]], contents: Sequence[bytes], clusters: Iterable[Any]
    ) -> Examples:
        """Examples of lists of tokens, and of numbers. A list is padded to ``(max_length,)`` int64 when it is read."""
        make = partial(_padded, padding_id(tokenizer), self.max_length)
        return Examples(tokens, contents, make, joined(clusters))


@dataclass(kw_only=True, eq=False, repr=False)
class TextData(TokenData):
    """Text for a language model, cut into sequences of one length.

    Documents longer than ``max_length`` give several sequences. The last sequence is used whole, so a budget is reached
    or passed by less than one sequence. Sequences that hold parts of one document are one cluster. A data
    set of a single document is cut into 2 to 100 passages, which count as documents: at blank lines, or else lines or
    spaces.

    Args:
        text_column: the column with the text.
        calibration_tokens: tokens that calibrate, padding not counted.
        evaluation_tokens: tokens that are evaluated, padding not counted.
        max_length: tokens per sequence, special tokens included.
        packing: ``pad`` gives each document its own sequences, padded at the end (the padding is masked); ``pack``
            joins documents with the end token between until they fill whole sequences, and drops the rest of the
            last one, less than a sequence, so that the next sequence begins with another document.
        shuffle_seed: shuffles the documents with this seed; None keeps their order.
    """

    text_column: str = "text"
    calibration_tokens: int = 10_000
    evaluation_tokens: int = 100_000
    max_length: int = 1024
    packing: Literal["pad", "pack"] = "pad"
    evaluation_split: str | None = "train"
    shuffle_seed: int | None = None
    batch_size: int = 8

    unit = "tokens"
    facts = (*TokenData.facts, "packing")

    def load(self, purpose: Purpose) -> Examples:
        """Sequences as ``input_ids`` and ``attention_mask``, each ``(length,)`` int64, until the budget is reached."""
        tokenizer = self.load_tokenizer()
        found = self.taken(purpose, self._sequences(tokenizer, purpose), lambda one: len(one[0]))
        contents = [torch.tensor(ids, dtype=torch.int32).numpy().tobytes() for ids, _ in found]
        tokens = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids, _ in found]
        return self.padded(tokenizer, tokens, contents, (documents for _, documents in found))

    def filled(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], Hashable]]:
        """The documents, each with its cluster; of a single document its passages."""
        documents = super().filled(rows)
        first = list(islice(documents, 2))
        if len(first) != 1:
            return chain(first, documents)
        rank_zero_info(f"{self.name} is a single document: its passages count as documents")
        cut = enumerate(passages(self.text(first[0][0], self.text_column)))
        return (({self.text_column: passage}, number) for number, passage in cut if passage.strip())

    def _sequences(self, tokenizer: Any, purpose: Purpose) -> Iterator[tuple[list[int], list[Hashable]]]:
        """Sequences of the documents that may serve the purpose, and the clusters of the documents in each."""
        before, after = special_frame(tokenizer)
        room = self.max_length - len(before) - len(after)
        pack = self.packing == "pack"
        separator = [tokenizer.eos_token_id] if pack and tokenizer.eos_token_id is not None else []
        ids: list[int] = []
        documents: list[Hashable] = []  # those that `ids` are of
        for row, _, document in self.fresh(purpose, self.rows(purpose)):
            text = self.text(row, self.text_column)
            ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + separator
            documents.append(document)
            whole = len(ids) - len(ids) % room if pack else len(ids)
            for start in range(0, whole, room):
                sequence = [*before, *ids[start : min(start + room, whole)], *after]
                if len(sequence) > 1:  # a single token predicts nothing
                    yield sequence, documents if start == 0 else [document]
            if whole or not ids:  # the rest of a document goes, or all packed sequences would be one cluster
                ids, documents = [], []


def passages(text: str) -> list[str]:
    """A text cut into 2 to 100 passages of about 1,000 characters or more, at blank lines, or else lines or spaces."""
    count = min(100, max(2, len(text) // 1_000))
    half = max(1, len(text) // count // 2)
    cuts = {0, len(text)}
    for middle in (len(text) * number // count for number in range(1, count)):
        for mark in ("\n\n", "\n", " "):
            ends = [text.rfind(mark, middle - half, middle), text.find(mark, middle, middle + half)]
            if near := [end + len(mark) for end in ends if end >= 0]:
                cuts.add(min((abs(end - middle), end) for end in near)[1])
                break
    return [text[start:end] for start, end in pairwise(sorted(cuts))]


def special_frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text, by its own rule.

    Raises:
        DataError: if the tokenizer doesn't keep to this rule.
    """
    if hasattr(tokenizer, "build_inputs_with_special_tokens"):  # one in Python
        framed = tokenizer.build_inputs_with_special_tokens([-1])  # an id that no tokenizer has
        texts = [number for number, one in enumerate(framed) if one == -1]
    else:
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel

        rule = Tokenizer(WordLevel({"text": 0}, unk_token="text"))
        rule.post_processor = getattr(getattr(tokenizer, "backend_tokenizer", None), "post_processor", None)
        encoding = rule.encode("text")
        framed, texts = encoding.ids, [number for number, one in enumerate(encoding.special_tokens_mask) if one == 0]
    if len(texts) == 1:
        before, after = framed[: texts[0]], framed[texts[0] + 1 :]
        plain = tokenizer("", add_special_tokens=False)["input_ids"]  # a text that any tokenizer knows
        if tokenizer("")["input_ids"] == [*before, *plain, *after]:
            return before, after
    raise DataError(
        f"{type(tokenizer).__name__} doesn't put its special tokens around a text by the rule that it gives: its "
        "sequences can't be cut; bring another (--data.tokenizer)"
    )


def padding_id(tokenizer: Any) -> int:
    """The padding token, or another one where there is none: padded positions are masked anyway."""
    return next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)


def _padded(padding: int, length: int, tokens: Mapping[str, Any]) -> dict[str, Tensor]:
    fillers = {"input_ids": padding, "partner_input_ids": padding, "labels": -100}
    made = dict[str, Tensor]()
    for name, one in tokens.items():
        if isinstance(one, list):
            one = one + [fillers.get(name, False if isinstance(next(iter(one), 0), bool) else 0)] * (length - len(one))
        made[name] = torch.tensor(one)
    return made
