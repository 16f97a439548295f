"""How often 95% intervals hold the truth, where documents give several sequences.

``python -m tests.benchmarks.intervals RUN`` draws data sets from a pool that it makes of a run's examples, so that the
truth is known: documents of 1 to 8 sequences, whose scores correlate within a document. A row a number of clusters and
correlation: the share of intervals, in percent, that hold the pool's added cross-entropy of the first method at the
share closest to a half, and its difference from the second method; of single sequences drawn as if each were a
document; and of the same by documents.
"""

import argparse
from itertools import product

import numpy as np
import pandas as pd
from scipy.special import ndtr

from lightning_ablate import Results
from lightning_ablate.results.bootstrap import intervals


def pool_of(run):
    """Of every scored example its positions, added cross-entropy and difference of two methods, seeds averaged."""
    results = Results.load(run).each[0]
    one, other = results.methods[:2]
    table, sums = results.table, results.examples["cross_entropy"].to_numpy().reshape(len(results.table), -1)
    positions = results.examples["n"].to_numpy()[: sums.shape[1]]
    share = min(table["ablated"], key=lambda went: abs(went - 0.5))
    first, second = (sums[(table["method"] == name) & (table["ablated"] == share)].mean(0) for name in (one, other))
    return positions[positions > 0], np.stack([first - sums[0], first - second])[:, positions > 0]


def drawn(pool, documents, correlation, draw):
    """Positions, scores and documents of a data set; within a document ranks correlate by a normal copula."""
    positions, scores = pool
    document = np.repeat(np.arange(documents), draw.integers(1, 9, size=documents))
    shared, own = draw.standard_normal(documents)[document], draw.standard_normal(len(document))
    rank = ndtr(np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own) * len(positions)
    rank = rank.astype(int).clip(0, len(positions) - 1)
    found = [np.argsort(score / positions, kind="stable")[rank] for score in scores]
    return [positions[order] for order in found], [s[order] for s, order in zip(scores, found, strict=True)], document


def main():
    parser = argparse.ArgumentParser(description="Prints the coverage of intervals.")
    parser.add_argument("run", help="folder of a run with two methods or more")
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--clusters", type=int, nargs="+", default=[20, 50, 100, 200])
    given = parser.parse_args()
    pool, draw, rows = pool_of(given.run), np.random.default_rng(0), []
    for correlation, clusters in product((0.0, 0.25, 0.5), given.clusters):
        whole = drawn(pool, 200_000, correlation, draw)
        truth = [score.sum() / n.sum() for n, score in zip(whole[0], whole[1], strict=True)]
        held = np.zeros((2, 2))
        for _ in range(given.draws):
            positions, scores, document = drawn(pool, clusters, correlation, draw)
            for place, (n, score, true) in enumerate(zip(positions, scores, truth, strict=True)):
                for way, own in enumerate((np.arange(len(n)), document)):
                    (low,), (high,) = intervals(score[None], n, own)
                    held[way, place] += low <= true <= high
        rows.append([correlation, clusters, *(100 * held / given.draws).ravel()])
        names = ["correlation", "clusters", "added, by sequence", "difference, by sequence", "added", "difference"]
        print(pd.DataFrame(rows, columns=names).round(1).to_string(index=False), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
