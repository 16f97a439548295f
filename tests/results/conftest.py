"""Results made up of random scores."""

import numpy as np
import pandas as pd
import pytest

from lightning_ablate.results import Results

HEADS = [(f"h.{layer}.attn.proj", head) for layer in (0, 1) for head in range(3)]


def make(methods=("zero", "peak"), fractions=(0.1, 0.5, 0.9, 1.0), seeds=(1, 2, 3), *, places=(), examples=40, **facts):
    """Conditions of methods by fractions and seeds (one at fraction 1), or of places (part, head) alone."""
    conditions = [("none", 0.0, None, "", None)]
    for method in methods:
        alone = [(method, 1.0, None, part, head) for part, head in places]
        drawn = [(method, f, s, "", None) for f in fractions for s in (seeds if f < 1 else [None])]
        conditions += alone if places else drawn
    table = pd.DataFrame(conditions, columns=["method", "fraction", "seed", "part", "head"])
    positions, count = np.random.default_rng(1).integers(0, 9, examples), len(table)
    generator, order = np.random.default_rng(0), {m: i for i, m in enumerate(methods)}
    frame = pd.DataFrame({"condition": np.repeat(np.arange(count), examples)})
    frame = frame.assign(example=np.tile(np.arange(examples) * 3, count), n=np.tile(positions, count))
    frame["cluster"] = frame["example"]
    hurt = np.repeat(table["fraction"].to_numpy() * (0.3 + 0.1 * generator.random(count)), examples)
    worse = np.repeat(table["method"].map(order).fillna(0).to_numpy() * 0.03, examples)
    noise = np.tile(generator.random(examples), count)
    frame["top1"] = np.rint(frame["n"] * np.clip(0.9 - hurt - worse - 0.2 * noise, 0, 1))
    frame["top5"] = np.rint((frame["top1"] + frame["n"]) / 2)
    frame["cross_entropy"] = frame["n"] * (0.5 + 3 * hurt + worse + noise + 0.2 * generator.random(len(frame)))
    frame["kl"] = frame["cross_entropy"] / 3
    for metric in ("top1", "top5", "cross_entropy", "kl"):
        table[metric] = frame[metric].to_numpy().reshape(count, -1).sum(1) / positions.sum()
    table = table.assign(model="a model", data="some, data", n=positions.sum(), ablated=table["fraction"])
    return Results(table, frame, {"classes": 10, "partial": [], **facts})


def own(results, method, fraction, metric="cross_entropy"):
    rows = [row for _, row in results.table.iterrows() if (row["method"], row["fraction"]) == (method, fraction)]
    return {row["seed"]: row[metric] for row in rows}


def plain(points, examples=None, **facts):
    """Results of (method, fraction, seed, cross-entropy) alone."""
    table = pd.DataFrame(points, columns=["method", "fraction", "seed", "cross_entropy"])
    table = table.assign(
        ablated=table["fraction"], model="m", data="d", part="", head=None, n=5, top1=1 - table["cross_entropy"] / 10
    )
    return Results(table.assign(top5=1.0, kl=0.0), examples, {"classes": 10, **facts})


def by_example(positions, *sums):
    """Examples of conditions whose four scores are the same."""
    count = len(positions)
    frame = pd.DataFrame({"condition": np.repeat(np.arange(len(sums)), count), "example": [*range(count)] * len(sums)})
    scores = np.concatenate(sums).astype(float)
    return frame.assign(
        cluster=frame["example"],
        n=np.tile(positions, len(sums)),
        top1=scores,
        top5=scores,
        cross_entropy=scores,
        kl=scores,
    )


@pytest.fixture(scope="session")
def made():
    return make
