"""What a run has done so far; kept in its folder while unfinished, so that the same command goes on from there."""

import errno
import io
import json
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lightning_ablate.calibration import Calibration, check_target
from lightning_ablate.errors import ConfigError, StatisticsError, loading
from lightning_ablate.results.folder import write_whole
from lightning_ablate.sites import Site
from lightning_ablate.statistics import Covariance

FOLDER, SAVED = "unfinished", "progress.pt"


@dataclass
class Run:
    """What a run has found out, and how far it has come."""

    target: str  # its fingerprint
    calibration: Calibration
    epochs: int = 0  # of calibration and learning, which are done
    # by method that learned, nats on the examples that were held out, with what it began with and with what it learned
    held_out: dict[str, tuple[float, float] | None] = field(default_factory=dict)
    measured: list[list[Any]] = field(default_factory=list)  # of units alone, see attribution.table_of
    partial: list[str] = field(default_factory=list)  # why it doesn't cover all its data
    notes: list[str] = field(default_factory=list)  # what else limits what it found
    ridges: dict[str, dict[str, float]] = field(
        default_factory=dict
    )  # by condition and site, of what was fitted for it
    began: float = field(default_factory=time.monotonic)

    def state_dict(self) -> dict[str, Any]:
        """All of it, as tensors on the CPU and plain values."""
        about: dict[str, Any] = {"target": self.target, "epochs": self.epochs, "held_out": dict(self.held_out)}
        about |= {"partial": list(self.partial), "measured": [list(row) for row in self.measured]}
        about |= {"notes": list(self.notes), "ridges": dict(self.ridges)}
        return {**about, "calibration": self.calibration.state_dict()}

    def check_positions(self, site: Site, statistic: Covariance) -> None:
        """Notes, and warns, that a site has more neurons than there were positions to regress them on."""
        count, width = int(statistic.count), site.width // statistic.blocks
        note = f"calibrated on {count:,} positions, fewer than the {width:,} neurons that conditional methods regress"
        if count < width and note not in self.notes:
            self.notes.append(note)
            rank_zero_warn(f"{note}: they rest on their ridge; calibrate on more data (--data.calibration_...)")

    def facts(self, classes: int) -> dict[str, Any]:
        """What run.json says of it, and of the number of classes."""
        sites = [asdict(site) for site in self.calibration.sites]
        seconds = round(time.monotonic() - self.began, 1)
        about = {"held_out": self.held_out, "sites": sites, "partial": list(self.partial)}
        about |= {"notes": list(self.notes), "ridges": self.calibration.ridges | self.ridges}
        return {**about, "classes": classes, "seconds": seconds}

    def load_state_dict(self, state: Mapping[str, Any], target: nn.Module, **options: Any) -> None:
        """Takes it from a :meth:`state_dict`, see :func:`check_target` and :meth:`Calibration.from_state_dict`."""
        check_target(state, self.target)
        with loading("the checkpoint", StatisticsError):
            self.calibration = Calibration.from_state_dict(state["calibration"], target, **options)
            self.epochs = int(state.get("epochs", 0))
            self.held_out = {str(name): found for name, found in dict(state["held_out"]).items()}
            self.partial, self.notes = list(map(str, state["partial"])), list(map(str, state["notes"]))
            self.ridges = dict(state["ridges"])
            self.measured = [list(row) for row in state.get("measured", ())]


class Unfinished:
    """The progress of a run, in one file that its first process writes and reads, whole or not at all.

    From one save in the sweep to the next it is ``every`` seconds; 0 saves behind every batch.
    """

    def __init__(self, folder: Path, first: bool, every: float) -> None:
        self.folder, self._first, self._every, self._last = folder / FOLDER, first, every, time.monotonic()
        self._saved, self._made = self.folder / SAVED, not folder.exists()
        self._lock: FileLock | None = None  # held while the run goes on

    def claim(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """Takes the folder for a run, on the first process; what an earlier one saved there, empty if nothing.

        ``run`` is what two runs must have in common for one to go on with the other.

        Raises:
            ConfigError: if the run there is another one, or is going on.
            StatisticsError: if the file is damaged.
        """
        self._run = json.loads(json.dumps(run, default=str))
        self._take()
        if not self._saved.exists():
            return {}
        with loading(str(self._saved), StatisticsError):
            found = dict(torch.load(self._saved, map_location="cpu", weights_only=True))
        if found["run"] != self._run:
            name, here, there = _difference(self._run, found["run"])
            raise ConfigError(
                f"{self.folder.parent} holds an unfinished run of another configuration: {name} is {here!s:.60} here, "
                f"was {there!s:.60} there; name another folder (--ablation.dirpath), or delete {self.folder}"
            )
        return found

    @property
    def due(self) -> bool:
        """Whether it is time for the next save."""
        return time.monotonic() - self._last >= self._every

    def save(self, state: Mapping[str, Any]) -> None:
        """Saves the state from which every process can go on."""
        self._last = time.monotonic()
        if self._first:
            buffer = io.BytesIO()
            torch.save({"run": self._run, **state}, buffer)
            write_whole(self._saved, buffer.getvalue())

    def close(self) -> None:
        """Forgets the run, which has ended."""
        self._saved.unlink(missing_ok=True)
        self.leave()

    def leave(self) -> bool:
        """Lets go of the folder, and removes what nothing was saved in; whether there is something to go on from."""
        known = self._saved.exists()
        if self._lock is not None:
            if not known:
                shutil.rmtree(self.folder, ignore_errors=True)
                with suppress(OSError):  # it holds something
                    if self._made:
                        self.folder.parent.rmdir()
            self._lock.release()  # last, so that no other run's files are removed
            self._lock = None
        return known

    def _take(self) -> None:
        """Locks the folder against other runs, until this one ends in any way; ConfigError if it can't be had."""
        lock = FileLock(self.folder / "lock", timeout=0)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise ConfigError(
                f"a run is going on in {self.folder.parent}; wait for it, or name another folder (--ablation.dirpath)"
            ) from None
        except NotImplementedError:  # a file system that knows no locks
            return
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # nor this one
                return
            raise ConfigError(
                f"can't write into the folder {str(self.folder.parent)!r}: {error.strerror} (--ablation.dirpath)"
            ) from error
        self._lock = lock


def is_unfinished(folder: Path) -> bool:
    """Whether a folder holds a run that died."""
    return (folder / FOLDER / SAVED).exists()


def _difference(here: Any, there: Any) -> tuple[str, Any, Any]:
    """The first place in which two values differ, by the names on the way, and what stands there in each."""
    names = []
    while isinstance(here, dict) and isinstance(there, dict):
        names.append(next(key for key in [*here, *there] if here.get(key) != there.get(key)))
        here, there = here.get(names[-1]), there.get(names[-1])
    return ".".join(names), here, there
