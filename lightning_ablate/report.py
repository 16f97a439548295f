"""What a run leaves behind: files in its folder, curves and figures in Lightning's loggers, text for the terminal."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pandas as pd
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_ablate.calibration import Calibration
from lightning_ablate.files import base_name, versions
from lightning_ablate.metrics import SweepMetrics
from lightning_ablate.modules.loaders import clusters_of, evaluation_loaders
from lightning_ablate.phases import ExplainedSweep, SweepPhase
from lightning_ablate.results import Results, attributions, neurons, page
from lightning_ablate.results.byexample import ByExample
from lightning_ablate.results.frames import BASELINE
from lightning_ablate.run import CHECKPOINT
from lightning_ablate.trainer import cut_short, data_name, data_names

_OPTIONS = ("methods", "fractions", "seeds", "sites", "neurons", "attribution")  # that loggers get


def tabulated(trainer: lightning.Trainer, phase: SweepPhase, facts: Mapping[str, Any]) -> Results:
    """The results of a sweep that has ended, with the time, the versions and the command added to ``facts``."""
    rows, tables, known = (
        [(c.method, c.fraction, c.seed, c.part, c.head) for c in phase.conditions],
        [],
        list[ByExample | None](),
    )
    loaders, own = evaluation_loaders(trainer), {"ablated": list(phase.ablated.values()), "model": phase.module.name}
    for loader, data, metrics in zip(loaders, data_names(trainer), phase.each, strict=True):
        found = {name: values.cpu().numpy() for name, values in metrics.means.items()}
        table = pd.DataFrame(rows, columns=["method", "fraction", "seed", "part", "head"])
        tables.append(table.assign(data=data, **own, **found))
        known.append(_by_example(metrics, loader))
    cut = cut_short("evaluation", trainer.num_val_batches, loaders)
    names = data_names(trainer) if len(loaders) > 1 else [""]
    ended = [(name, stop.said) for name, stop in zip(names, phase.stops, strict=False) if stop.said]
    cut += [f"{name}: {said}" if name else said for name, said in ended]
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    program = ["python", "-m", "lightning_ablate"] if sys.argv[0].endswith("__main__.py") else sys.argv[:1]
    now = {"words": shlex.join([*program, *sys.argv[1:]]), "finished": finished, "versions": versions()}
    made = {**facts, **now, "partial": [*facts["partial"], *cut]}
    results = Results(pd.concat(tables), known, made)
    if isinstance(phase, ExplainedSweep) and phase.evidence is not None:
        results.gathered = phase.evidence
        results.facts |= {"evidence": phase.evidence.sha256(), "attention": phase.unread}
    return results


def _by_example(metrics: SweepMetrics, loader: Any) -> ByExample | None:
    if metrics.by_example is None:
        return None
    n, sums = (values.cpu().numpy() for values in metrics.by_example)
    clusters = np.asarray(clusters_of(loader, len(n)), dtype=np.int64)
    return ByExample(np.arange(len(n)), clusters, n, metrics.names, sums)


def named_scores(results: Results) -> dict[str, float]:
    """Every score of every condition under a name for loggers, like ``top1/mean 0.5 seed 42``."""
    found, labels = dict[str, float](), dict(zip(results.data, results.labels, strict=True))
    for row in results.table.to_dict("records"):
        units = row["part"] or f"{row['fraction']:g}"
        words = [row["method"], units, *(f"{n} {row[n]}" for n in ("head", "seed") if not pd.isna(row[n]))]
        name = "baseline" if row["method"] == BASELINE else " ".join(words)
        name += f" on {labels[row['data']]}" if len(results.data) > 1 else ""
        found |= {f"{metric}/{name}": float(row[metric]) for metric in results.metrics}
    return found


def log_scores(trainer: lightning.Trainer, results: Results) -> None:
    """Gives every score to callbacks and all loggers but TensorBoard, which would draw a chart of one point for each.

    Every process must call it. With TensorBoard among the loggers, ``Trainer.validate`` returns empty dictionaries;
    ``callback.results`` and ``trainer.callback_metrics`` hold the scores.
    """
    scores = named_scores(results)
    others = [logger for logger in trainer.loggers if not isinstance(logger, TensorBoardLogger)]
    alone = len(others) < len(trainer.loggers)
    logged = False if alone else None  # None: by all loggers, if there are any
    trainer.lightning_module.log_dict(scores, logger=logged, add_dataloader_idx=False, sync_dist=True)
    for logger in others if alone and trainer.is_global_zero else ():
        logger.log_metrics(scores, trainer.global_step)
        logger.save()


def report_neurons(
    trainer: lightning.Trainer, calibration: Calibration, model: str, folder: Path | None, forms: Sequence[str]
) -> None:
    """Writes the files of the neurons, and gives TensorBoard histograms of their shapes."""
    if folder is None or not trainer.is_global_zero:
        return
    table = neurons.save(calibration, f"{base_name(model)} on {base_name(data_name(trainer))}", folder, forms)
    for name in ("skewness", "excess_kurtosis"):
        _histograms(trainer, f"neurons/{name}", table, name)


def report_attribution(
    trainer: lightning.Trainer, table: pd.DataFrame, folder: Path | None, forms: Sequence[str]
) -> None:
    """Writes the files of the attribution, and gives TensorBoard its figure and a histogram for each site."""
    if folder is None or not trainer.is_global_zero:
        return
    title = f"{base_name(str(trainer.lightning_module.name))} on {base_name(data_name(trainer))}"
    attributions.save(table, title, folder, forms)
    for writer in _tensorboards(trainer) if attributions.is_drawn(table) else ():
        writer.add_figure("attribution", attributions.plot(table, title))
    for method, own in table[table["level"] == "neuron"].groupby("method", sort=False):
        _histograms(trainer, f"attribution/{method}", own, "estimate")


def report_results(
    trainer: lightning.Trainer,
    results: Results,
    attribution: pd.DataFrame | None,
    folder: Path | None,
    forms: Sequence[str],
) -> str:
    """Writes the results' files, gives loggers options, figures and curves, and returns what to tell the user."""
    paths, notes = [], list[str]()
    if folder is not None:
        others = ["neurons.*", "heads.parquet", "attribution.*"]
        others += [CHECKPOINT] if trainer.state.fn == TrainerFn.FITTING else []
        paths = [*results.save(folder, forms), *(path for other in others for path in sorted(folder.glob(other)))]
    for writer in _tensorboards(trainer):
        for name, picture in results.pictures().items():
            if name.startswith(results.figure_name):
                writer.add_figure(name, picture())
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            if folder is not None and results.methods and not results.parts:
                paths.append(_curves(results, folder))
            notes = ["", f"TensorBoard: tensorboard --logdir {logger.root_dir}"]
        else:
            logger.log_hyperparams({name: results.facts[name] for name in _OPTIONS})
        pictures = [str(path) for path in paths if path.suffix == ".png"]
        if pictures and hasattr(logger, "log_image"):  # Weights & Biases and loggers like it
            logger.log_image(results.figure_name, pictures)
    opened = [] if folder is None else _page(results, attribution, folder)
    told = [str(results), *([attributions.lines(attribution)] if attribution is not None and len(attribution) else [])]
    told += [] if results.gathered is None else [results.gathered.lines()]
    return "\n".join(["", "\n\n".join(told), "", *opened, *map(str, paths), *notes])


def _page(results: Results, attribution: pd.DataFrame | None, folder: Path) -> list[str]:
    """Writes report.html; returns the command that opens it, or warns and returns none."""
    known = folder / "neurons.parquet"
    try:
        table = pd.read_parquet(known) if known.is_file() else None
        return [f"open {shlex.quote(str(page.write(folder, results, attribution, table)))}"]
    except Exception as error:  # of any kind: all that was measured is in the other files
        rank_zero_warn(
            f"could not write {folder / 'report.html'}: {' '.join(f'{type(error).__name__}: {error}'.split())}"
        )
        return []


def _tensorboards(trainer: lightning.Trainer) -> list[Any]:
    """The SummaryWriters of the Trainer's TensorBoard loggers."""
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _histograms(trainer: lightning.Trainer, name: str, table: pd.DataFrame, column: str) -> None:
    """Gives TensorBoard a histogram of the column for each site; the step is the index of the site."""
    for writer in _tensorboards(trainer):
        for index, (_, values) in enumerate(table.groupby("site", sort=False, observed=True)[column]):
            writer.add_histogram(name, values.to_numpy(), index)


def _curves(results: Results, folder: Path) -> Path:
    """Writes a TensorBoard run for each method, so that their curves overlay; the step is the percentage ablated."""
    from torch.utils.tensorboard import SummaryWriter

    curves = folder / "curves"
    for index, one in enumerate(results.each):
        summary = one.summary()
        for method in one.methods:
            own: Any = summary[summary["method"].isin([BASELINE, method])]
            with SummaryWriter(str(curves / results.suffixed(method, index))) as writer:
                for metric in one.metrics:
                    for share, value in zip(own["ablated"], own[metric], strict=True):
                        writer.add_scalar(f"ablation/{metric}", value, round(100 * share))
    return curves
