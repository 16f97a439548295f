"""Results made up of random scores."""

import numpy as np
import pandas as pd
import pytest

from lightning_ablate.results import Results

METRICS = ("top1", "top5", "cross_entropy", "kl")


def _made(
    methods=("zero", "peak"),
    fractions=(0.1, 0.5, 0.9, 1.0),
    seeds=(1, 2, 3),
    *,
    places=(),
    examples=40,
    seed=0,
    **facts,
):
    """Conditions of methods by fractions and seeds (one at fraction 1), or of places (part, head) alone."""
    conditions = [("none", 0.0, None, "", None)]
    for method in methods:
        if places:
            conditions += [(method, 1.0, None, part, head) for part, head in places]
        else:
            conditions += [(method, f, s, "", None) for f in fractions for s in (seeds if f < 1 else [None])]
    table = pd.DataFrame(conditions, columns=["method", "fraction", "seed", "part", "head"])
    positions = np.random.default_rng(1).integers(0, 9, examples)
    generator = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "condition": np.repeat(np.arange(len(table)), examples),
            "example": np.tile(np.arange(examples) * 3, len(table)),
            "n": np.tile(positions, len(table)),
        }
    )
    hurt = np.repeat(table["fraction"].to_numpy() * (0.3 + 0.1 * generator.random(len(table))), examples)
    order = {m: i for i, m in enumerate(methods)}
    worse = np.repeat(table["method"].map(order).fillna(0).to_numpy() * 0.03, examples)
    noise = np.tile(generator.random(examples), len(table))
    frame["top1"] = np.rint(frame["n"] * np.clip(0.9 - hurt - worse - 0.2 * noise, 0, 1))
    frame["top5"] = np.rint((frame["top1"] + frame["n"]) / 2)
    frame["cross_entropy"] = frame["n"] * (0.5 + 3 * hurt + worse + noise + 0.2 * generator.random(len(frame)))
    frame["kl"] = frame["cross_entropy"] / 3
    for metric in METRICS:
        table[metric] = frame[metric].to_numpy().reshape(len(table), -1).sum(1) / positions.sum()
    table = table.assign(model="a model", data="some, data", n=positions.sum())
    return Results(table, frame, {"classes": 10, "partial": [], **facts})


@pytest.fixture(scope="session")
def made():
    """A maker of results."""
    return _made


@pytest.fixture(autouse=True)
def _not_drawn():
    """Here figures are looked at."""
