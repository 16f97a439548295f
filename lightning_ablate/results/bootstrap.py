"""Intervals of ratios of sums, from a bootstrap over examples."""

import numpy as np

_RESAMPLES, _AT_A_TIME, _ENDS = 2_000, 100, (0.025, 0.975)
_COLUMNS = 4_096  # whose ratios are held at a time


def intervals(sums: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The ends of the 95% intervals of scores per position, by the percentile bootstrap (Efron & Tibshirani 1993).

    Examples are drawn with replacement, the same ones for all scores; a score is a sum over the examples drawn by the
    number of their scored positions. The ends are ``(2, scores)`` float64, NaN where fewer than two examples count.

    Args:
        sums: ``(scores, examples)`` float64, each score's sum over the scored positions of each example.
        positions: ``(examples,)``, how many of each example's positions were scored; those with none are left out.
    """
    counted, ends = positions > 0, np.full((2, len(sums)), np.nan)
    examples = int(counted.sum())
    for start in range(0, len(sums) if examples > 1 else 0, _COLUMNS):
        own = slice(start, start + _COLUMNS)
        columns = np.column_stack([positions[counted], sums[own, counted].T]).astype(np.float64)
        generator, ratios = np.random.default_rng(0), []
        with np.errstate(invalid="ignore"):  # an infinite cross-entropy has no interval
            for _ in range(_RESAMPLES // _AT_A_TIME):
                drawn = generator.multinomial(examples, np.full(examples, 1 / examples), size=_AT_A_TIME)
                totals = drawn.astype(np.float64) @ columns
                ratios.append(totals[:, 1:] / totals[:, :1])
            ends[:, own] = np.quantile(np.concatenate(ratios), _ENDS, axis=0, overwrite_input=True)
    return ends
