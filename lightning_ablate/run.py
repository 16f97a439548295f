"""What a run has found and how far it has come: one object, saved as one file."""

import errno
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Self

import lightning
import torch
from filelock import FileLock, Timeout
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_ablate.attribution import Measured, table_of
from lightning_ablate.calibration import Calibration, check_target, saved_state
from lightning_ablate.errors import ConfigError, StatisticsError, loading
from lightning_ablate.files import write_whole
from lightning_ablate.methods import AblationMethod
from lightning_ablate.modules.phase import Phase
from lightning_ablate.sites.bases import saved_site

CHECKPOINT, _LOCK = "ablation.ckpt", "ablation.lock"
_SHARE = 20  # saving takes at most 1/20 of a run's time
_NO_LOCKS = errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP  # of file systems without locks


@dataclass
class Run:
    """What a run has found and how far it has come.

    Attributes:
        target: the fingerprint of the target.
        calibration: of each site the statistics, what was learned, and what its units are worth.
        epochs: how many epochs of `fit` are done.
        phase: the state of the phase in which an earlier process died, until :meth:`resume` takes it.
        held_out: method that learned → the loss of held-out examples before and after, nats; None if none was held out.
        measured: units that were ablated alone, see :func:`~lightning_ablate.attribution.table_of`.
        partial: why the run doesn't cover all its data.
        notes: what else limits its results.
    """

    target: str = ""
    calibration: Calibration = field(default_factory=Calibration)
    epochs: int = 0
    phase: dict[str, Any] = field(default_factory=dict)
    held_out: dict[str, tuple[float, float] | None] = field(default_factory=dict)
    measured: list[Measured] = field(default_factory=list)
    partial: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    saved: Mapping[str, Any] = field(default_factory=dict)  # a state_dict() whose target isn't known yet

    def state_dict(self) -> dict[str, Any]:
        """All but the phase, as tensors on the CPU and plain values."""
        if self.saved or not self.target:
            return dict(self.saved)
        about: dict[str, Any] = {"target": self.target, "epochs": self.epochs, "held_out": dict(self.held_out)}
        about |= {"partial": list(self.partial), "measured": [list(row) for row in self.measured]}
        return {**about, "notes": list(self.notes), "calibration": self.calibration.state_dict()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], target: nn.Module, known: str, **options: Any) -> Self:
        """Takes up a :meth:`state_dict` of a target with the fingerprint ``known``.

        For its errors see :func:`check_target`, for the options :meth:`Calibration.from_state_dict`.
        """
        check_target(state, known)
        with loading("the checkpoint", StatisticsError):
            made = cls(known, Calibration.from_state_dict(state["calibration"], target, **options))
            made.epochs = int(state["epochs"])
            made.held_out = {str(name): found for name, found in dict(state["held_out"]).items()}
            made.partial, made.notes = list(map(str, state["partial"])), list(map(str, state["notes"]))
            made.measured = list(map(Measured.of, state["measured"]))
            table_of(made.calibration.attributed, made.measured)  # it can't be made of rows of another form
        return made

    def resume(self, phase: Phase) -> Phase:
        """The phase, taken up where an earlier process left it."""
        if self.phase:
            with loading("the unfinished run's checkpoint", StatisticsError):
                phase.load_state_dict(self.phase)
            self.phase = {}
        return phase

    def note(self, said: str | None, *, warn: bool = True) -> None:
        """Keeps a line on what limits the results, and warns of it, once."""
        if said is not None and said not in self.notes:
            self.notes.append(said)
            if warn:
                rank_zero_warn(said)

    def facts(self, methods: Sequence[AblationMethod], classes: int) -> dict[str, Any]:
        """What run.json says of it, of its methods and of the number of classes."""
        known = [self.calibration[site] for site in self.calibration.sites]
        sites = [saved_site(site) for site in self.calibration.sites]
        seconds = round(time.monotonic() - self.began, 1)
        about = {"held_out": self.held_out, "sites": sites, "partial": list(self.partial)}
        about |= {"notes": list(self.notes), "ridges": self.calibration.ridges}
        about["methods_notes"] = [line for method in methods for line in method.notes(known)]
        return {**about, "classes": classes, "seconds": seconds}


class Store:
    """The file of a run, ``ablation.ckpt`` in its folder: a Lightning checkpoint that `validate` takes as well.

    Only the first process has one. It writes the file whole or not at all, and a lock keeps other runs out.
    Between two saves of a sweep are ``every`` seconds, or more where a save takes long; 0 saves after every batch.
    """

    def __init__(self, folder: Path, every: float) -> None:
        self.path, self._every, self._made = folder / CHECKPOINT, every, not folder.exists()
        self._last, self._took = time.monotonic(), 0.0
        self._lock: FileLock | None = None  # held while the run goes on

    def claim(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Takes the folder for a run; returns the state that an earlier process saved there, empty if none did.

        ``facts`` describe the run's configuration. To go on with a saved run, they must equal those saved with it.

        Raises:
            ConfigError: if the run there is another one, or is going on.
            TargetError: if the file is damaged.
        """
        self._take()
        if not self.path.exists():
            return {}
        state = saved_state(self.path)
        here, there = (
            {name: fact for name, fact in known.items() if name != "explain"}
            for known in (plain(facts), state["facts"])
        )
        if here != there:
            name, here, there = _difference(here, there)
            raise ConfigError(
                f"{self.path.parent} holds an unfinished run of another configuration: {name} is {here!s:.60} here, "
                f"was {there!s:.60} there; name another folder (--ablation.dirpath)"
            )
        return state

    @property
    def due(self) -> bool:
        """Whether it is time for the next save."""
        return time.monotonic() - self._last >= (self._every and max(self._every, _SHARE * self._took))

    def save(self, make: Callable[[], Mapping[str, Any]]) -> None:
        """Makes and writes a checkpoint from which every process can go on."""
        began, state = time.monotonic(), make()
        write_whole(self.path, lambda file: torch.save(state, file))
        self._last = time.monotonic()
        self._took = self._last - began

    def close(self, keep: bool) -> None:
        """Lets go of the folder of a run that has ended, and removes the file unless it is to be kept."""
        if not keep:
            self.path.unlink(missing_ok=True)
        self.leave()

    def leave(self) -> bool:
        """Lets go of the folder; an empty one that it made is removed. Returns whether there is a run to go on with."""
        known = self.path.exists()
        if self._lock is not None:
            self.path.with_name(_LOCK).unlink(missing_ok=True)
            if self._made and not known:
                with suppress(OSError):  # it holds something
                    self.path.parent.rmdir()
            self._lock.release()  # last, so that no other run's files are removed
            self._lock = None
        return known

    def _take(self) -> None:
        """Locks the folder against other runs, until this one ends in any way; ConfigError if it can't be had."""
        folder = self.path.parent
        lock = FileLock(folder / _LOCK, timeout=0)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise ConfigError(
                f"a run is going on in {folder}; wait for it, or name another folder (--ablation.dirpath)"
            ) from None
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return
            raise ConfigError(
                f"can't write into the folder {str(folder)!r}: {error.strerror} (--ablation.dirpath)"
            ) from error
        except NotImplementedError:  # another sign of no locks
            return
        self._lock = lock


def checkpoint_of(trainer: lightning.Trainer, own: lightning.Callback, state: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint of Lightning's without the target's weights, which one process can make alone.

    It holds the ``state`` of the callback ``own``, and those of others and of the data module that are plain values.
    """
    data, others = getattr(trainer, "datamodule", None), [one for one in trainer.callbacks if one is not own]  # type: ignore[attr-defined]
    states = {one.state_key: one.state_dict() for one in others} | {own.state_key: dict(state)}
    kept = {} if data is None else {type(data).__qualname__: data.state_dict()}  # where Lightning looks for it
    module, own_state = trainer.lightning_module, dict[str, Any]()
    module._save_to_state_dict(own_state, "", False)
    for name, child in module.named_children():
        if name != "target":  # a sharded one can't give its state to one process alone
            child.state_dict(destination=own_state, prefix=f"{name}.")
    checkpoint = {
        "pytorch-lightning_version": lightning.__version__,
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "state_dict": own_state,
        "optimizer_states": [],
        "lr_schedulers": [],
        "callbacks": {key: state for key, state in states.items() if state and _is_plain(state)},
        **{key: state for key, state in kept.items() if state and _is_plain(state)},
    }
    trainer.lightning_module.on_save_checkpoint(checkpoint)
    return checkpoint


def _is_plain(state: Any) -> bool:
    """Whether a file with it can be read without running code."""
    kinds = str, bytes, int, float, bool, NoneType
    return all(isinstance(leaf, Tensor) or type(leaf) in kinds for leaf in tree_leaves(state))


def is_unfinished(folder: Path, command: str) -> bool:
    """Whether a folder holds a run of ``fit`` or ``validate`` that died; TargetError if its file is damaged."""
    path = folder / CHECKPOINT
    state = saved_state(path, mmap=True) if path.exists() else {}
    return state.get("finished") is False and state.get("facts", {}).get("command") == command


def plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as they come back from a JSON file."""
    return dict(json.loads(json.dumps(facts, default=str)))


def _difference(here: Any, there: Any) -> tuple[str, Any, Any]:
    """The first entry in which nested mappings differ: its dotted name, and both values."""
    names = []
    while isinstance(here, dict) and isinstance(there, dict):
        names.append(next(key for key in [*here, *there] if here.get(key) != there.get(key)))
        here, there = here.get(names[-1]), there.get(names[-1])
    return ".".join(names), here, there
