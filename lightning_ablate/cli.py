"""The command line: LightningCLI with an AblationCallback, and a default that runs."""

import argparse
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import shorten
from typing import Any, cast

import lightning
from jsonargparse import ArgumentError
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback

from lightning_ablate.callback import AblationCallback
from lightning_ablate.data import demo  # noqa: F401 - once imported, its classes are found by their bare names
from lightning_ablate.errors import AblationError, ConfigError
from lightning_ablate.modules import AblationModule
from lightning_ablate.parser import Parser, in_a_line
from lightning_ablate.progress import SweepProgressBar
from lightning_ablate.run import CHECKPOINT
from lightning_ablate.trust import HELP, config_of

DEFAULT_CONFIG = Path(__file__).parent / "demo" / "default.yaml"
_TITLES = {
    "model": "The model under study: a class of lightning_ablate, or a subclass of AblationModule of your own",
    "data": "The data: a class of lightning_ablate, or a LightningDataModule of your own",
    "ablation": "What is ablated, and how",
    "trainer": "Lightning's Trainer",
}


class ConfigInCheckpoint(SaveConfigCallback):
    """Saves the configuration beside the results, and in the checkpoint, so that ``validate`` needs nothing else."""

    def save_config(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Writes config.yaml into the run's folder."""
        folder = callback_of(trainer).folder
        if folder is not None and not (folder / CHECKPOINT).exists():  # an unfinished run has left the same one
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"can't make {str(folder)!r}: {error.strerror} (--ablation.dirpath)") from error
            self.parser.save(self.config, folder / self.config_filename, skip_none=False, overwrite=True)

    def on_exception(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Removes config.yaml if the run has found nothing, so that the next run can have the folder."""
        folder = callback_of(trainer).folder
        if folder is None or not trainer.is_global_zero:
            return
        if not any((folder / name).exists() for name in (CHECKPOINT, "results.csv")):
            with suppress(OSError):  # the folder is read-only, or holds something else
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
        prog = "python -m lightning_ablate"
        super().__init__(
            AblationModule,
            lightning.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=ConfigInCheckpoint,
            save_config_kwargs={"save_to_log_dir": False},
            seed_everything_default=0,
            trainer_defaults={"enable_checkpointing": False, "enable_model_summary": False, "max_epochs": 1},
            auto_configure_optimizers=False,
            parser_class=Parser,
            parser_kwargs={
                **{
                    name: {"exit_on_error": False, "usage": f"{prog} {name} [options]", "description": None}
                    for name in self.subcommands()
                },
                **{"exit_on_error": False, "prog": prog, "allow_abbrev": False},
            },
            load_from_checkpoint_support=False,  # the checkpoint holds the whole configuration
            args=args,
            run=run,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """``fit`` calibrates and sweeps, ``validate`` sweeps; only ``validate`` takes a checkpoint."""
        fit, validate = (LightningCLI.subcommands()[name] for name in ("fit", "validate"))
        return {"fit": fit | {"ckpt_path", "weights_only"}, "validate": validate}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds ``--ablation`` and ``--trust``, and says in the help what each group of options is."""
        parser.add_lightning_class_args(AblationCallback, "ablation")
        parser.add_argument("--trust", metavar="NAME", default=argparse.SUPPRESS, help=f"of `validate`: {HELP}")
        for name, title in _TITLES.items():
            cast(Any, parser).groups[name].title = title

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Puts the configuration to start from before the user's own options."""
        words = sys.argv[1:] if args is None else args
        with _configuring():
            if not isinstance(words, list):
                return super().parse_arguments(parser, words)
            try:
                self.config = parser.parse_args(_with_start(words))
            except ArgumentError as error:
                own = self._subcommand_parsers.get(words[0], parser) if words else parser
                raise ArgumentError(None, in_a_line(str(error), own._option_string_actions)) from error

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
    """Raises any error of the libraries below, or of the user's own classes, as a ConfigError."""
    try:
        yield
    except (AblationError, ArgumentError):
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, AblationError):
            cause = cause.__cause__
        if isinstance(cause, AblationError):
            raise cause from error
        where = traceback.extract_tb(cause.__traceback__)[-1]
        raise ConfigError(
            f"the configuration can't be used: {shorten(str(cause), 200, placeholder=' ...')} ({type(cause).__name__} "
            f"in {Path(where.filename).name}, line {where.lineno})"
        ) from error


def _with_start(words: list[str]) -> list[str]:
    """The words of a command, with the configuration to start from before the user's own options."""
    if not words or words[0] not in AblationCLI.subcommands():
        return words
    command, *options = words
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for names in (["-c", "--config"], ["--ckpt_path"], ["--model"], ["--data"]):
        known.add_argument(*names)
    known.add_argument("--trust", action="append")
    given, _ = known.parse_known_args(options)
    start = None if given.config or given.model or given.data else str(DEFAULT_CONFIG)
    if command == "validate":
        options = ["--verbose=false", *options]  # or Lightning prints every condition, before our table
        if given.ckpt_path:
            path = Path(given.ckpt_path)
            checkpoint = str(path / CHECKPOINT) if path.is_dir() else given.ckpt_path
            options += ["--ckpt_path", checkpoint]
            start = config_of(checkpoint, given.trust or (), options) or start
    return [command, *options] if start is None else [command, "--config", start, *options]
