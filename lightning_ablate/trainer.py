"""What the callback reads from Lightning's Trainer and sets in it."""

from collections.abc import Callable, Mapping, Sequence, Sized
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, cast

import lightning
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import callbacks
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import IterableDataset, Subset
from torch.utils.data.distributed import DistributedSampler

from lightning_ablate.data.base import AblationDataModule
from lightning_ablate.data.examples import ExactSampler, Examples
from lightning_ablate.errors import AblationError, ConfigError
from lightning_ablate.files import fresh_folder
from lightning_ablate.identity import content, described, fingerprint, options_of
from lightning_ablate.modules import AblationModule
from lightning_ablate.modules.loaders import evaluation_loaders
from lightning_ablate.modules.phase import Amount
from lightning_ablate.run import is_unfinished
from lightning_ablate.sharding import check_strategy

T = TypeVar("T")
_TRAIN = (  # they change weights, or look at a loss
    callbacks.WeightAveraging,
    callbacks.ModelPruning,
    callbacks.BaseFinetuning,
    callbacks.LearningRateFinder,
    callbacks.BatchSizeFinder,
    callbacks.GradientAccumulationScheduler,
    callbacks.SpikeDetection,
)
_GIVEN = ("data_source", "dataset", "sampler", "generator")  # what samplers hold beside their own order


def check_trainer(trainer: lightning.Trainer) -> None:
    """Raises ConfigError for options that would cut the calibration, train, or split the target's activations."""
    check_strategy(trainer.strategy)
    trainer.num_sanity_val_steps = 0
    if trainer.max_steps != -1 and not _is_dry(trainer):
        raise ConfigError(
            f"max_steps is {trainer.max_steps}, expected none; --trainer.limit_train_batches cuts calibration"
        )
    if type(trainer.val_check_interval) is int or trainer.val_check_interval not in (None, 1.0):
        raise ConfigError(
            f"--trainer.val_check_interval is {trainer.val_check_interval!r}, expected 1.0: calibration comes first"
        )
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(other, _TRAIN):
            raise ConfigError(
                f"{type(other).__name__} is for training, but nothing is trained here; leave it out "
                "(--trainer.callbacks)"
            )


def set_epochs(trainer: lightning.Trainer, epochs: int | None) -> None:
    """Sets how many epochs the Trainer runs; it validates in the last of them. None while that isn't known."""
    trainer.fit_loop.epoch_loop.max_steps = -1
    last = None if epochs is None else trainer.current_epoch + epochs
    trainer.fit_loop.max_epochs, trainer.check_val_every_n_epoch = last or -1, last or 1


def folder_of(trainer: lightning.Trainer, dirpath: str | Path | None) -> Path | None:
    """The folder of a run: ``dirpath``, the logger's, or a new one inside; None for a dry run."""
    logs = trainer.log_dir
    if not trainer.loggers and Path(trainer.default_root_dir) == Path.cwd():  # nobody has named a folder
        logs = "lightning_logs"
    given = None if _is_dry(trainer) else dirpath or logs
    if given is not None and Path(given).is_file():
        raise ConfigError(f"{str(given)!r} is a file, expected a folder for the run's files (--ablation.dirpath)")
    if given is None:
        return None
    # a run that died goes on where its folder is named
    command = str(trainer.state.fn.value) if trainer.state.fn and dirpath else ""
    return from_first(trainer, lambda: fresh_folder(Path(given), partial(is_unfinished, command=command)))


def from_first(trainer: lightning.Trainer, make: Callable[[], T]) -> T:
    """What the first process makes, or its AblationError, on all processes, which may not share a disk."""
    found: Any = None
    if trainer.is_global_zero:
        try:
            found = make()
        except AblationError as error:
            found = error
    found = trainer.strategy.broadcast(found)
    if isinstance(found, AblationError):
        raise found
    return found


def calibration_amount(trainer: lightning.Trainer) -> Amount:
    """How much calibration data there is; warns if some of them are evaluated as well.

    ConfigError if some example goes to two processes, or ``fit`` was given a checkpoint.
    """
    if trainer.ckpt_path:
        raise ConfigError(
            f"fit was given the checkpoint {str(trainer.ckpt_path)!r}, which is for validate; a run that died goes on "
            "by itself where its folder is named (--ablation.dirpath)"
        )
    for stopping in trainer.early_stopping_callbacks:  # they look before the sweep has given their metrics
        stopping.strict = False
    _warn_if_shared(trainer)
    batch_size = _batch_size(trainer.train_dataloader) * trainer.world_size
    examples = example_count(trainer, trainer.train_dataloader)
    return Amount(trainer.num_training_batches, batch_size, examples, _is_dry(trainer))


def batches_of(trainer: lightning.Trainer, examples: int) -> tuple[float, float, float]:
    """The batches of each process: of the calibration, of all evaluation data, and of their first ``examples``."""
    counts = [float(trainer.num_training_batches), float(sum(trainer.num_val_batches))]
    loaders = evaluation_loaders(trainer)
    size = _batch_size(loaders[0]) * trainer.world_size if loaders else 1
    return counts[0], counts[1], min(counts[1], ceil(examples / size))


def validate_at_once(trainer: lightning.Trainer) -> None:
    """Runs the validation of ``fit`` without an epoch before it, and ends ``fit``; for ``on_train_epoch_start``.

    No batch of the training data is read.

    Raises:
        StopIteration: always; Lightning's loop over epochs ends by it.
    """
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
    raise StopIteration


def check_counts_once(trainer: lightning.Trainer, loader: Any) -> None:
    """Raises ConfigError for a loader that gives some example to two processes."""
    sampler = getattr(loader, "sampler", None)
    if trainer.world_size == 1 or isinstance(sampler, ExactSampler):
        return
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        raise ConfigError(
            f"a stream gives each of {trainer.world_size} processes all of its examples; use data that are read by "
            "index, or a lightning_ablate.AblationDataModule"
        )
    if isinstance(sampler, DistributedSampler) and sampler.total_size != len(cast(Sized, sampler.dataset)):
        raise ConfigError(
            f"{len(cast(Sized, sampler.dataset))} examples don't divide by {trainer.world_size} processes, so "
            "Lightning's sampler would repeat some; use a lightning_ablate.AblationDataModule, or drop the remainder"
        )


def example_count(trainer: lightning.Trainer, loader: Any) -> int:
    """The number of examples; 0 if the loader can't tell, for example because its data set yields whole batches.

    ConfigError if it gives some example to two processes.
    """
    check_counts_once(trainer, loader)
    return sized_len(loader.dataset) or 0 if getattr(loader, "batch_sampler", None) is not None else 0


def _warn_if_shared(trainer: lightning.Trainer) -> None:
    """Warns if examples that calibrate are evaluated as well."""
    own = getattr(trainer.train_dataloader, "dataset", None)
    for name, loader in zip(data_names(trainer), evaluation_loaders(trainer), strict=True):
        if shared := _shared(own, getattr(loader, "dataset", None)):
            rank_zero_warn(
                f"{shared:,} examples of {name} calibrate and are evaluated as well, which flatters methods that fit "
                "them closely (conditional and learned ones); evaluate others"
            )


def _shared(one: Any, other: Any) -> int:
    """How many examples two data sets share, as far as their classes tell."""
    (whole, indices), (same, others) = (
        (data.dataset, data.indices) if isinstance(data, Subset) else (data, None) for data in (one, other)
    )
    if whole is not same:
        return 0
    if indices is None or others is None:
        return min(sized_len(one) or 0, sized_len(other) or 0)
    return len(set(map(int, indices)) & set(map(int, others)))


def _is_dry(trainer: lightning.Trainer) -> bool:
    return bool(cast(Any, trainer).fast_dev_run)


def _batch_size(loader: Any) -> int:
    found = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return found if isinstance(found, int) else 1


def cut_short(what: str, seen: Sequence[float], loaders: Sequence[Any]) -> list[str]:
    """Lines on data that weren't read whole: ``seen`` batches of each loader."""
    pairs = zip(seen, map(sized_len, loaders), strict=True)
    return [f"{what} was cut to {count} of {whole} batches" for count, whole in pairs if whole and count < whole]


def data_name(trainer: lightning.Trainer) -> str:
    """What results call the data."""
    data = getattr(trainer, "datamodule", None)
    return "data" if data is None else getattr(data, "name", None) or type(data).__name__


def data_names(trainer: lightning.Trainer) -> list[str]:
    """What results call the data of each validation loader: all different."""
    loaders: Any = trainer.val_dataloaders
    count, first = len(evaluation_loaders(trainer)), data_name(trainer)
    if isinstance(loaders, Mapping):
        names = list(map(str, loaders))
    else:
        data = getattr(trainer, "datamodule", None)
        others = [one.name for one in data.evaluation] if isinstance(data, AblationDataModule) else []
        names = [first, *others] if len(others) == count - 1 else [first] * count
    return [f"{name} {place + 1}" if name in names[:place] else name for place, name in enumerate(names)]


def run_facts(trainer: lightning.Trainer, module: AblationModule, options: Mapping[str, Any]) -> dict[str, Any]:
    """What run.json says of a run, and what two processes must have in common to go on with one run.

    ``options`` are those of the callback that tell runs apart.
    """
    describe = getattr(getattr(trainer, "datamodule", None), "describe", lambda: {"name": data_name(trainer)})
    loaders = [one for one in (trainer.train_dataloader, *evaluation_loaders(trainer)) if one is not None]
    own = not type(module).__module__.startswith("lightning_ablate.")
    code = {"module": content(type(module), options_of(module))} if own else {}
    return {
        "command": trainer.state.fn.value if trainer.state.fn else "",
        "target": {**module.describe(), **code, "sha256": fingerprint(module.target)},
        "data": describe(),
        "loaders": list(map(_loader_facts, loaders)),
        **{name: described(value) for name, value in options.items()},
        "precision": str(trainer.precision),
        "accelerator": type(trainer.accelerator).__name__,
        "processes": trainer.world_size,
        "limits": [trainer.limit_train_batches, trainer.limit_val_batches],
    }


def evaluated(callback: Any, module: AblationModule, like: lightning.Trainer, data: Any = None) -> Any:
    """The results of a callback's sweep of a module, on the device and in the precision of another Trainer.

    ``data`` are a data module or loaders; None takes those of the Trainer. No file stays.
    """
    data = data or getattr(like, "datamodule", None) or like.val_dataloaders
    given = {"datamodule" if isinstance(data, lightning.LightningDataModule) else "dataloaders": data}
    quiet: Any = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    with TemporaryDirectory() as callback.dirpath, redirect_stdout(StringIO()):
        made = lightning.Trainer(
            accelerator=like.accelerator, devices=1, plugins=[like.precision_plugin], callbacks=[callback], **quiet
        )
        made.validate(module, verbose=False, **given)
    return callback.results


def _loader_facts(loader: Any) -> dict[str, Any]:
    """The size of a loader's batches and data, their content and order."""
    data, batches = getattr(loader, "dataset", loader), getattr(loader, "batch_sampler", None)
    samplers = [getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)]
    orders = [{k: v for k, v in vars(s).items() if k not in _GIVEN} if hasattr(s, "__dict__") else s for s in samplers]
    known = [data.fingerprint(), data.clusters] if isinstance(data, Examples) else data
    found = content(known, getattr(loader, "collate_fn", None), *map(type, samplers), *orders)
    return {"batch_size": _batch_size(loader), "examples": sized_len(data) or 0, "content": found}
