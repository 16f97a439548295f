"""Progress bars that count conditions, not only batches, and lines printed above them."""

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


class SweepProgressBar(TQDMProgressBar):
    """Says which condition of the sweep is being evaluated, how many are done, and how long is left.

    The bar of calibration is closed before the sweep, so each shows its own time.
    """

    def init_validation_tqdm(self) -> Any:
        """Takes the line below the closed bar of calibration, and stays there."""
        if self._train_progress_bar is not None:
            self.train_progress_bar.close()
        bar = super().init_validation_tqdm()
        bar.clear()
        bar.pos, bar.leave = -2 * self.process_position, True
        return bar

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Names what this epoch is for; of a verification it counts all conditions of all batches."""
        phase = getattr(pl_module, "phase", None)
        if batch_idx == 0 and isinstance(phase, Phase):
            epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            self.train_progress_bar.set_description(f"{phase.title}, {epoch}")
            self.train_progress_bar.unit = "it"
        if isinstance(phase, SweepPhase):
            self._count(self.train_progress_bar, phase, batch_idx, trainer.num_training_batches)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the batch, or the last condition of it."""
        phase = getattr(pl_module, "phase", None)
        if isinstance(phase, SweepPhase) and not self.is_disabled:
            self.train_progress_bar.update((batch_idx + 1) * len(phase.conditions) - self.train_progress_bar.n)
        else:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Counts all conditions of all batches from the first batch on."""
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        phase = getattr(pl_module, "phase", None)
        if isinstance(phase, SweepPhase):
            if batch_idx == 0:
                self.val_progress_bar.set_description(phase.title)
            self._count(self.val_progress_bar, phase, phase.batches, sum(trainer.num_val_batches), anew=batch_idx == 0)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """Counts the last condition of the batch."""
        phase = getattr(pl_module, "phase", None)
        if isinstance(phase, SweepPhase) and not self.is_disabled:
            self.val_progress_bar.update(phase.batches * len(phase.conditions) - self.val_progress_bar.n)
        else:
            super().on_validation_batch_end(trainer, pl_module, *batch)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Closes the bars, so that what is said of it has lines of its own."""
        for bar in (self._train_progress_bar, self._val_progress_bar):
            if bar is not None:  # one without a total is neither true nor false
                bar.close()

    def _count(self, bar: Any, phase: SweepPhase, done: int, batches: float, anew: bool = False) -> None:
        """Lets a bar count the conditions of ``batches``, of which some are ``done``."""
        if self.is_disabled:
            return
        conditions = phase.conditions
        if anew or done == 0:
            bar.reset(int(batches) * len(conditions) if batches < float("inf") else None)
            bar.update(done * len(conditions))
            bar.unit = " passes"
        place = {condition: done * len(conditions) + number for number, condition in enumerate(conditions)}

        def announce(condition: Condition) -> None:
            bar.set_postfix_str(str(condition), refresh=False)
            bar.update(place[condition] - bar.n)

        phase.announce = announce
