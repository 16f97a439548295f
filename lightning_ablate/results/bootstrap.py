"""Intervals and tests of ratios of sums over clusters of examples."""

import numpy as np
from scipy.special import ndtr, stdtr, stdtrit

ENOUGH = 20  # clusters; with fewer, the true coverage of a 95% interval is below 95%
_RESAMPLES, _AT_A_TIME, _MISSED = 2_000, 100, 0.05
_COLUMNS = 1_024  # scores at a time, for memory


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
    low = ndtr(np.sqrt(count / (count - 1)) * stdtrit(count - 1, _MISSED / 2))
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


def sequences(sums: np.ndarray, positions: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """The ends of 95% confidence sequences: intervals that hold together at however many examples one looks.

    They are those of Waudby-Smith et al. 2024 ("Time-uniform central limit theory and asymptotic confidence
    sequences"), with the linearised error of :func:`p_values` and clusters in the order of their first examples. They
    are tightest where half of all clusters are seen. Arguments and return are as for :func:`intervals`; the examples
    seen are those with scored positions, and one that was not seen counts as a cluster to come.
    """
    means, errors, left = _linear(sums, positions, clusters)
    total = 2 * np.log(1 / _MISSED)
    shape = 1 + (total + np.log(total + 1)) * left.shape[1] / (len(np.unique(clusters)) / 2)
    half = errors * np.sqrt(2 * shape / (shape - 1) * np.log(np.sqrt(shape) / _MISSED))
    return np.stack([means - half, means + half])


def carrying(sums: np.ndarray, positions: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """How many clusters the standard errors rest on, ``(scores,)``; arguments as for :func:`intervals`.

    It is ``(Σ r²)² / Σ r⁴``, with the deviations r of the clusters: all of them if they are alike, and one if one
    outweighs all others. Where few carry an error, more of their kind may come, and the error is too small.
    """
    squares = np.square(_linear(sums, positions, clusters)[2])
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(squares.sum(1) ** 2 / np.square(squares).sum(1))


def p_values(sums: np.ndarray, positions: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Two-sided p-values ``(scores,)`` of scores per position against 0; arguments as for :func:`intervals`.

    The standard error is that of a ratio of sums over clusters, linearised (Cochran 1977, "Sampling techniques"). The
    score divided by it is compared with a t distribution of one degree of freedom less than there are clusters.
    """
    found = np.empty(len(sums))
    for start in range(0, len(sums), _COLUMNS):
        own = slice(start, start + _COLUMNS)
        means, errors, left = _linear(sums[own], positions, clusters)
        with np.errstate(divide="ignore", invalid="ignore"):
            found[own] = np.where(means == 0, 1.0, 2 * stdtr(left.shape[1] - 1, -np.abs(means / errors)))
    return found


def _linear(sums: np.ndarray, positions: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores per position, their standard errors, ``(scores,)`` each, and what clusters deviate by ``(scores, n)``."""
    order, firsts = _clustered(positions, clusters)
    n, totals = (np.add.reduceat(one[..., order], firsts, axis=-1) for one in (positions.astype(float), sums))
    means, count = totals.sum(-1) / n.sum(), len(firsts)
    left = totals - means[:, None] * n
    with np.errstate(divide="ignore", invalid="ignore"):  # a single cluster has no error
        return means, np.sqrt(count / np.float64(count - 1) * np.square(left).sum(-1)) / n.sum(), left


def _clustered(positions: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The examples with scored positions, cluster after cluster, and where in this order each cluster begins."""
    counted = np.flatnonzero(positions > 0)
    order = counted[np.argsort(clusters[counted], kind="stable")]
    return order, np.flatnonzero(np.diff(clusters[order], prepend=np.nan))
