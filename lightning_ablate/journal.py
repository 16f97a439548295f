"""What an unfinished run has done so far, kept in its folder, so that the same command goes on from there."""

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightning_ablate.errors import ConfigError, StatisticsError, loading
from lightning_ablate.files import load, save, write_whole

FOLDER, PLAN = "unfinished", "plan.json"
SWEEP = 1_000_000  # the part that comes after all calibration epochs


class Place(NamedTuple):
    """How far a run has come: the calibration epoch, or :data:`SWEEP`, and the batches of it that are done."""

    part: int
    batches: int


class Journal:
    """The progress of one process of a run.

    Every process writes its own file, whole or not at all, and keeps the last two, since one of them may be ahead of
    the others when the run dies. What is gone on from is the last place that all of them know.

    Args:
        folder: of the run.
        rank: of this process.
        processes: how many there are.
        every: seconds from one note to the next; 0 notes every batch.
    """

    def __init__(self, folder: Path, rank: int, processes: int, every: float) -> None:
        self.folder = folder / FOLDER
        self._rank, self._processes, self._every, self._last = rank, processes, every, time.monotonic()
        self._plan: dict[str, Any] | None = None

    def check(self, plan: Mapping[str, Any]) -> str:
        """Takes the folder for this run; what is wrong if it holds an unfinished one of another plan, or nothing."""
        self._plan = json.loads(json.dumps(plan, default=str))
        if not is_unfinished(self.folder.parent):
            return ""
        path = self.folder / PLAN
        with loading(str(path), ConfigError):
            found = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name in dict.fromkeys([*found, *self._plan]) if found.get(name) != self._plan.get(name)]
        if not other:
            return ""
        name = other[0]
        return (
            f"{self.folder.parent} holds an unfinished run of another configuration: {name} is {self._plan.get(name)} "
            f"here, was {found.get(name)} there ({len(other)} differences); name another folder (--ablation.folder), "
            f"or delete {self.folder}"
        )

    def latest(self) -> Place | None:
        """The last place that every process noted."""
        known = [{_place(path) for path in self.folder.glob(f"*.{rank}.pt")} for rank in range(self._processes)]
        return max(set.intersection(*known), default=None)

    def read(self, place: Place) -> dict[str, Any]:
        """What this process noted at a place.

        Raises:
            StatisticsError: if the file is damaged.
        """
        return load(self._path(place), StatisticsError)

    @property
    def due(self) -> bool:
        """Whether it is time for the next note."""
        return time.monotonic() - self._last >= self._every

    def note(self, place: Place, state: Mapping[str, Any]) -> None:
        """Notes the state of this process at a place; that which checked the plan notes it first."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._plan is not None:
            write_whole(self.folder / PLAN, json.dumps(self._plan, indent=2) + "\n")
            self._plan = None
        save(dict(state), self._path(place))
        for path in sorted(self.folder.glob(f"*.{self._rank}.pt"), key=_place)[:-2]:
            path.unlink()
        self._last = time.monotonic()

    def close(self) -> None:
        """Forgets the run, which has ended."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, place: Place) -> Path:
        return self.folder / f"{place.part}.{place.batches}.{self._rank}.pt"


def is_unfinished(folder: Path) -> bool:
    """Whether a folder holds a run that died."""
    return (folder / FOLDER / PLAN).exists()


def _place(path: Path) -> Place:
    part, batches, *_ = path.name.split(".")
    return Place(int(part), int(batches))
