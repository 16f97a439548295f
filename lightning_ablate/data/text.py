"""Text from any source that `datasets` can read, cut into sequences of one length."""

from collections.abc import Hashable, Iterator
from functools import partial
from itertools import chain, islice, pairwise
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_ablate.data.base import Purpose, SourceData
from lightning_ablate.data.examples import Examples, joined
from lightning_ablate.data.source import rows
from lightning_ablate.demo import resolve
from lightning_ablate.errors import ConfigError, DataError, loading


class TextData(SourceData):
    """Text for a language model: the calibration sequences first, then the evaluation sequences from other documents.

    Documents longer than ``max_length`` give several sequences. The last sequence is used whole, so a budget is reached
    or passed by less than one sequence. Sequences of one document are one cluster, and those of documents that a packed
    sequence joins.

    Where the source holds a single document, its passages count as documents: 2 to 100, cut at blank lines.

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
        tokenizer = tokenizer_of(self, self.tokenizer_name)
        found = self.taken(purpose, ((one, len(one[0])) for one in self._cut(tokenizer, purpose)))
        sequences = [sequence for sequence, _ in found]
        contents = [torch.tensor(one, dtype=torch.int32).numpy().tobytes() for one in sequences]
        make = partial(_example, padding_id(tokenizer), self.max_length)
        return Examples(sequences, contents, make, joined(documents for _, documents in found))

    def describe(self) -> dict[str, Any]:
        """Adds how the text was cut."""
        return super().describe() | {"max_length": self.max_length, "packing": self.packing}

    def _cut(self, tokenizer: Any, purpose: Purpose) -> Iterator[tuple[list[int], list[Hashable]]]:
        """Sequences of the documents that are free for the purpose, and which documents each holds."""
        before, after = special_frame(tokenizer)
        room = self.max_length - len(before) - len(after)
        pack = self.packing == "pack"
        separator = [tokenizer.eos_token_id] if pack and tokenizer.eos_token_id is not None else []
        ids: list[int] = []
        documents: list[Hashable] = []
        for text, document in self._documents(purpose):
            if not self.may_use(text.encode(errors="surrogatepass"), purpose):
                continue
            ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + separator
            documents.append(document)
            whole = len(ids) - len(ids) % room if pack else len(ids)
            for start in range(0, whole, room):
                sequence = [*before, *ids[start : min(start + room, whole)], *after]
                if len(sequence) > 1:  # a single token predicts nothing
                    yield sequence, documents if start == 0 else [document]
            ids = ids[whole:]
            if whole or not ids:
                documents = [document] if ids else []

    def _documents(self, purpose: Purpose) -> Iterator[tuple[str, Hashable]]:
        """The texts that are not blank, and what each belongs to: itself, or the value of the cluster column."""
        found = rows(self.source(purpose), self.name, self.text_column, *self.cluster_columns)
        filled = ((number, row) for number, row in enumerate(found) if row[self.text_column] is not None)
        texts = ((self.text(row, self.text_column), self.cluster(row, number)) for number, row in filled)
        documents = ((text, document) for text, document in texts if text.strip())
        first = list(islice(documents, 2))
        if len(first) == 1:
            rank_zero_info(f"{self.name} is a single document: its passages count as documents")
            return ((one, number) for number, one in enumerate(passages(first[0][0])) if one.strip())
        return chain(first, documents)


def passages(text: str) -> list[str]:
    """A text cut into 2 to 100 passages of about 1,000 characters or more, at blank lines, or else lines or spaces."""
    count = min(100, max(2, len(text) // 1_000))
    half = max(1, len(text) // count // 2)
    cuts = {0, len(text)}
    for place in (len(text) * number // count for number in range(1, count)):
        for mark in ("\n\n", "\n", " "):
            ends = [text.rfind(mark, place - half, place), text.find(mark, place, place + half)]
            if near := [end + len(mark) for end in ends if end >= 0]:
                cuts.add(min((abs(end - place), end) for end in near)[1])
                break
    return [text[start:end] for start, end in pairwise(sorted(cuts))]


def tokenizer_of(data: Any, name: str | None) -> Any:
    """The tokenizer of that name, or else the target's own; lowers the data's ``max_length`` to what it gives.

    Raises:
        ConfigError: if there is none, or ``max_length`` leaves no room for a text.
    """
    if name is not None:
        from transformers import AutoTokenizer

        with loading(name, DataError, "--data.tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(resolve(name))
    else:
        tokenizer = getattr(getattr(data.trainer, "lightning_module", None), "tokenizer", None)
    if tokenizer is None:
        raise ConfigError("text needs a tokenizer: name one (--data.tokenizer), as the target brings none")
    least, most = 1 + sum(map(len, special_frame(tokenizer))), tokenizer.model_max_length
    if data.max_length > most:
        rank_zero_info(f"max_length is {most} instead of {data.max_length}: the target's longest, by its tokenizer")
        data.max_length = most
    if data.max_length <= least:
        raise ConfigError(f"max_length is {data.max_length}, expected above {least} (--data.max_length)")
    return tokenizer


def special_frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text, by its own rule.

    Raises:
        DataError: if this isn't what the tokenizer does to a text.
    """
    if hasattr(tokenizer, "build_inputs_with_special_tokens"):  # one in Python
        framed = tokenizer.build_inputs_with_special_tokens([-1])  # an id that no tokenizer has
        is_text = [one == -1 for one in framed]
    else:
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel

        rule = Tokenizer(WordLevel({"text": 0}, unk_token="text"))
        rule.post_processor = getattr(getattr(tokenizer, "backend_tokenizer", None), "post_processor", None)
        encoding = rule.encode("text")
        framed, is_text = encoding.ids, [special == 0 for special in encoding.special_tokens_mask]
    place = is_text.index(True) if sum(is_text) == 1 else len(framed)
    before, after = framed[:place], framed[place + 1 :]
    plain = tokenizer("", add_special_tokens=False)["input_ids"]  # a text that any tokenizer knows
    if sum(is_text) != 1 or tokenizer("")["input_ids"] != [*before, *plain, *after]:
        raise DataError(
            f"{type(tokenizer).__name__} doesn't put its special tokens around a text by the rule that it gives: its "
            "sequences can't be cut; bring another (--data.tokenizer)"
        )
    return before, after


def _example(filler: int, length: int, ids: list[int]) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` of a sequence, each ``(length,)`` int64."""
    return {"input_ids": padded(ids, filler, length), "attention_mask": padded([1] * len(ids), 0, length)}


def padded(ids: list[int], filler: int, length: int) -> Tensor:
    """The numbers, filled up to ``(length,)`` int64."""
    return torch.tensor(ids + [filler] * (length - len(ids)))


def padding_id(tokenizer: Any) -> int:
    """The padding token, or another one where there is none: padded positions are masked anyway."""
    return next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
