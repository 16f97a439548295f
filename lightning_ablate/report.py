"""What a run leaves behind: files in its folder, curves and figures in Lightning's loggers, a text for the terminal."""

from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_ablate.metrics import METRICS
from lightning_ablate.results import Results
from lightning_ablate.results.neurons import Neurons
from lightning_ablate.trainer import OPTIONS


def report_neurons(trainer: lightning.Trainer, neurons: Neurons, folder: Path) -> None:
    """Writes the files of the neurons, and gives TensorBoard histograms of their shapes."""
    neurons.save(folder)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            neurons.to_tensorboard(logger.experiment)


def report_results(trainer: lightning.Trainer, results: Results, folder: Path | None, left: tuple[str, ...]) -> str:
    """Writes the results' files, gives loggers options or figure and curves, and returns what to tell the user."""
    paths = [] if folder is None else [*results.save(folder), *(folder / name for name in left)]
    notes = []
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(results.figure_name, results.plot())
            if folder is not None and not results.parts:
                paths.append(_curves(results, folder))
            notes = ["", f"TensorBoard: tensorboard --logdir {logger.root_dir}"]
        else:
            logger.log_hyperparams({name: results.facts[name] for name in OPTIONS})
    return "\n".join(["", str(results), "", *map(str, paths), *notes])


def _curves(results: Results, folder: Path) -> Path:
    """Writes a TensorBoard run for each method, so that their curves overlay; the step is the percentage ablated."""
    from torch.utils.tensorboard import SummaryWriter

    curves, summary = folder / "curves", results.summary()
    for method in results.methods:
        own: Any = summary[summary["method"].isin(["none", method])]
        with SummaryWriter(str(curves / method)) as writer:
            for metric in METRICS:
                for fraction, value in zip(own["fraction"], own[metric], strict=True):
                    writer.add_scalar(f"ablation/{metric}", value, round(100 * fraction))
    return curves
