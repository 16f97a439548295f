"""Intervals of ratios of sums, from a bootstrap over clusters of examples."""

import numpy as np
from scipy.special import ndtr, stdtrit

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
    counted, ends = positions > 0, np.full((2, len(sums)), np.nan)
    order = np.argsort(clusters[counted], kind="stable")
    firsts = np.flatnonzero(np.diff(clusters[counted][order], prepend=np.nan))
    count = len(firsts)
    if count < 2:
        return ends
    low = ndtr(np.sqrt(count / (count - 1)) * stdtrit(count - 1, (1 - _LEVEL) / 2))
    for start in range(0, len(sums), _COLUMNS):
        own = slice(start, start + _COLUMNS)
        columns = np.column_stack([positions[counted], sums[own, counted].T]).astype(np.float64)
        columns = np.add.reduceat(columns[order], firsts, axis=0)
        generator, ratios = np.random.default_rng(0), []
        with np.errstate(invalid="ignore"):  # an infinite cross-entropy has no interval
            for _ in range(_RESAMPLES // _AT_A_TIME):
                drawn = generator.multinomial(count, np.full(count, 1 / count), size=_AT_A_TIME)
                totals = drawn.astype(np.float64) @ columns
                ratios.append(totals[:, 1:] / totals[:, :1])
            ends[:, own] = np.quantile(np.concatenate(ratios), [low, 1 - low], axis=0, overwrite_input=True)
    return ends
