"""Pairs of a clean and a corrupt text, between two answers."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lightning_ablate.data.base import Purpose
from lightning_ablate.data.labelled import TextRows
from lightning_ablate.data.text import tokenizer_of
from lightning_ablate.errors import DataError
from lightning_ablate.seeds import seed_of


class PairedTexts(TextRows):
    """Pairs of texts with as many tokens, the answer to the clean one, and a foil, each a single token.

    A source has the columns ``clean``, ``corrupt``, ``answer`` and ``foil``; the next token of the clean text should be
    the answer, of the corrupt one the foil. See :class:`~lightning_ablate.modules.PairedLM` for what is scored.

    Args:
        name: a hub name, a local folder, or files or a glob of parquet, json, jsonl, csv or txt.
        reverse: reads the corrupt texts, whose partners are the clean ones (denoising), instead of the clean ones.
        max_length: tokens to which texts are padded; longer ones are refused.
        options: see :class:`TextRows`.
    """

    passes_blanks = False  # a pair that lacks something is a mistake

    def __init__(self, name: str, *, reverse: bool = False, max_length: int = 32, **options: Any) -> None:
        super().__init__(name, ["clean", "corrupt", "answer", "foil"], max_length=max_length, **options)
        self.reverse = reverse
        self.name += " reversed" if reverse else ""

    def example(self, row: dict[str, Any], tokenizer: Any) -> dict[str, Tensor]:
        """What a target takes of both texts, each ``(length,)``, and ``last``, ``answer``, ``foil`` ``()``, int64."""
        read, partner = (self.tokens(tokenizer, self.text(row, name)) for name in ("clean", "corrupt"))
        lengths = [len(tokenizer(row[name])["input_ids"]) for name in ("clean", "corrupt")]
        if lengths[0] != lengths[1] or not 0 < lengths[0] <= self.max_length:
            raise DataError(
                f"{self.name}, the row {row['clean']!r:.70}: clean has {lengths[0]} tokens and corrupt {lengths[1]}, "
                f"expected as many, from 1 to {self.max_length} (--data.max_length)"
            )
        words = {}
        for name in ("answer", "foil"):
            ids = tokenizer(self.text(row, name), add_special_tokens=False)["input_ids"]
            if len(ids) != 1:
                raise DataError(
                    f"{self.name}, the row {row['clean']!r:.70}: {name} {row[name]!r} is {len(ids)} tokens, expected 1 "
                    "(a space in front belongs to most)"
                )
            words[name] = torch.tensor(ids[0])
        if words["answer"] == words["foil"]:
            raise DataError(f"{self.name}, the row {row['clean']!r:.70}: answer and foil are the same token")
        read, partner = (partner, read) if self.reverse else (read, partner)
        last = read["attention_mask"].nonzero().max()
        return {**read, **{f"partner_{name}": value for name, value in partner.items()}, "last": last, **words}

    def describe(self) -> dict[str, Any]:
        """Adds the direction."""
        return super().describe() | {"reverse": self.reverse}


class IndirectObjects(PairedTexts):
    """Sentences whose last word is the indirect object (the task of Wang et al. 2023), made up for a tokenizer.

    "When Mary and John went to the store, John gave a drink to" is answered by " Mary"; where the second sentence is
    Mary's, by " John". Which name comes first alternates; names and objects are single tokens of the tokenizer, of
    which it needs at least eight names and three objects, or DataError.

    Args:
        seed: of the draws.
        options: see :class:`PairedTexts`.
    """

    def __init__(self, *, seed: int = 0, **options: Any) -> None:
        super().__init__("indirect-objects", shuffle_seed=None, **options)
        self.seed = seed

    def source(self, purpose: Purpose) -> list[dict[str, str]]:
        """As many sentences as both purposes need."""
        tokenizer = tokenizer_of(self, self.tokenizer_name)
        count = 2 * sum(self.budgets.values())  # some may be drawn twice
        return list(islice(sentences(tokenizer, self.seed), count))

    def download(self, purposes: Sequence[Purpose]) -> None:
        """Nothing."""


def sentences(tokenizer: Any, seed: int) -> Iterator[dict[str, str]]:
    """Rows of clean, corrupt, answer and foil without end; DataError if the tokenizer cuts most names."""
    names, objects = (_single(tokenizer, words) for words in (_NAMES, _OBJECTS))
    if len(names) < 8 or len(objects) < 3:
        raise DataError(
            f"the tokenizer has {len(names)} of our names and {len(objects)} of our objects as single tokens, expected "
            "at least 8 and 3; bring pairs of your own (PairedTexts)"
        )
    generator, number = torch.Generator().manual_seed(seed_of("indirect objects", seed)), 0
    while True:
        one, other = (names[i] for i in torch.randperm(len(names), generator=generator)[:2].tolist())
        words = [pool[int(torch.randint(len(pool), (), generator=generator))] for pool in (_FRAMES, _PLACES, objects)]
        first, second = (one, other) if number % 2 else (other, one)  # ABBA and BABA
        clean, corrupt = (
            words[0].format(first=first, second=second, place=words[1], giver=giver, thing=words[2])
            for giver in (other, one)
        )
        yield {"clean": clean, "corrupt": corrupt, "answer": f" {one}", "foil": f" {other}"}
        number += 1


def _single(tokenizer: Any, words: str) -> list[str]:
    return [word for word in words.split() if len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1]


_NAMES = (
    "Mary John Anna Paul Emma Mark Sarah David Laura Peter Alice James Kate Simon Lisa Daniel Jane Robert Helen Thomas "
    "Susan Michael Julia Kevin Maria Brian Rachel Eric Linda Adam Amy Jack Ruth Frank Rose Henry Grace George"
)
_OBJECTS = "drink book ring ball letter key gift map card cake phone box hat pen bag"
_PLACES = ("store", "park", "school", "station", "office", "garden", "museum", "market")
_FRAMES = (
    "When {first} and {second} went to the {place}, {giver} gave a {thing} to",
    "After {first} and {second} met at the {place}, {giver} handed a {thing} to",
    "While {first} and {second} were at the {place}, {giver} offered a {thing} to",
)
