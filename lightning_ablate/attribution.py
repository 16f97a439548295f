"""What every unit is worth: the estimated effect of ablating it alone, in nats, from a few backward passes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lightning_ablate.choices import Choice, Ranked, seed_of
from lightning_ablate.errors import ConfigError
from lightning_ablate.methods import AblationMethod, LearnedMethod
from lightning_ablate.metrics import Scored
from lightning_ablate.sites import Site, exact_device
from lightning_ablate.statistics import FOUND

BOUND = 25.0  # nats of an example at which what one position does to it levels off
_KEYS = ["method", "site", "level", "unit"]
GROUP = ["method", "level", "kind"]  # what is picked and compared together
SUMS = ("first", "second", "estimate", "square", "with_n")  # what is summed over the examples of each unit


@dataclass(frozen=True)
class Attributing:
    """How units are attributed: under which ``methods``, from how many ``draws``, how many of them are verified.

    ``examples`` is how many of the calibration data are used, the first ones by their indices, None for all; the
    ``seed`` is that of what methods draw. Of one's own ``metric``, if it is named, its loss is attributed, to first
    order, in place of what the cross-entropy gains. ConfigError for fewer than one draw or example.
    """

    methods: tuple[AblationMethod, ...] = ()
    draws: int = 8
    verify: int = 0
    examples: int | None = None
    seed: int = 0
    metric: str | None = None

    def __post_init__(self) -> None:
        """Checks the numbers."""
        if self.draws < 1 or self.verify < 0 or (self.examples is not None and self.examples < 1):
            raise ConfigError(
                f"draws is {self.draws}, verify {self.verify} and attribution_examples {self.examples}; expected "
                "at least 1, 0 and 1 (--ablation.draws, --ablation.verify, --ablation.attribution_examples)"
            )
        if (self.verify or self.metric is not None) and not self.methods:
            raise ConfigError(
                "verify and attribute_metric need attributions: name their methods (--ablation.attribute '[mean]')"
            )
        names = [method.name for method in self.methods]
        if len(set(names)) < len(names):
            raise ConfigError(f"attribute names {', '.join(names)}, expected each once (--ablation.attribute)")

    def check(self, choice: Choice, learned: Sequence[str], metrics: Sequence[str] = ()) -> None:
        """Raises ConfigError for methods that can't be attributed, and a choice by an attribution that isn't made.

        ``learned`` are the names of the methods whose values the run learns, ``metrics`` those of the module's own.
        """
        if self.metric not in (None, *metrics):
            raise ConfigError(
                f"the module has no metric {self.metric!r} (--ablation.attribute_metric), it has "
                f"{', '.join(metrics) or 'none of its own'}"
            )
        names = [method.name for method in self.methods]
        for method in self.methods:
            if not method.attributable or (isinstance(method, LearnedMethod) and method.name not in learned):
                raise ConfigError(
                    f"{method.name} can't be attributed: expected a method whose values don't depend on what else is "
                    "ablated, and one that learns in --ablation.methods as well (--ablation.attribute)"
                )
        if not (isinstance(choice, Ranked) and choice.by == "attribution"):
            return
        if set(names) & set(learned):
            raise ConfigError("neurons are ranked by an attribution, which waits for what is learned of such neurons")
        if (choice.under or next(iter(names), None)) not in names:
            raise ConfigError(
                f"neurons are ranked by the attribution under {choice.under or 'some method'}, expected it in "
                f"--ablation.attribute, which names {', '.join(names) or 'none'}"
            )

    def used(self, examples: Tensor) -> Tensor:
        """Which of a batch's examples are used, bool ``(batch,)``; none that only fills it."""
        return (examples >= 0) if self.examples is None else (examples >= 0) & (examples < self.examples)


def levels_of(site: Site) -> dict[str, int]:
    """The neurons of one unit of each level that a site has: those of a neuron, a head, the whole site."""
    heads = {"head": site.width // site.heads} if site.heads else {}
    return {"neuron": 1, **heads, "site": site.width}


def cotangents(scored: Scored, rows: Tensor, examples: Sequence[int], draws: int) -> Any:
    """Gradients with respect to the logits, ``(n, classes)``: of the cross-entropy, and then ``draws`` random ones.

    The random ones have mean 0 and the covariance ``diag(p) − p pᵀ`` of the gradients of cross-entropies whose labels
    are drawn from the target's own predictions p, position by position, so that squares of what comes back from them
    are unbiased estimates of the Fisher. Made of signs, they are less heavy-tailed than those of drawn labels. Signs
    depend on the example and the position, not on the batch. ``rows`` ``(n,)`` says where in the batch, whose
    ``examples`` these are, each position's example is; positions below 0 don't count.
    """
    counts = (rows >= 0).unsqueeze(1)
    probabilities = scored.logits.detach().float().softmax(1)
    truth = torch.zeros_like(probabilities).scatter_(1, scored.targets.unsqueeze(1), 1.0)
    yield ((probabilities - truth) * counts).to(scored.logits.dtype)
    del truth
    roots = probabilities.sqrt()
    for draw in range(draws):
        signed = torch.zeros_like(roots)
        for row, example in enumerate(examples):
            own = (rows == row).nonzero().squeeze(1)
            if len(own):
                generator = torch.Generator().manual_seed(seed_of("attribution", draw, example))
                signs = torch.randint(2, (len(own), roots.shape[1]), generator=generator, dtype=torch.int8)
                signed[own] = roots[own] * (2 * signs - 1).to(roots)
        yield (signed - probabilities * signed.sum(1, keepdim=True)).to(scored.logits.dtype)


def orders(moved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First and second orders of each example and unit, and the estimate, each ``(examples, units)`` float64.

    ``moved`` ``(1 + draws, examples, positions, units)`` is the change of what each cotangent stands for, by position.
    The estimate is the sum of both orders, to which a position whose own second order is ``½ E(g̃·δ)²`` nats adds less
    by ``1 / (1 + that / BOUND)``: a square goes on growing where the loss levels off, by the normalisations and the
    softmax behind a site, and a few positions, above all those that begin a text, would outweigh all others.
    """
    moved = moved.to(exact_device(moved.device))
    weight = 1 / (1 + moved[1:].square().mean(0) / (2 * BOUND))
    sums = (one.sum(2, dtype=torch.float64) for one in (moved, moved * weight))
    (first, second), bounded = ((one[0], 0.5 * one[1:].square().mean(0)) for one in sums)
    return first, second, bounded[0] + bounded[1]


def per_position(sums: Tensor, n: Tensor) -> Tensor:
    """``FOUND`` from the sums over examples ``(SUMS, units)``, ``(FOUND, units)`` float64, nats per scored position.

    ``n`` ``(2,)`` are the sums of the examples' scored positions and of their squares.
    """
    first, second, estimate, square, with_n = sums / n[0]
    if n[1] == n[0].square():  # a single example
        square = square + torch.nan
    spread = square - 2 * estimate * with_n + estimate.square() * n[1] / n[0]
    return torch.stack([first, second, estimate, (spread.clamp_min(0) / n[0]).sqrt()])


def table_of(attributed: Mapping[str, Mapping[Site, Tensor]], measured: Sequence[Sequence[Any]] = ()) -> pd.DataFrame:
    """A row a method and unit, from what was found by method and site ``(FOUND, units)``.

    Columns: method, site, kind (of the site), level (neuron, head or site), unit (its place in the site), and, in nats
    per scored position, first, second (order), estimate (their sum, bounded) and se, its standard error over the
    examples. Of what was ``measured`` also picked (``largest`` or ``random``), verified (the true effect) and
    verified_se; and calibrated, the estimate with what it adds to the first order scaled by what was measured of such
    units, see :func:`scale_of`, NaN where none was or there is no second order.
    """
    frames = []
    for method, by_site in attributed.items():
        for site, found in by_site.items():
            places = [(level, unit) for level, size in levels_of(site).items() for unit in range(site.width // size)]
            frame = pd.DataFrame(places, columns=["level", "unit"]).assign(
                method=method, site=site.name, kind=site.kind
            )
            frames.append(frame[[*_KEYS, "kind"]].assign(**dict(zip(FOUND, found.cpu().numpy(), strict=True))))
    table = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=[*_KEYS, "kind", *FOUND])
    if not measured:
        return table
    columns = [*_KEYS, "picked", "verified", "verified_se"]
    table = table.merge(pd.DataFrame(list(measured), columns=columns), how="left", on=_KEYS)
    for _, own in table.groupby(GROUP, sort=False):
        rows = own.dropna(subset="verified")
        scale = float(scale_of(*_weighed(rows, len(own))))
        table.loc[own.index, "calibrated"] = own["first"] + scale * (own["estimate"] - own["first"])
    return table


def scale_of(first: np.ndarray, estimate: np.ndarray, verified: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What makes ``first + scale * (estimate - first)`` add up to the truth, as the measured units tell; at least 0.

    The first order is right by its definition, and what the second adds by its shape more than its size: higher orders
    grow with it. All are ``(..., measured)``, the scale ``(...,)``, NaN where there is no second order. It is a ratio
    estimate with units weighted by what they stand for (Horvitz & Thompson 1952).
    """
    second, missing = (weights * (estimate - first)).sum(-1), (weights * (verified - first)).sum(-1)
    told = second > 1e-9 * (weights * np.abs(first)).sum(-1)  # more than rounding
    return np.divide(missing, second, out=np.full_like(second, np.nan), where=told).clip(0)


def _weighed(measured: pd.DataFrame, whole: int) -> tuple[np.ndarray, ...]:
    """First order, estimate, truth and weights, each ``(measured,)``.

    A weight is how many of ``whole`` units one stands for: the largest for themselves, the others for the rest.
    """
    largest = (measured["picked"] == "largest").to_numpy()
    weights = np.where(largest, 1.0, (whole - largest.sum()) / max(1, (~largest).sum()))
    return *measured[["first", "estimate", "verified"]].to_numpy().T, weights


def picked(frame: pd.DataFrame, count: int, seed: int = 0) -> pd.DataFrame:
    """``count`` of the largest estimates, and as many random others, of each of ``GROUP``, but for whole sites.

    The rows of the table with a column ``picked``: ``largest`` or ``random``.
    """
    found = []
    for group, rows in frame[frame["level"] != "site"].groupby(GROUP, sort=False):
        largest = rows.nlargest(count, "estimate")
        others = rows.drop(largest.index)
        generator = np.random.default_rng(seed_of("verify", seed, *group))
        drawn = others.iloc[np.sort(generator.permutation(len(others))[:count])]
        found += [largest.assign(picked="largest"), drawn.assign(picked="random")]
    return pd.concat(found)


def trust(frame: pd.DataFrame, draws: int = 1000) -> pd.DataFrame:
    """How far the estimates agree with what was measured: a row for each of ``GROUP``.

    Its columns are units (measured), pearson, spearman, slope (of the truth on the estimate) and scale (see
    :func:`scale_of`), each with ``_low`` and ``_high``, the ends of the 95% interval of a bootstrap over the units;
    recall, the share of the units whose true effect is at least the median of the largest estimates' that are among
    these, by the random sample's share; and missed, the largest true effect in the random sample, whose estimates are
    smaller.
    """
    rows = []
    for group, every in frame.groupby(GROUP, sort=False):
        own = every.dropna(subset="verified")
        if len(own) < 3:
            continue
        weighed = _weighed(own, len(every))
        _, estimate, true, weights = weighed
        largest, draw = (own["picked"] == "largest").to_numpy(), np.random.default_rng(0)
        again = np.tile(np.arange(len(own)), (1 + draws, 1))  # the units themselves, and behind them the samples
        stratified, others = again.copy(), np.flatnonzero(~largest)  # the largest are there in any sample
        again[1:] = draw.integers(len(own), size=(draws, len(own)))
        stratified[1:, others] = others[draw.integers(max(1, len(others)), size=(draws, len(others)))]
        row: dict[str, Any] = {**dict(zip(GROUP, group, strict=True)), "units": len(own)}
        for name, measure in (("pearson", _pearson), ("spearman", _spearman), ("slope", _slope), ("scale", scale_of)):
            given, samples = (weighed, stratified) if name == "scale" else ((estimate, true), again)
            with np.errstate(all="ignore"):
                row[name], *sampled = measure(*(values[samples] for values in given))
            ends = [np.nan] * 2 if np.isnan(row[name]) else np.nanpercentile(sampled, [2.5, 97.5])
            row[f"{name}_low"], row[f"{name}_high"] = ends
        row["recall"] = _recall(true, largest, weights)
        row["missed"] = true[~largest].max() if (~largest).any() else np.nan
        rows.append(row)
    return pd.DataFrame(rows)


def _recall(true: np.ndarray, largest: np.ndarray, weights: np.ndarray) -> float:
    """By what units stand for the share of truly large ones that are among the largest estimates."""
    large = weights * (true >= np.median(true[largest])) if largest.any() else np.zeros_like(true)
    return float(large[largest].sum() / large.sum()) if large.any() else float("nan")


def _pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    return (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _pearson(*(pd.DataFrame(values).rank(axis=1).to_numpy() for values in (x, y)))


def _slope(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    return (x * y).sum(1) / (x * x).sum(1)
