"""Intervals and tests of ratios of sums over clusters of examples."""

import numpy as np
from scipy.special import ndtr, stdtr, stdtrit

ENOUGH = 20  # clusters; with fewer, the true coverage of a 95% interval is below 95%
_RESAMPLES, _AT_A_TIME, _LEVEL = 2_000, 100, 0.95
_COLUMNS = 4_096  # scores whose resampled ratios are in memory at a time


def intervals(sums: np.ndarray, positions: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """The ends of 95% intervals of scores per position, by the percentile bootstrap (Efron & Tibshirani 1993).

    Clusters are drawn with replacement, the same ones for all scores, because examples of one document are alike. A
    score is its sum over the drawn examples, divided by their number of scored positions. The percentiles are those of
    a t distribution, which widens the intervals of few clusters (Hesterberg 2015, "What teachers should know about the
    bootstrap", expanded percentiles).

    Args:
        sums: ``(scores, examples)`` float64, each score summed over the scored positions of each example.
        positions: ``(examples,)``, the number of scored positions; examples with none are left out.
        clusters: ``(examples,)``, equal for examples of one cluster.

    Returns:
        ``(2, scores)`` float64, the low and the high ends; NaN with fewer than two clusters.
    """
    ends, (order, firsts) = np.full((2, len(sums)), np.nan), _clustered(positions, clusters)
    count = len(firsts)
    if count < 2:
        return ends
    low = ndtr(np.sqrt(count / (count - 1)) * stdtrit(count - 1, (1 - _LEVEL) / 2))
    for start in range(0, len(sums), _COLUMNS):
        own = slice(start, start + _COLUMNS)
        columns = np.column_stack([positions[order], sums[own, order].T]).astype(np.float64)
        columns = np.add.reduceat(columns, firsts, axis=0)
        generator, ratios = np.random.default_rng(0), []
        with np.errstate(invalid="ignore"):  # an infinite cross-entropy has no interval
            for _ in range(_RESAMPLES // _AT_A_TIME):
                drawn = generator.multinomial(count, np.full(count, 1 / count), size=_AT_A_TIME)
                totals = drawn.astype(np.float64) @ columns
                ratios.append(totals[:, 1:] / totals[:, :1])
            ends[:, own] = np.quantile(np.concatenate(ratios), [low, 1 - low], axis=0, overwrite_input=True)
    return ends


def p_values(sums: np.ndarray, positions: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Two-sided p-values ``(scores,)`` of scores per position against 0; arguments as for :func:`intervals`.

    The standard error is that of a ratio of sums over clusters, linearised (Cochran 1977, "Sampling techniques"). The
    score divided by it is compared with a t distribution of one degree of freedom less than there are clusters.
    """
    order, firsts = _clustered(positions, clusters)
    n, totals = (np.add.reduceat(one[..., order], firsts, axis=-1) for one in (positions.astype(float), sums))
    means, count = totals.sum(-1, keepdims=True) / n.sum(), len(firsts)
    errors = np.sqrt(count / (count - 1) * np.square(totals - means * n).sum(-1)) / n.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(means[:, 0] == 0, 1.0, 2 * stdtr(count - 1, -np.abs(means[:, 0] / errors)))


def _clustered(positions: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The examples with scored positions, cluster after cluster, and where in this order each cluster begins."""
    counted = np.flatnonzero(positions > 0)
    order = counted[np.argsort(clusters[counted], kind="stable")]
    return order, np.flatnonzero(np.diff(clusters[order], prepend=np.nan))
