"""A progress bar that counts conditions, not only batches."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from lightning_ablate.modules import AblationModule
from lightning_ablate.sweep import Condition


class SweepProgressBar(TQDMProgressBar):
    """Says which condition of the sweep is being evaluated, how many are done, and how long is left."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Names what this epoch is for."""
        if batch_idx == 0 and isinstance(pl_module, AblationModule):
            learning = pl_module.learning
            what = "Calibration" if learning is None else f"Learning {learning.method.name}"
            self.train_progress_bar.set_description(f"{what}, epoch {trainer.current_epoch + 1}/{trainer.max_epochs}")

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts all conditions of all batches from the first batch on."""
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        if not isinstance(pl_module, AblationModule) or pl_module.sweep is None or self.is_disabled:
            return
        bar, sweep = self.val_progress_bar, pl_module.sweep
        if batch_idx == 0:
            batches = trainer.num_val_batches[0]
            bar.reset(int(batches) * len(sweep.conditions) if batches < float("inf") else None)
            bar.set_description("Sweep")
            bar.unit = " passes"
        done = batch_idx * len(sweep.conditions)
        index = {condition: number for number, condition in enumerate(sweep.conditions)}

        def announce(condition: Condition) -> None:
            bar.set_postfix_str(str(condition), refresh=False)
            bar.update(done + index[condition] - bar.n)

        sweep.announce = announce

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts the last condition of the batch."""
        if isinstance(pl_module, AblationModule) and pl_module.sweep is not None and not self.is_disabled:
            bar = self.val_progress_bar
            bar.update((batch_idx + 1) * len(pl_module.sweep.conditions) - bar.n)
        else:
            super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
