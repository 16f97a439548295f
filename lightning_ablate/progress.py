"""A progress bar that counts conditions, not only batches."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from lightning_ablate.conditions import Condition
from lightning_ablate.phases import Phase, SweepPhase


class SweepProgressBar(TQDMProgressBar):
    """Says which condition of the sweep is being evaluated, how many are done, and how long is left."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Names what this epoch is for."""
        phase = getattr(pl_module, "phase", None)
        if batch_idx == 0 and isinstance(phase, Phase):
            epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            self.train_progress_bar.set_description(f"{phase.title}, {epoch}")

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Counts all conditions of all batches from the first batch on."""
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        phase = getattr(pl_module, "phase", None)
        if not isinstance(phase, SweepPhase) or self.is_disabled:
            return
        bar, conditions = self.val_progress_bar, phase.conditions
        if batch_idx == 0:
            batches = sum(trainer.num_val_batches)
            bar.reset(int(batches) * len(conditions) if batches < float("inf") else None)
            bar.update(phase.batches * len(conditions))
            bar.set_description(phase.title)
            bar.unit = " passes"
        place = {condition: phase.batches * len(conditions) + number for number, condition in enumerate(conditions)}

        def announce(condition: Condition) -> None:
            bar.set_postfix_str(str(condition), refresh=False)
            bar.update(place[condition] - bar.n)

        phase.announce = announce

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """Counts the last condition of the batch."""
        phase = getattr(pl_module, "phase", None)
        if isinstance(phase, SweepPhase) and not self.is_disabled:
            self.val_progress_bar.update(phase.batches * len(phase.conditions) - self.val_progress_bar.n)
        else:
            super().on_validation_batch_end(trainer, pl_module, *batch)
