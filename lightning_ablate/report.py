"""What a run leaves behind: files in its folder, curves and figures in Lightning's loggers, a text for the terminal."""

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

from lightning_ablate.calibration import Calibration
from lightning_ablate.conditions import Condition
from lightning_ablate.errors import DataError
from lightning_ablate.metrics import SweepMetrics
from lightning_ablate.results import Results, attributions
from lightning_ablate.results.folder import versions
from lightning_ablate.results.frames import BASELINE
from lightning_ablate.results.neurons import Neurons
from lightning_ablate.run import CHECKPOINT
from lightning_ablate.trainer import data_name

_OPTIONS = ("methods", "fractions", "seeds", "sites", "neurons", "attribution")  # that loggers get


def tabulated(
    conditions: Mapping[Condition, float],
    scored: Mapping[str, SweepMetrics],
    clusters: Sequence[Sequence[int] | None],
    model: str,
    facts: Mapping[str, Any],
) -> Results:
    """The results of a sweep, from its conditions and what they scored on each data set, by its name.

    ``conditions`` are by the share of neurons that each ablates; ``clusters`` say of each data set to which cluster
    each of its examples belongs, None where each is its own. run.json says ``facts``, time and versions.
    """
    rows, tables, examples = [(c.method, c.fraction, c.seed, c.part, c.head) for c in conditions], [], []
    for place, ((data, metrics), own) in enumerate(zip(scored.items(), clusters, strict=True)):
        found = {name: values.cpu().numpy() for name, values in metrics.means.items()}
        table = pd.DataFrame(rows, columns=["method", "fraction", "seed", "part", "head"])
        tables.append(table.assign(model=model, data=data, ablated=list(conditions.values()), **found))
        examples.append(_examples(metrics, range(place * len(rows), (place + 1) * len(rows)), own))
    known = [one for one in examples if one is not None]
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    now = {"words": shlex.join(sys.argv), "finished": finished, "versions": versions()}
    return Results(pd.concat(tables), pd.concat(known) if known else None, {**facts, **now})


def _examples(metrics: SweepMetrics, conditions: Sequence[int], clusters: Sequence[int] | None) -> pd.DataFrame | None:
    """What each example scored; None where they can't be told apart."""
    if metrics.by_example is None:
        return None
    n, sums = (values.cpu().numpy() for values in metrics.by_example)
    clusters = range(len(n)) if clusters is None else clusters
    if len(clusters) != len(n):
        raise DataError(f"the data's `clusters` are {len(clusters)}, expected one for each of {len(n)} examples")
    pairs = pd.MultiIndex.from_product([conditions, range(len(n))], names=["condition", "example"])
    scores = {name: sums[:, place].ravel() for place, name in enumerate(metrics.names)}
    same = {"cluster": np.tile(clusters, len(conditions)), "n": np.tile(n, len(conditions))}
    return pd.DataFrame(same | scores, index=pairs).reset_index()


def named_scores(results: Results) -> dict[str, float]:
    """Each condition's scores by a name of their own, as loggers take them: ``top1/mean 0.5 seed 42``."""
    found, labels = dict[str, float](), dict(zip(results.data, results.labels, strict=True))
    for row in results.table.to_dict("records"):
        where = row["part"] or f"{row['fraction']:g}"
        words = [row["method"], where, *(f"{n} {row[n]}" for n in ("head", "seed") if not pd.isna(row[n]))]
        name = "baseline" if row["method"] == BASELINE else " ".join(words)
        name += f" on {labels[row['data']]}" if len(results.data) > 1 else ""
        found |= {f"{metric}/{name}": float(row[metric]) for metric in results.metrics}
    return found


def report_neurons(
    trainer: lightning.Trainer, calibration: Calibration, model: str, folder: Path | None, forms: Sequence[str]
) -> None:
    """Writes the files of the neurons, and gives TensorBoard histograms of their shapes."""
    if folder is None or not trainer.is_global_zero:
        return
    neurons = Neurons.of(calibration, model, data_name(trainer))
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            neurons.to_tensorboard(logger.experiment)
    neurons.save(folder, forms)


def report_attribution(
    trainer: lightning.Trainer, table: pd.DataFrame, folder: Path | None, forms: Sequence[str]
) -> None:
    """Writes the files of the attribution, and gives TensorBoard its figure and a histogram a site."""
    if folder is None or not trainer.is_global_zero:
        return
    attributions.save(table, folder, forms)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure("attribution", attributions.plot(table))
            neurons = table[table["level"] == "neuron"]
            for method, own in neurons.groupby("method", sort=False):
                for place, (_, values) in enumerate(own.groupby("site", sort=False)["estimate"]):
                    logger.experiment.add_histogram(f"attribution/{method}", values.to_numpy(), place)


def report_results(
    trainer: lightning.Trainer,
    results: Results,
    attribution: pd.DataFrame | None,
    folder: Path | None,
    forms: Sequence[str],
) -> str:
    """Writes the results' files, gives loggers options, figure and curves, and returns what to tell the user."""
    paths, notes = [], list[str]()
    if folder is not None:
        others = ("neurons.*", "heads.parquet", "attribution.*", CHECKPOINT)
        paths = [*results.save(folder, forms), *(path for other in others for path in sorted(folder.glob(other)))]
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            for name, picture in results.pictures().items():
                if name.startswith(results.figure_name):
                    logger.experiment.add_figure(name, picture())
            if folder is not None and not results.parts:
                paths.append(_curves(results, folder))
            notes = ["", f"TensorBoard: tensorboard --logdir {logger.root_dir}"]
        else:
            logger.log_hyperparams({name: results.facts[name] for name in _OPTIONS})
        pictures = [str(path) for path in paths if path.suffix == ".png"]
        if pictures and hasattr(logger, "log_image"):  # Weights & Biases, and what is like it
            logger.log_image(results.figure_name, pictures)
    told = [str(results), *([attributions.lines(attribution)] if attribution is not None and len(attribution) else [])]
    return "\n".join(["", "\n\n".join(told), "", *map(str, paths), *notes])


def _curves(results: Results, folder: Path) -> Path:
    """Writes a TensorBoard run for each method, so that their curves overlay; the step is the percentage ablated."""
    from torch.utils.tensorboard import SummaryWriter

    curves = folder / "curves"
    for place, one in enumerate(results.each):
        summary = one.summary()
        for method in one.methods:
            own: Any = summary[summary["method"].isin(["none", method])]
            with SummaryWriter(str(curves / results.suffixed(method, place))) as writer:
                for metric in one.metrics:
                    for share, value in zip(own["ablated"], own[metric], strict=True):
                        writer.add_scalar(f"ablation/{metric}", value, round(100 * share))
    return curves
