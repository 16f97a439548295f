"""What a run has done so far; kept in its folder while unfinished, so that the same command goes on from there."""

import io
import json
import os
import shutil
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_ablate.calibration import Calibration, check_target
from lightning_ablate.errors import ConfigError, StatisticsError, loading
from lightning_ablate.results.folder import write_whole

try:
    import fcntl
except ImportError:  # Windows, where two runs in one folder aren't told
    fcntl = None  # type: ignore[assignment]

FOLDER, RUN, LOCK = "unfinished", "run.json", "lock"


class Progress(NamedTuple):
    """What a run has done."""

    epochs: int = 0  # of calibration and learning
    batches: int = 0  # of the sweep, which comes behind them

    def __str__(self) -> str:
        """What is done, in words."""
        swept = f" and {self.batches} batches of the sweep" if self.batches else ""
        return f"of which {self.epochs} epochs of calibration and learning{swept} are done"


@dataclass
class Run:
    """What a run has found out, and how far it has come."""

    target: str  # its fingerprint
    calibration: Calibration
    # by method that learned, nats on the examples that were held out, with the means and with the learned values
    held_out: dict[str, tuple[float, float] | None] = field(default_factory=dict)
    measured: list[list[Any]] = field(default_factory=list)  # of units alone, see attribution.table_of
    partial: list[str] = field(default_factory=list)  # why it doesn't cover all its data
    progress: Progress = field(default_factory=Progress)
    began: float = field(default_factory=time.monotonic)

    def state_dict(self) -> dict[str, Any]:
        """All but the progress, as tensors on the CPU and plain values."""
        about: dict[str, Any] = {"target": self.target, "held_out": dict(self.held_out), "partial": list(self.partial)}
        about["measured"] = [list(row) for row in self.measured]
        return {**about, "calibration": self.calibration.state_dict()}

    def facts(self, classes: int) -> dict[str, Any]:
        """What run.json says of it, and of the number of classes."""
        sites = [asdict(site) for site in self.calibration.sites]
        seconds = round(time.monotonic() - self.began, 1)
        about = {"held_out": self.held_out, "sites": sites, "partial": list(self.partial)}
        about["ridges"] = self.calibration.ridges
        return {**about, "classes": classes, "seconds": seconds}

    def load_state_dict(self, state: Mapping[str, Any], target: nn.Module, **options: Any) -> None:
        """Takes it from a :meth:`state_dict`, see :func:`check_target` and :meth:`Calibration.from_state_dict`."""
        check_target(state, self.target)
        with loading("the checkpoint", StatisticsError):
            self.calibration = Calibration.from_state_dict(state["calibration"], target, **options)
            self.held_out = {str(name): found for name, found in dict(state["held_out"]).items()}
            self.partial = list(map(str, state["partial"]))
            self.measured = [list(row) for row in state.get("measured", ())]


class Unfinished:
    """The progress of one process of a run, in files.

    Every process writes its own file, whole or not at all, and keeps the last two, since one of them may be ahead of
    the others when the run dies. What is gone on from is the last progress that all of them know. From one save in the
    sweep to the next it is ``every`` seconds; 0 saves behind every batch.
    """

    def __init__(self, folder: Path, rank: int, processes: int, every: float) -> None:
        self.folder = folder / FOLDER
        self._rank, self._processes, self._every, self._last = rank, processes, every, time.monotonic()
        self._run: dict[str, Any] | None = None
        self.release: Callable[[], Any] = lambda: None

    def claim(self, run: Mapping[str, Any], broadcast: Callable[[Any], Any]) -> Progress:
        """Takes the folder for a run, on all processes; how far an earlier one has come in it.

        ``run`` is what two runs must have in common for one to go on with the other, or ConfigError.
        """
        problem, progress = "", Progress()
        if self._rank == 0:
            self._run = json.loads(json.dumps(run, default=str))
            problem = self._locked() or self._other(self._run)
            stale = [] if problem or is_unfinished(self.folder.parent) else self.folder.glob("*.pt")
            for path in stale:  # which another run's processes left before it was told for which run they are
                path.unlink()
            known = [{_progress(path) for path in self.folder.glob(f"*.{rank}.pt")} for rank in range(self._processes)]
            progress = max(set.intersection(*known), default=progress)
        problem, progress = broadcast((problem, progress))
        if problem:
            raise ConfigError(problem)
        return progress

    def read(self, progress: Progress) -> dict[str, Any]:
        """What this process saved at that progress; StatisticsError if the file is damaged."""
        path = self._path(progress)
        with loading(str(path), StatisticsError):
            return torch.load(path, map_location="cpu", weights_only=True)

    @property
    def due(self) -> bool:
        """Whether it is time for the next save."""
        return time.monotonic() - self._last >= self._every

    def save(self, progress: Progress, state: Mapping[str, Any]) -> None:
        """Saves the state of this process at a progress; the one that claimed the folder says first for which run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._run is not None:
            write_whole(self.folder / RUN, json.dumps(self._run, indent=2) + "\n")
            self._run = None
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        write_whole(self._path(progress), buffer.getvalue())
        for path in sorted(self.folder.glob(f"*.{self._rank}.pt"), key=_progress)[:-2]:
            path.unlink()
        self._last = time.monotonic()

    def close(self) -> None:
        """Forgets the run, which has ended."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.release()

    def leave(self) -> bool:
        """Unlocks the folder of a run that ends before its time; whether there is something to go on from."""
        self.release()
        return is_unfinished(self.folder.parent)

    def _locked(self) -> str:
        """Locks the folder against other runs, until this one ends in any way; what is said if it can't."""
        parent = self.folder.parent
        made = not parent.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            return f"can't write into the folder {str(parent)!r}: {error.strerror} (--ablation.dirpath)"
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return f"a run is going on in {parent}; wait for it, or name another folder (--ablation.dirpath)"
        except OSError:  # a file system that knows no locks
            pass
        self.release = weakref.finalize(self, _let_go, lock, self.folder, made, os.getpid())
        return ""

    def _other(self, run: Mapping[str, Any]) -> str:
        """What tells an unfinished run in the folder from this one; empty if nothing does."""
        if not is_unfinished(self.folder.parent):
            return ""
        path = self.folder / RUN
        with loading(str(path), ConfigError):
            found = json.loads(path.read_text(encoding="utf-8"))
        if found == run:
            return ""
        name, here, there = _difference(run, found)
        return (
            f"{self.folder.parent} holds an unfinished run of another configuration: {name} is {here!s:.60} here, was "
            f"{there!s:.60} there; name another folder (--ablation.dirpath), or delete {self.folder}"
        )

    def _path(self, progress: Progress) -> Path:
        return self.folder / f"{progress.epochs}.{progress.batches}.{self._rank}.pt"


def _let_go(lock: int, folder: Path, made: bool, process: int) -> None:
    """Unlocks a folder, and removes what this run made if there is nothing in it; not in a process forked from it."""
    if os.getpid() == process:
        if not (folder / RUN).exists():
            shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # it holds something
            if made:
                folder.parent.rmdir()
        if fcntl is not None:  # last, so that no other run's files are removed
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_UN)  # which a worker that was forked holds as well
        os.close(lock)


def is_unfinished(folder: Path) -> bool:
    """Whether a folder holds a run that died."""
    return (folder / FOLDER / RUN).exists()


def _difference(here: Any, there: Any) -> tuple[str, Any, Any]:
    """The first place in which two values differ, by the names on the way, and what stands there in each."""
    names = []
    while isinstance(here, dict) and isinstance(there, dict):
        names.append(next(key for key in [*here, *there] if here.get(key) != there.get(key)))
        here, there = here.get(names[-1]), there.get(names[-1])
    return ".".join(names), here, there


def _progress(path: Path) -> Progress:
    epochs, batches, *_ = path.name.split(".")
    return Progress(int(epochs), int(batches))
