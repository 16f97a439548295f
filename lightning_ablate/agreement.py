"""How well estimates of what units are worth agree with what was measured, and what measuring some tells of others."""

import warnings

import numpy as np
import pandas as pd
from scipy import stats

from lightning_ablate.seeds import seed_of

GROUP = ["method", "level", "kind"]  # what is picked and compared together


def picked(frame: pd.DataFrame, count: int, seed: int = 0) -> pd.DataFrame:
    """The units to verify, in each of ``GROUP``: ``count`` of the largest estimates and as many random others.

    They are rows of the frame, without whole sites and measured heads, with a column ``picked``: ``largest`` or
    ``random``.
    """
    left = (frame["level"] != "site") & ("verified" not in frame or frame["verified"].isna())
    found = [frame[:0].assign(picked="")]
    for group, rows in frame[left].groupby(GROUP, sort=False):
        largest = rows.nlargest(count, "estimate")
        others = rows.drop(largest.index)
        generator = np.random.default_rng(seed_of("verify", seed, *group))
        drawn = others.iloc[np.sort(generator.permutation(len(others))[:count])]
        found += [largest.assign(picked="largest"), drawn.assign(picked="random")]
    return pd.concat(found)


def scale_of(sums: np.ndarray) -> np.ndarray:
    """The factor of the second order with which the verified units' estimates add up to their effects; at least 0.

    The first order is exact for small changes. The second ranks units well, but it leaves out higher orders, which
    grow with it. The factor is a ratio estimate (Horvitz & Thompson 1952).

    Args:
        sums: ``(3, ...)`` float64, sums of what :func:`weighed` returns.

    Returns:
        ``(...)`` float64, NaN where there is no second order.
    """
    second, missing, first = sums
    known = second > 1e-9 * first  # more than rounding
    return np.divide(missing, second, out=np.full_like(second, np.nan), where=known).clip(0)


def weighed(verified: pd.DataFrame, count: int) -> np.ndarray:
    """Second order, effect minus first order, and size of the first order, ``(3, verified)``, each times a weight.

    The weight is the number of units, of ``count``, that a verified unit stands for: random ones for all that weren't
    picked by their size, others for themselves.
    """
    first, estimate, effect = verified[["first", "estimate", "verified"]].to_numpy(dtype=np.float64).T
    drawn = (verified["picked"] == "random").to_numpy()
    weights = np.where(drawn, (count - (~drawn).sum()) / max(1, drawn.sum()), 1.0)
    return weights * np.stack([estimate - first, effect - first, np.abs(first)])


def beyond(drawn: int, others: int) -> float:
    """The share of the others that may be worth more than the largest of so many random units, with 95% confidence.

    If a larger share were worth more, the chance that none of these is among the random ones would be at most 5%. The
    share is near ``1 − 0.05^(1/drawn)`` where there are many others.

    Example:
        >>> [round(beyond(8, others), 3) for others in (8, 100, 10_000)]
        [0.375, 0.32, 0.312]
    """
    count = np.arange(others + 1)  # of those that are worth more
    none_drawn = stats.hypergeom.pmf(0, drawn + others, count, drawn)
    return float(count[none_drawn > 0.05].max() / others)


def trust(frame: pd.DataFrame, resamples: int = 1000) -> pd.DataFrame:
    """How well estimates agree with verified effects: one row for each of ``GROUP`` with three verified units or more.

    Columns: units (number of verified ones), pearson, spearman, slope (of the effects on the estimates) and scale (see
    :func:`scale_of`). ``_low`` and ``_high`` are the ends of their 95% intervals, by a bootstrap over units. For the
    scale, units that were not drawn are in each sample. If random units were measured, largest_random is the largest
    effect of these, and beyond the share of the unmeasured units that may be worth more, see :func:`beyond`.
    """
    rows = []
    for group, every in frame.groupby(GROUP, sort=False):
        own = every.dropna(subset="verified")
        if len(own) < 3:
            continue
        pairs, parts = own[["estimate", "verified"]].to_numpy().T, weighed(own, len(every))
        random = own["picked"] == "random"
        fixed, others = parts[:, ~random], parts[:, random]
        generator = np.random.default_rng(0)
        places, again = (generator.integers(max(1, n), size=(resamples, n)) for n in (len(own), others.shape[1]))
        with warnings.catch_warnings(action="ignore"):  # a sample of a single unit has no correlation
            whole = [*_agreement(*pairs), scale_of(parts.sum(1))]
            sampled = [*_agreement(*pairs[:, places]), scale_of(fixed.sum(1)[:, None] + others[:, again].sum(2))]
            low, high = np.where(np.isnan(whole), np.nan, np.nanpercentile(sampled, [2.5, 97.5], axis=1))
        drawn, left = int(random.sum()), len(every) - len(own)
        more = [own["verified"][random].max(), beyond(drawn, left)] if drawn and left else [np.nan, np.nan]
        rows.append([*group, len(own), *np.stack([whole, low, high], 1).ravel(), *more])
    names = [f"{name}{end}" for name in ("pearson", "spearman", "slope", "scale") for end in ("", "_low", "_high")]
    return pd.DataFrame(rows, columns=[*GROUP, "units", *names, "largest_random", "beyond"])


def _agreement(estimate: np.ndarray, effect: np.ndarray) -> tuple[np.ndarray, ...]:
    """Pearson's and Spearman's correlation, and the slope of the effect on the estimate, along the last axis."""
    pearson = stats.pearsonr(estimate, effect, axis=-1).statistic
    spearman = stats.pearsonr(*(stats.rankdata(values, axis=-1) for values in (estimate, effect)), axis=-1).statistic
    return pearson, spearman, pearson * effect.std(-1) / estimate.std(-1)
