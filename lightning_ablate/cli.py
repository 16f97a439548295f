"""The command line: LightningCLI with an AblationCallback, and a default that runs."""

import argparse
import inspect
import pkgutil
import re
import sys
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from jsonargparse import ArgumentError
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback

import lightning_ablate
from lightning_ablate.callback import AblationCallback
from lightning_ablate.choices import Choice
from lightning_ablate.data import (
    AblationDataModule,
    demo,  # noqa: F401 - once imported, its classes are found by their bare names
)
from lightning_ablate.errors import AblationError, ConfigError, TargetError, loading
from lightning_ablate.modules import AblationModule
from lightning_ablate.phases import is_unfinished
from lightning_ablate.progress import SweepProgressBar
from lightning_ablate.trainer import CHECKPOINT
from lightning_ablate.trust import HELP, check_trusted

# jsonargparse lists every type it tried; what went wrong is said in between
_TRIED = re.compile(r"Does not validate|Subtypes:|Errors:|Given value|- Expected a <class 'NoneType'>")
_BETTER = {
    r'Parser key "(?:fit\.|validate\.)?([\w.]+)":': r"--\1:",
    r"Expected an? (?:<class '(?:\w+\.)*(\w+)'>|typing\.Literal)": r"expected \1",
    r"required: (?:fit|validate)\.": "required: --",
}
_KINDS_TRIED = re.compile(r"expected \w+\.?(?:(?: Got value: \S+)? expected \w+\.?)+(?: Got value: \S+)?")
_NO_OPTION = re.compile(r"(ambiguous option: --|unrecognized arguments: --|not accept option '|Option ')([\w.]+)")
_UNKNOWN = re.compile(r"--([\w.]+): Expected a path but (\S+) ")
_KINDS: dict[str, type] = {"model": AblationModule, "data": AblationDataModule, "ablation.neurons": Choice}
DEFAULT_CONFIG = Path(__file__).parent / "demo" / "default.yaml"


class ConfigInCheckpoint(SaveConfigCallback):
    """Saves the configuration beside the results, and in the checkpoint, so that ``validate`` needs nothing else."""

    def save_config(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Writes config.yaml into the run's folder, which holds no earlier one."""
        folder = callback_of(trainer).folder
        if folder is not None and not is_unfinished(folder):  # whose own is there, and the same if it goes on
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"can't make {str(folder)!r}: {error.strerror} (--ablation.dirpath)") from error
            self.parser.save(self.config, folder / self.config_filename, skip_none=False, overwrite=True)

    def on_exception(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Leaves no configuration where nothing was found, so that the next run can have the folder."""
        folder = callback_of(trainer).folder
        if (
            folder is None
            or is_unfinished(folder)
            or any((folder / one).exists() for one in (CHECKPOINT, "results.csv"))
        ):
            return
        if trainer.is_global_zero:
            with suppress(OSError):  # it can't be written, or holds something else
                (folder / self.config_filename).unlink(missing_ok=True)
                folder.rmdir()

    def state_dict(self) -> dict[str, Any]:
        """The configuration as YAML."""
        return {"config": self.parser.dump(self.config, skip_none=False)}


def callback_of(trainer: Any) -> AblationCallback:
    """The callback that the command line adds to a Trainer."""
    return next(callback for callback in trainer.callbacks if isinstance(callback, AblationCallback))


class AblationCLI(LightningCLI):
    """Runs ``fit`` and ``validate``.

    Without a ``--config``, a ``--model`` or a ``--data``, options start from the demo's configuration; ``validate``
    starts from its checkpoint's.
    """

    def __init__(self, args: ArgsType = None, run: bool = True) -> None:
        super().__init__(
            AblationModule,
            lightning.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=ConfigInCheckpoint,
            save_config_kwargs={"save_to_log_dir": False},
            seed_everything_default=0,
            trainer_defaults={
                "accelerator": "cpu" if torch.backends.mps.is_available() else "auto",  # sums are float64
                **{"enable_checkpointing": False, "enable_model_summary": False, "max_epochs": 1},
            },
            auto_configure_optimizers=False,
            parser_kwargs={
                **{name: {"exit_on_error": False} for name in self.subcommands()},
                **{"exit_on_error": False, "prog": "python -m lightning_ablate"},
            },
            load_from_checkpoint_support=False,  # the checkpoint holds the whole configuration
            args=args,
            run=run,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """``fit`` calibrates and sweeps, ``validate`` sweeps; only that goes by a checkpoint."""
        fit, validate = (LightningCLI.subcommands()[name] for name in ("fit", "validate"))
        return {"fit": fit | {"ckpt_path", "weights_only"}, "validate": validate}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds ``--ablation``, and what ``validate`` asks of the user."""
        parser.add_lightning_class_args(AblationCallback, "ablation")
        parser.add_argument("--trust", metavar="NAME", default=argparse.SUPPRESS, help=f"of `validate`: {HELP}")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Puts the configuration to start from before the user's own options."""
        words = sys.argv[1:] if args is None else args
        with _configuring():
            if not isinstance(words, list):
                return super().parse_arguments(parser, words)
            try:
                self.config = parser.parse_args(_with_start(words))
            except ArgumentError as error:
                usage = [one.format_usage() for one in self._subcommand_parsers.values()]
                raise _with_suggestion(error, " ".join(usage)) from error

    def instantiate_classes(self) -> None:
        """Makes what the configuration names."""
        with _configuring():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        """Adds the progress bar, unless there is another one or none is wanted."""
        options = self._get(self.config_init, "trainer")
        callbacks = options.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        there = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if options.get("enable_progress_bar") is not False and not there:
            kwargs["callbacks"] = [*callbacks, SweepProgressBar()]
        return super().instantiate_trainer(**kwargs)


@contextmanager
def _configuring() -> Iterator[None]:
    """Raises what a configuration leads to, in the libraries below or the user's own classes, as a ConfigError."""
    try:
        yield
    except (AblationError, ArgumentError):
        raise
    except Exception as error:
        if isinstance(error.__cause__, AblationError):
            raise error.__cause__ from error
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"the configuration can't be used: {in_a_line(error)} ({type(error).__name__} in "
            f"{Path(where.filename).name}, line {where.lineno})"
        ) from error


def in_a_line(error: Exception) -> str:
    """What jsonargparse says, without the types that it tried; and if a class is unknown, which ones there are."""
    lines = [line.strip().removeprefix("- ") for line in str(error).splitlines() if not _TRIED.search(line)]
    said = " ".join(filter(None, lines))
    for pattern, better in _BETTER.items():
        said = re.sub(pattern, better, said)
    unknown = _UNKNOWN.match(said)
    if unknown and unknown[1] in _KINDS:
        kinds = [getattr(lightning_ablate, name) for name in dir(lightning_ablate)]
        known = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, _KINDS[unknown[1]])]
        names = ", ".join(kind.__name__ for kind in known if not inspect.isabstract(kind))
        return f"--{unknown[1]}: no such class {unknown[2]!r}, expected {names}, or the path of one's own"
    said = _KINDS_TRIED.sub(lambda tried: " or ".join(dict.fromkeys(re.findall(r"expected \w+", tried[0]))), said)
    return textwrap.shorten(said.replace(" or expected", " or"), 200, placeholder=" ...")


def _with_suggestion(error: ArgumentError, usage: str) -> ArgumentError:
    """The error, with the option that is most like the one that there isn't; ``usage`` names those there are."""
    said = str(error)
    if (unknown := _NO_OPTION.search(said)) is None:
        return error
    known = re.findall(r"--([\w.]+)", usage)
    for kind in re.findall(r"class_path '([\w.]+)'", said)[-1:]:
        known = [name for one in pkgutil.resolve_name(kind).__mro__ for name in inspect.signature(one).parameters]
    close = get_close_matches(unknown[2], known, 1)
    said = f"no such option --{unknown[2]}" if unknown[1] == "ambiguous option: --" else said
    return ArgumentError(None, f"{said}\n(did you mean {close[0]}?)" if close else said)


def _with_start(args: list[str]) -> list[str]:
    if not args or args[0] not in AblationCLI.subcommands():
        return args
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for names in (["-c", "--config"], ["--ckpt_path"], ["--model"], ["--data"]):
        known.add_argument(*names)
    known.add_argument("--trust", action="append")
    given, _ = known.parse_known_args(args[1:])
    if args[0] == "validate":  # or Lightning prints every condition, before our table
        args = [args[0], "--verbose=false", *args[1:]]
    if given.ckpt_path and Path(given.ckpt_path).is_dir():  # a run's, which holds one
        given.ckpt_path = str(Path(given.ckpt_path, CHECKPOINT))
        args = [*args, "--ckpt_path", given.ckpt_path]
    if args[0] == "validate" and given.ckpt_path and (config := config_of(given.ckpt_path, given.trust, args)):
        return [args[0], "--config", config, *args[1:]]
    return args if given.config or given.model or given.data else [args[0], "--config", str(DEFAULT_CONFIG), *args[1:]]


def config_of(checkpoint: str, trusted: Sequence[str] | None, words: Sequence[str]) -> str | None:
    """The configuration in a checkpoint, without what only ``fit`` knows; None in one that Python code left.

    ConfigError if it names what the user doesn't trust, see :func:`check_trusted`.
    """
    if checkpoint in ("last", "best"):  # which Lightning looks for, and the configuration is the user's own
        return None
    if not Path(checkpoint).is_file():
        raise TargetError(
            f"the checkpoint {checkpoint!r} does not exist; `fit` leaves one in its run's folder (--ckpt_path)"
        )
    with loading(checkpoint, TargetError, "--ckpt_path"):
        callbacks = torch.load(checkpoint, map_location="cpu", weights_only=True)["callbacks"]
        if ConfigInCheckpoint.__qualname__ not in callbacks:
            return None
        config = yaml.safe_load(callbacks[ConfigInCheckpoint.__qualname__]["config"])
        config = {key: config[key] for key in ("seed_everything", "trainer", "model", "data", "ablation")}
        check_trusted(config, trusted or (), words)
        if config["ablation"].get("dirpath"):  # which is for the one who made it to say
            config["ablation"]["dirpath"] = str(Path(checkpoint).parent)
    return yaml.safe_dump(config)
