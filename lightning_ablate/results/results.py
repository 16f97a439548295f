"""Results: the scores of a sweep with their figures, their texts and the files they are kept in."""

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Self

from matplotlib.figure import Figure

from lightning_ablate.errors import ConfigError, DataError, loading
from lightning_ablate.files import write_whole
from lightning_ablate.results import byexample, figures, frames, text
from lightning_ablate.results.evidence import Evidence, UnitEvidence
from lightning_ablate.results.table import Scores


class Results(Scores):
    """The scores of a sweep, which can be shown, saved and loaded; see :class:`Scores` for arguments and tables.

    ``gathered`` is the :class:`~lightning_ablate.results.evidence.Evidence` of single units, on the first data set;
    None if none was asked for.
    """

    gathered: Evidence | None = None

    def evidence(self, unit: str) -> UnitEvidence:
        """What ablating one unit does token by token, such as ``blocks.0.attn.proj head 2``; ConfigError if unknown."""
        if self.gathered is None:
            raise ConfigError(
                "the run gathered no evidence; ask for that of the 12 largest units: --ablation.explain 12"
            )
        return self.gathered.of(unit)

    def on(self, data: str) -> Self:
        """The results on one data set, see :meth:`Scores.on`; evidence goes with the first."""
        found = super().on(data)
        if found.data[0] == self.data[0]:
            found.gathered = self.gathered
        return found

    def plot(self, metric: str = "cross_entropy") -> Figure:
        """A figure of curves by the share ablated, with a column for each data set.

        If single sites, layers or heads were ablated, it shows instead what each changes of the ``metric``, on the
        first data set.
        """
        return figures.importance(self.each[0], metric) if self.parts else figures.degradation(*self.each)

    @property
    def figure_name(self) -> str:
        """The name of the file of :meth:`plot`, without its ending."""
        return "importance" if self.parts else "degradation"

    def pictures(self) -> dict[str, Callable[[], Figure]]:
        """All figures that are saved: a file's name without its ending → a function that draws the figure.

        Without methods there are none.
        """
        made: dict[str, Callable[[], Figure]] = {self.figure_name: self.plot} if self.methods else {}
        for index, one in enumerate(self.each):
            if self.parts:
                name = self.suffixed(self.figure_name, index)
                made |= {name: one.plot, **{f"{name}_{metric}": partial(one.plot, metric) for metric in self.own}}
            elif one.known[0] is not None and len(one.methods) > 1:
                made[self.suffixed("comparisons", index)] = partial(figures.differences, one)
        return made

    def suffixed(self, name: str, index: int) -> str:
        """The name, followed by the label of the data set with that index, except for the first."""
        return f"{name}_{re.sub(r'[^A-Za-z0-9.-]+', '_', self.labels[index])}" if index else name

    def save(self, folder: Path | str, forms: Sequence[str] = ("png",)) -> list[Path]:
        """Writes results.csv, run.json, examples.parquet and the figures; returns their paths.

        The ``forms`` of figures are ``png``, ``pdf`` and ``svg``. A file is written whole or not at all.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / name for name in ("results.csv", "run.json", "examples.parquet")]
        write_whole(paths[0], self.table.to_csv(index=False, lineterminator="\n"))
        write_whole(paths[1], json.dumps(self.facts, indent=2, default=str) + "\n")
        if not any(self.known):
            paths.pop().unlink(missing_ok=True)  # left by another run
        else:
            write_whole(paths[2], partial(byexample.write, self.pieces()))
        if self.gathered is not None:
            paths += self.gathered.save(folder)
        return paths + figures.write(folder, self.pictures(), forms)

    @classmethod
    def load(cls, folder: Path | str) -> "Results":
        """The results that :meth:`save` wrote, bit for bit; DataError if the folder holds none, or other files."""
        paths = [Path(folder) / name for name in ("results.csv", "run.json", "examples.parquet")]
        table = frames.read(paths[0], frames.TABLE)
        with loading(str(paths[1]), DataError):
            facts = dict(json.loads(paths[1].read_text(encoding="utf-8")))
        conditions = table.groupby("data", sort=False).size().tolist()
        try:
            found = cls(table, None, facts)
            if paths[2].is_file():
                found.known = byexample.read(paths[2], conditions)
        except DataError as error:
            raise DataError(f"could not load {str(folder)!r}: {error}") from error
        if "evidence" in facts:
            found.gathered = Evidence.load(Path(folder))
            if found.gathered is None or found.gathered.sha256() != facts["evidence"]:
                raise DataError(f"evidence.parquet in {str(folder)!r} is missing, or of another run; run it again")
        return found

    def __str__(self) -> str:
        """The tables that the terminal shows."""
        return text.tables(self)

    def __repr__(self) -> str:
        """One line."""
        return f"Results({text.title(self)}: {', '.join(self.methods)}; {len(self.table)} conditions)"

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>\n{self.summary().to_html(index=False)}"
