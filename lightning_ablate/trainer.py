"""What the callback asks of Lightning's Trainer, and tells it."""

import inspect
from collections.abc import Sized
from pathlib import Path
from typing import Any, cast

import lightning
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data.distributed import DistributedSampler

from lightning_ablate.data.base import ExactSampler
from lightning_ablate.errors import ConfigError, StatisticsError, loading
from lightning_ablate.modules import AblationModule
from lightning_ablate.phases import is_unfinished
from lightning_ablate.results.folder import fresh_folder
from lightning_ablate.sharding import check_strategy

OPTIONS = ("methods", "fractions", "seeds", "sites", "neurons")  # of the callback, which tell runs apart


def check_trainer(trainer: lightning.Trainer) -> None:
    """Raises ConfigError for what would cut the calibration, or show hooks pieces of a target."""
    check_strategy(trainer.strategy)
    trainer.num_sanity_val_steps = 0
    if trainer.state.fn == TrainerFn.FITTING and trainer.ckpt_path:
        raise ConfigError(
            f"fit was given the checkpoint {str(trainer.ckpt_path)!r}, which is for validate; a run that died goes on "
            "by itself where its folder is named (--ablation.dirpath)"
        )
    if trainer.max_steps != -1 and not is_fast(trainer):
        raise ConfigError(f"max_steps is {trainer.max_steps}; shorten the calibration with limit_train_batches instead")
    if type(trainer.val_check_interval) is int or trainer.val_check_interval not in (None, 1.0):
        raise ConfigError(
            f"val_check_interval is {trainer.val_check_interval!r}, expected 1.0: calibration comes first"
        )


def run_epochs(trainer: lightning.Trainer, epochs: int | None) -> None:
    """Lets the Trainer run so many epochs, and validate in the last of them; None while that isn't known."""
    trainer.fit_loop.epoch_loop.max_steps = -1
    last = None if epochs is None else trainer.current_epoch + epochs
    trainer.fit_loop.max_epochs, trainer.check_val_every_n_epoch = last or -1, last or 1


def folder_of(trainer: lightning.Trainer, dirpath: str | Path | None) -> Path | None:
    """Where a run's files go: into an unfinished run's folder, or one that holds no run; None for a dry run.

    Raises:
        ConfigError: if ``dirpath``, in place of which None takes the logger's folder, is that of a file.
    """
    given = None if is_fast(trainer) else dirpath or trainer.log_dir
    if given is not None and Path(given).is_file():
        raise ConfigError(f"{str(given)!r} is a file, expected a folder for the run's files (--ablation.dirpath)")
    folder = None
    if given is not None and trainer.is_global_zero:
        folder = Path(given) if is_unfinished(Path(given)) else fresh_folder(Path(given))
    return trainer.strategy.broadcast(folder)


def agreed(trainer: lightning.Trainer, wish: bool) -> bool:
    """The first process's wish, on all of them."""
    return trainer.strategy.broadcast(wish) if trainer.world_size > 1 else wish


def calibration_size(trainer: lightning.Trainer) -> dict[str, Any]:
    """What :func:`~lightning_ablate.phases.schedule` wants to know of the calibration data, once they are there."""
    batch_size = (getattr(trainer.train_dataloader, "batch_size", None) or 1) * trainer.world_size
    steps = 1 if is_fast(trainer) else None
    return {"batches": trainer.num_training_batches, "batch_size": batch_size, "steps": steps}


def is_fast(trainer: lightning.Trainer) -> bool:
    """Whether this is a ``fast_dev_run``."""
    return bool(getattr(trainer, "fast_dev_run", False))


def check_counts_once(trainer: lightning.Trainer, loader: Any) -> None:
    """Raises ConfigError for a loader that gives some example to two processes."""
    sampler = getattr(loader, "sampler", None)
    if trainer.world_size == 1 or not isinstance(sampler, DistributedSampler) or isinstance(sampler, ExactSampler):
        return
    examples = len(cast(Sized, sampler.dataset))
    if sampler.total_size != examples:
        raise ConfigError(
            f"{examples} examples don't divide by {trainer.world_size} processes, so Lightning's sampler would repeat "
            "some; use a lightning_ablate.AblationDataModule, or drop the remainder"
        )


def example_count(trainer: lightning.Trainer) -> int:
    """How many examples are evaluated, by their indices; 0 where the loader doesn't tell."""
    data = getattr(trainer.val_dataloaders, "dataset", None)
    return len(data) if isinstance(data, Sized) else 0


def cut_short(what: str, seen: float, loader: Any) -> list[str]:
    """Why a run doesn't cover all of its data: what was cut, if it was."""
    try:
        whole = len(loader)
    except TypeError:  # a loader without a length
        return []
    return [f"{what} was cut to {seen} of {whole} batches"] if seen < whole else []


def data_name(trainer: lightning.Trainer) -> str:
    """What results call the data."""
    data = getattr(trainer, "datamodule", None)
    return "data" if data is None else getattr(data, "name", None) or type(data).__name__


def data_facts(trainer: lightning.Trainer) -> dict[str, Any]:
    """What run.json says about the data."""
    describe = getattr(getattr(trainer, "datamodule", None), "describe", None)
    return describe() if describe is not None else {"name": data_name(trainer)}


def run_facts(trainer: lightning.Trainer, module: AblationModule, callback: Any) -> dict[str, Any]:
    """What run.json says of a run; and what a run must have in common with an earlier one to go on with it."""
    return {
        "command": str(trainer.state.fn),
        "target": {**module.describe(), "sha256": callback.run.target},
        "data": data_facts(trainer),
        **{name: _plainly(getattr(callback, name)) for name in OPTIONS},
        "precision": str(trainer.precision),
        "accelerator": type(trainer.accelerator).__name__,
        "processes": trainer.world_size,
        "limits": [trainer.limit_train_batches, trainer.limit_val_batches],
    }


def callback_state(path: Path, callback: lightning.Callback) -> dict[str, Any]:
    """What a callback has left in a checkpoint; nothing in the file is run."""
    with loading(str(path), StatisticsError):
        return torch.load(path, map_location="cpu", weights_only=True)["callbacks"][callback.state_key]


def _plainly(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plainly(item) for item in value]
    return options_of(value) if hasattr(value, "__dict__") else value


def options_of(made: Any) -> dict[str, Any]:
    """The class of an object, and the arguments that it was made with and keeps by their names.

    Example:
        >>> from lightning_ablate.choices import Random
        >>> options_of(Random(unit="head"))
        {'class': 'Random', 'unit': 'head'}
    """
    names = [name for name in inspect.signature(type(made).__init__).parameters if name in vars(made)]
    named = {"name": made.name} if hasattr(made, "name") else {}
    return {"class": type(made).__name__, **named, **{name: vars(made)[name] for name in names}}
