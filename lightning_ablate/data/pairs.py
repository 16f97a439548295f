"""Pairs of a clean and a corrupt text, between two answers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from lightning_ablate.data.base import Purpose
from lightning_ablate.data.labelled import TextRows
from lightning_ablate.data.rows import MadeRows
from lightning_ablate.errors import DataError
from lightning_ablate.seeds import seed_of


@dataclass(kw_only=True, eq=False, repr=False)
class PairedTexts(TextRows):
    """Pairs of a clean and a corrupt text of equal length, with an answer and a foil of one token each.

    The columns are ``clean``, ``corrupt``, ``answer`` and ``foil``. The answer should follow the clean text, and the
    foil the corrupt one. PairedLM says what is scored.

    Args:
        spans: columns that hold a part of the clean text, such as the name of its subject. Batches get a boolean entry
            of this name ``(batch, seq)``, True at the tokens of its last occurrence, see ``--ablation.positions``.
        reverse: reads the corrupt texts, whose partners are the clean ones (denoising), instead of the clean ones.
        max_length: tokens to which texts are padded; longer ones are refused.
    """

    spans: Sequence[str] = ()
    reverse: bool = False
    max_length: int = 32

    passes_blanks = False  # a pair that lacks something is a mistake
    facts = (*TextRows.facts, "reverse", "spans")

    def __post_init__(self) -> None:
        """Gives the direction to the name."""
        super().__post_init__()
        self.name += " reversed" if self.reverse else ""

    @property
    def columns(self) -> Sequence[str]:
        """The texts, the words, and the spans."""
        return ("clean", "corrupt", "answer", "foil", *self.spans)

    def example(self, row: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
        """The tokens of both texts, the second as ``partner_...``, the ``last`` position, ``answer`` and ``foil``."""

        def refused(why: str) -> DataError:
            return DataError(f"{self.name}, the row {row['clean']!r:.70}: {why}")

        texts = [self.tokens(tokenizer, self.text(row, name), truncation=False) for name in ("clean", "corrupt")]
        clean, corrupt = (len(one["input_ids"]) for one in texts)
        if clean != corrupt or not 0 < clean <= self.max_length:
            raise refused(
                f"clean has {clean} tokens and corrupt {corrupt}, expected as many, from 1 to {self.max_length} "
                "(--data.max_length)"
            )
        words: dict[str, int] = {}
        for name in ("answer", "foil"):
            ids = tokenizer(self.text(row, name), add_special_tokens=False)["input_ids"]
            if len(ids) != 1:
                raise refused(
                    f"{name} {row[name]!r} is {len(ids)} tokens, expected 1 (a space in front belongs to most)"
                )
            words[name] = ids[0]
        if words["answer"] == words["foil"]:
            raise refused("answer and foil are the same token")
        spans = {name: self._at(row, name, tokenizer) for name in self.spans}
        if lost := [name for name, places in spans.items() if not any(places)]:
            raise refused(f"{lost[0]} {row[lost[0]]!r} isn't a part of the clean text (--data.spans)")
        read, partner = reversed(texts) if self.reverse else texts
        other = {f"partner_{name}": ids for name, ids in partner.items()}
        return {**read, **other, **spans, "last": clean - 1, **words}

    def _at(self, row: Mapping[str, Any], name: str, tokenizer: Any) -> list[bool]:
        """Which tokens of the clean text a span touches."""
        text, part = self.text(row, "clean"), self.text(row, name).strip()
        start = text.rfind(part)
        offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        # a token may begin with the space in front of its word
        return [start >= 0 and first < start + len(part) and last > start for first, last in offsets]


@dataclass(kw_only=True, eq=False, repr=False)
class IndirectObjects(MadeRows, PairedTexts):
    """Sentences whose last word is the indirect object (the task of Wang et al. 2023), made up for a tokenizer.

    "When Mary and John went to the store, John gave a drink to" is answered by " Mary"; where the second sentence is
    Mary's, by " John". Which name comes first alternates. Names and objects are single tokens of the tokenizer, which
    must have at least eight of our names and three of our objects. ``spans`` may name the columns ``subject`` (who
    gives, where that is said again), ``object`` (who gets) and ``thing``.

    Args:
        seed: of the draws.
    """

    name: str = field(default="indirect-objects", init=False)
    seed: int = 0

    def rows(self, purpose: Purpose) -> list[dict[str, str]]:
        """Twice as many sentences as both purposes need, as some may be drawn again."""
        return list(
            islice(
                sentences(self.load_tokenizer(), self.seed), 2 * (self.calibration_examples + self.evaluation_examples)
            )
        )


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
        spans = {"subject": other, "object": one, "thing": words[2]}
        yield {"clean": clean, "corrupt": corrupt, "answer": f" {one}", "foil": f" {other}", **spans}
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
