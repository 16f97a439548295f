"""From the sums of a sweep to the table of its results."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd

from lightning_ablate.conditions import Condition
from lightning_ablate.metrics import METRICS, SweepMetrics
from lightning_ablate.results.folder import versions
from lightning_ablate.results.table import Results


def tabulated(
    conditions: Sequence[Condition], metrics: SweepMetrics, model: str, data: str, facts: Mapping[str, Any]
) -> Results:
    """The results of a sweep, from its conditions and what they scored; run.json says ``facts``, time and versions."""
    found = {name: values.cpu().numpy() for name, values in metrics.means.items()}
    rows = [(c.method, c.fraction, c.seed, c.part, c.head) for c in conditions]
    table = pd.DataFrame(rows, columns=["method", "fraction", "seed", "part", "head"])
    table = table.assign(model=model, data=data, **found)
    now = {"finished": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions()}
    return Results(table, _examples(metrics, len(rows)), {**facts, **now})


def _examples(metrics: SweepMetrics, conditions: int) -> pd.DataFrame | None:
    """What each example scored; None where they can't be told apart."""
    if metrics.by_example is None:
        return None
    n, sums = (values.cpu().numpy() for values in metrics.by_example)
    pairs = pd.MultiIndex.from_product([range(conditions), range(len(n))], names=["condition", "example"])
    scores = {name: sums[:, place].ravel() for place, name in enumerate(METRICS)}
    return pd.DataFrame({"n": np.tile(n, conditions), **scores}, index=pairs).reset_index()
