"""Evidence: where single units matter, what they promote, and the same as coloured text."""

import hashlib
from collections.abc import Iterable
from difflib import get_close_matches
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lightning_ablate.errors import ConfigError, DataError, loading
from lightning_ablate.files import write_whole

FILES = ("evidence", "promoted", "contexts", "attention", "reads")  # .parquet, in the folder of a run
HARM, HELP = (213, 94, 0), (0, 114, 178)  # colours of a loss that rises and falls, which colour-blind people can tell
_AROUND = 24  # tokens on either side of a context
_COLUMNS = {
    "evidence": "unit method example position place target text clean change activation",
    "promoted": "unit method class text change",
    "contexts": "example label tokens picture",
    "attention": "unit example position weights",
    "reads": "unit previous first itself induction",
}


class Evidence:
    """What ablating single units does at every scored position of some examples.

    Args:
        evidence: one row per unit, method and scored position. ``unit`` is named as in results (``PATH head 0``, ``PATH
            neuron 5``, a layer's path). ``position`` is the place whose activations predict the target, ``place`` that
            of the token asked for, both in the example's tokens; -1 where there is none. ``target`` is the class
            asked for and ``text`` its text. ``clean`` is the cross-entropy of the intact target and ``change`` what
            ablation adds, float64 nats; ``change_NAME`` is the same of a metric of one's own. ``activation``, float32,
            is the neuron's value, or the norm of the head's deviation from its mean.
        promoted: the classes whose probability changes most. ``change`` is the mean over the positions of the clean
            log-probability minus the ablated one, nats: above 0 for a class that the unit promotes.
        contexts: one row per example: its ``tokens`` (list of str, None at padding), or its ``picture`` (bytes of a
            PNG file) and ``label``.
        attention: what heads read at the positions where they matter most: ``weights`` (list of float), one for each
            token. Empty where attention can't be seen.
        reads: of each head its mean attention to the ``previous`` token, the ``first`` one and ``itself``, and to the
            token after an earlier occurrence (``induction``, on repeated random tokens); 0 to 1, NaN if unknown.

    Raises:
        DataError: if a column is missing.
    """

    def __init__(
        self,
        evidence: pd.DataFrame,
        promoted: pd.DataFrame,
        contexts: pd.DataFrame,
        attention: pd.DataFrame | None = None,
        reads: pd.DataFrame | None = None,
    ) -> None:
        given = (evidence, promoted, contexts, attention, reads)
        self.tables: dict[str, pd.DataFrame] = {}
        for name, table in zip(FILES, given, strict=True):
            known = _COLUMNS[name].split()
            self.tables[name] = pd.DataFrame(columns=known) if table is None else table.reset_index(drop=True)
            if lost := [column for column in known if column not in self.tables[name]]:
                raise DataError(f"{name}.parquet lacks the columns {', '.join(lost)}")
        self.tables["contexts"] = self.tables["contexts"].set_index("example", drop=False)

    def __getattr__(self, name: str) -> pd.DataFrame:
        """The table of that name, see the arguments."""
        if name not in FILES:
            raise AttributeError(name)
        return self.tables[name]

    @property
    def units(self) -> list[str]:
        """The units, the largest mean change first."""
        return self.evidence["unit"].unique().tolist()

    @property
    def methods(self) -> list[str]:
        """The methods by which they were ablated."""
        return self.evidence["method"].unique().tolist()

    def of(self, unit: str) -> "UnitEvidence":
        """That of one unit; ConfigError if there is none."""
        if unit not in self.units:
            meant = get_close_matches(unit, self.units, 1, 0.0)
            raise ConfigError(f"there is no evidence of {unit!r}, did you mean {meant[0]!r}? (--ablation.explain)")
        return UnitEvidence(self, unit)

    def lines(self) -> str:
        """A line for each unit: what it adds under each method, and where most."""
        found = [f"explained on {self.evidence['example'].nunique()} examples: added nats, and where most"]
        for unit in self.units:
            told = []
            for method, own in self.of(unit).table.groupby("method", sort=False, observed=True):
                most = own.loc[own["change"].idxmax()]
                told.append(f"{method} {own['change'].mean():+.4f}, at {most['text']!r} {most['change']:+.2f}")
            found.append(f"  {unit}: {'; '.join(told)}")
        return "\n".join(found)

    def sha256(self) -> str:
        """A digest of the evidence, by which a run knows its own."""
        numbers = self.evidence[["example", "position", "target", "clean", "change"]].to_numpy(dtype=np.float64)
        names = " ".join([*self.units, *self.methods])
        return hashlib.sha256(names.encode() + np.ascontiguousarray(numbers).tobytes()).hexdigest()

    def save(self, folder: Path) -> list[Path]:
        """Writes a file of each table that holds something; returns their paths."""
        paths = []
        for name, table in self.tables.items():
            path = folder / f"{name}.parquet"
            path.unlink(missing_ok=True)
            if len(table):
                write_whole(path, table.to_parquet(index=False, compression="zstd"))
                paths.append(path)
        return paths

    @classmethod
    def load(cls, folder: Path) -> "Evidence | None":
        """What :meth:`save` wrote; None if the folder holds no evidence, DataError if it can't be read."""
        paths = [folder / f"{name}.parquet" for name in FILES]
        if not paths[0].is_file():
            return None
        with loading(str(folder), DataError):
            return cls(*(pd.read_parquet(path) if path.is_file() else None for path in paths))


class UnitEvidence:
    """The evidence of one unit."""

    def __init__(self, evidence: Evidence, unit: str) -> None:
        self._all, self.unit = evidence, unit
        self.table = evidence.evidence[evidence.evidence["unit"] == unit]

    def contexts(self, count: int = 10, method: str | None = None) -> "Contexts":
        """The positions where ablating the unit by a method (by default the first) costs most, as coloured text."""
        own = self._of(self.table, method)
        shown = own.nlargest(count, "change")
        texts = [self.around(row, own) for row in shown.to_dict("records")]
        columns = ["example", "position", "text", "clean", "change", "activation"]
        frame = shown[columns].assign(context=["".join(text for text, _ in one) for one in texts])
        found = Contexts(frame.reset_index(drop=True))
        found.attrs["html"] = [coloured(one) for one in texts]
        return found

    def promoted(self, count: int = 10, method: str | None = None) -> pd.DataFrame:
        """The classes that the unit promotes (``change`` above 0) and those it holds down, ``count`` of each."""
        own = self._of(self._all.promoted, method).sort_values("change", ascending=False)
        kept = pd.concat([own[own["change"] > 0].head(count), own[own["change"] < 0].tail(count)])
        return kept.drop(columns=["unit", "method"]).reset_index(drop=True)

    def around(self, row: Any, own: pd.DataFrame) -> list[tuple[str, float]]:
        """The tokens around a row's position, each with its change in ``own`` (NaN where it isn't scored)."""
        tokens = self._all.contexts.at[row["example"], "tokens"]
        if tokens is None or not len(tokens):
            return [(row["text"], row["change"])]
        here = own[own["example"] == row["example"]]
        changes = dict(zip(here["place"], here["change"], strict=True))
        place, last_piece = row["place"], (row["text"], row["change"])
        if place < 0:  # the example as a whole
            return [*((text, np.nan) for text in tokens if text is not None), (f" → {row['text']}", row["change"])]
        first, last = max(0, place - _AROUND), min(len(tokens), place + _AROUND + 1)
        pieces = [(tokens[i], changes.get(i, np.nan)) for i in range(first, last) if tokens[i] is not None]
        return pieces if place < len(tokens) and tokens[place] is not None else [*pieces, last_piece]

    def _of(self, table: pd.DataFrame, method: str | None) -> pd.DataFrame:
        method = self._all.methods[0] if method is None else method
        if method not in self._all.methods:
            raise ConfigError(f"there is no evidence under {method!r}; expected one of {', '.join(self._all.methods)}")
        return table[(table["unit"] == self.unit) & (table["method"] == method)]

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.unit)}</p>{self.contexts()._repr_html_()}{self.promoted().to_html(index=False)}"


class Contexts(pd.DataFrame):  # type: ignore[misc]
    """Contexts as a DataFrame, which a notebook shows as coloured text."""

    def _repr_html_(self) -> str:
        rows = zip(self["change"], self["clean"], self.attrs.get("html", self["context"].map(escape)), strict=False)
        cells = "".join(
            f"<tr><td>{change:+.3f}</td><td>{clean:.3f}</td><td>{html}</td></tr>" for change, clean, html in rows
        )
        return f"<table><tr><th>added nats</th><th>intact</th><th>text</th></tr>{cells}</table>"


def coloured(pieces: Iterable[tuple[str, float]], largest: float | None = None) -> str:
    """Text as HTML: a token is orange where ablation adds to the loss, blue where it lowers it; hover shows nats.

    ``largest`` is the change, in nats, of the full colour; None takes the largest of the text.
    """
    pieces = list(pieces)
    known = [abs(change) for _, change in pieces if not np.isnan(change)]
    largest = largest or max(known, default=0) or 1.0
    spans = []
    for text, change in pieces:
        shown = escape(text.replace("\n", "↵\n").replace("\t", "⇥\t"))
        if np.isnan(change):
            spans.append(f"<span>{shown}</span>")
            continue
        red, green, blue = HARM if change > 0 else HELP
        style = f"background:rgba({red},{green},{blue},{min(1.0, abs(change) / largest) * 0.85:.2f})"
        style += "" if text else ";padding-left:3px"  # a part of a character, which the next token completes
        spans.append(f'<span style="{style}" title="{change:+.3f} nats">{shown}</span>')
    return f'<span dir="auto" style="white-space:pre-wrap">{"".join(spans)}</span>'
