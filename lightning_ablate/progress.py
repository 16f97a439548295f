"""Progress bars that count conditions, not only batches, and lines printed above them."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from tqdm import tqdm

from lightning_ablate.conditions import Condition
from lightning_ablate.modules.phase import Phase
from lightning_ablate.phases import SweepPhase


def say(trainer: Trainer, text: str) -> None:
    """Prints lines on the first process of a machine, above the bars that are up."""
    if trainer.local_rank == 0:
        tqdm.write(text)


@contextmanager
def above_bars() -> Iterator[None]:
    """Prints warnings and log lines above the bars that are up, instead of into them."""

    def above(write: Any) -> Any:
        @wraps(write)
        def wrapped(*args: Any, **options: Any) -> None:
            with tqdm.external_write_mode(file=sys.stderr):
                write(*args, **options)

        return wrapped

    said: Any = warnings
    logged: Any = logging.StreamHandler
    before = said.showwarning, logged.emit
    said.showwarning, logged.emit = map(above, before)
    try:
        yield
    finally:
        said.showwarning, logged.emit = before


class SweepProgressBar(TQDMProgressBar):
    """Shows the condition of the sweep that is being evaluated, how many are done, and how long is left.

    The bar of calibration is closed before the sweep, so each shows its own time.
    """

    def get_metrics(self, *args: Any) -> dict[str, Any]:
        """What modules log for the bar, without the number of the logger's folder."""
        return {name: value for name, value in super().get_metrics(*args).items() if name != "v_num"}

    def init_validation_tqdm(self) -> Any:
        """Puts the bar of the sweep on the line below the closed one of calibration."""
        if self._train_progress_bar is not None:
            self.train_progress_bar.close()
        bar = super().init_validation_tqdm()
        bar.clear()
        bar.pos, bar.leave = -2 * self.process_position, True
        return bar

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Says what this epoch is for; a verification counts the conditions of all batches."""
        phase, bar = getattr(pl_module, "phase", None), self.train_progress_bar
        if batch_idx == 0 and isinstance(phase, Phase):
            bar.set_description(f"{phase.title}, epoch {trainer.current_epoch + 1}/{trainer.max_epochs}")
            bar.unit = "it"
        self._begin_batch(bar, phase, batch_idx, trainer.num_training_batches, batch_idx)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the batch, or the last condition of it."""
        if not self._end_batch(self.train_progress_bar, getattr(pl_module, "phase", None), batch_idx + 1):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Counts the conditions of all batches."""
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        phase, bar = getattr(pl_module, "phase", None), self.val_progress_bar
        if isinstance(phase, SweepPhase):
            bar.set_description(phase.title, refresh=False)
            self._begin_batch(bar, phase, phase.batches, sum(trainer.num_val_batches), batch_idx)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """Counts the last condition of the batch."""
        phase = getattr(pl_module, "phase", None)
        if not self._end_batch(self.val_progress_bar, phase, getattr(phase, "batches", 0)):
            super().on_validation_batch_end(trainer, pl_module, *batch)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Closes the bars, so that the message has lines of its own."""
        for bar in (self._train_progress_bar, self._val_progress_bar):
            if bar is not None:  # a bar without a total has no truth value
                bar.close()

    def _begin_batch(self, bar: Any, phase: Any, done: int, batches: float, batch_idx: int) -> None:
        """Lets a bar count the conditions of so many ``batches``, some of which are ``done``."""
        if self.is_disabled or not isinstance(phase, SweepPhase):
            return
        count = len(phase.conditions)
        number = {condition: done * count + place for place, condition in enumerate(phase.conditions)}
        if batch_idx == 0:
            bar.reset(int(batches) * count if batches < float("inf") else None)
            bar.update(done * count)
            bar.unit = " passes"

        def announce(condition: Condition) -> None:
            bar.set_postfix_str(str(condition), refresh=False)
            if phase.title == type(phase).title:
                bar.update(number[condition] - bar.n)
            else:  # the sweep is done, and single units are explained
                bar.set_description(phase.title)

        phase.announce = announce

    def _end_batch(self, bar: Any, phase: Any, done: int) -> bool:
        """Whether the bar counts conditions; it then counts all of the ``done`` batches."""
        if self.is_disabled or not isinstance(phase, SweepPhase):
            return False
        if (count := done * len(phase.conditions)) == bar.total:
            bar.set_postfix_str("", refresh=False)  # no condition is left
        bar.update(count - bar.n)
        return True
