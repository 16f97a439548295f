"""What a condition scores, per scored position."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_ablate.errors import DataError
from lightning_ablate.sites import exact_device

# bytes of float32 logits scored at a time: they fit in a core's cache, or keep a GPU busy
_CHUNK_BYTES = {"cpu": 2**22, "cuda": 2**28}
_COLUMNS = "model data method other fraction to seed seeds part head n condition example kept q".split()
_PIECE = 4096  # classes whose terms are summed in float32; the sums of pieces are summed in float64


class Scored(NamedTuple):
    """What a target says at the n scored positions of a batch."""

    logits: Tensor  # (n, classes), floating
    targets: Tensor  # (n,) int64, the right classes
    example: Tensor  # (n,) int64, the example of the data that each position belongs to, below 0 if it doesn't count
    extra: Mapping[str, Tensor] = {}  # (n,) values of each of the module's own `metrics`; results hold their means
    position: Tensor | None = None  # (n,) int64, the place whose activations predict; None where all of them do


def checked(scored: Any, extra: Sequence[str] = ()) -> Scored:
    """What ``evaluate`` gave, if its shapes, targets and ``extra`` metrics are as declared; else DataError."""
    if not (isinstance(scored, tuple) and 3 <= len(scored) <= 5):
        raise DataError(
            f"`evaluate` gave a {type(scored).__name__}, expected Scored(logits, targets, example): logits (n, "
            "classes), targets (n,) and the examples' indices (n,) of the n scored positions"
        )
    scored = Scored(*scored)
    logits, targets, example, own, position = scored
    made = {f"{metric}_{end}" for metric in (*METRICS, *extra) for end in ("low", "high", "sd", "q")}
    if taken := [name for name in extra if name in (*_COLUMNS, *METRICS, *made) or extra.count(name) > 1]:
        raise DataError(f"the module's `metrics` name {taken[0]!r}, which results call another column; expected others")
    if tuple(own) != tuple(extra) or any(values.shape != targets.shape for values in own.values()):
        given = {name: tuple(values.shape) for name, values in own.items()}
        raise DataError(
            f"`evaluate` gave the extra metrics {given}, expected {', '.join(extra) or 'none'}, each of them "
            f"({len(targets)},), as Scored's `extra`, which the module's `metrics` names in the same order"
        )
    rows = [targets, example] if position is None else [targets, example, position]
    if logits.ndim != 2 or any(tensor.shape != logits.shape[:1] for tensor in rows):
        shapes = [tuple(tensor.shape) for tensor in (logits, *rows)]
        raise DataError(f"`evaluate` gave the shapes {shapes}, expected (n, classes), (n,) and (n,)")
    if len(targets) and not bool(((targets >= 0) & (targets < logits.shape[1])).all()):
        raise DataError(
            f"the labels run from {int(targets.min())} to {int(targets.max())}, expected targets from 0 to "
            f"{logits.shape[1] - 1}, the target's classes; do data and target belong together?"
        )
    return scored


class Scores(NamedTuple):
    """The scores of each position, ``(n,)``: top1 and top5 bool; cross_entropy and kl float64, nats."""

    top1: Tensor
    top5: Tensor
    cross_entropy: Tensor
    kl: Tensor


METRICS = Scores._fields  # columns of all tables, in this order


class Clean(NamedTuple):
    """What the intact target says of a batch, computed once for all conditions."""

    probabilities: Tensor  # (n, classes) float32
    entropy: Tensor  # (n,) float64, in nats
    rules_out: bool  # whether the logit of some class is -inf

    @classmethod
    def of(cls, scored: Scored) -> "Clean":
        """Computed from the scored positions of the intact target."""
        logits, targets = scored.logits, scored.targets
        probabilities = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
        for own, chunk in zip(_chunks(probabilities), _chunks(logits), strict=True):
            torch.sub(chunk.float(), chunk.amax(1, keepdim=True), out=own)
            total = _log_total(own)
            own.div_(total.exp().float().to(own.device).unsqueeze(1))
        rules_out = bool((probabilities == 0).any()) and bool((logits == -torch.inf).any())
        parts = [_scores(*chunk, rules_out=rules_out) for chunk in _chunks(logits, targets, probabilities)]
        return cls(probabilities, torch.cat([entropy for _, _, entropy in parts]), rules_out)


def scores(logits: Tensor, targets: Tensor, clean: Clean) -> Scores:
    """Scores logits against the targets and against the intact target, a few rows at a time in float32.

    Equal logits rank by class index, as in argmax, so ties of a low precision don't make a score better.
    """
    parts = [_scores(*chunk, rules_out=clean.rules_out) for chunk in _chunks(logits, targets, clean.probabilities)]
    rank, cross_entropy, against_clean = (torch.cat(column) for column in zip(*parts, strict=True))
    # rounding can make the difference of two nearly equal numbers negative
    return Scores(rank < 1, rank < 5, cross_entropy, (against_clean - clean.entropy).clamp_min(0))


def _chunks(*columns: Tensor) -> Any:
    """Splits the tensors into chunks of rows that fit in the cache."""
    rows = max(1, _CHUNK_BYTES.get(columns[0].device.type, 2**24) // (4 * columns[0].shape[1]))
    split = [torch.split(column, rows) for column in columns]
    return zip(*split, strict=True) if len(split) > 1 else split[0]


def _scores(logits: Tensor, targets: Tensor, clean: Tensor, *, rules_out: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The target's rank among the classes, the cross-entropy, and the one against the ``clean`` probabilities."""
    logits, index = logits.float(), targets.unsqueeze(1)
    right = logits.gather(1, index)
    side = (logits - right).sign_()  # 1 for larger logits, -1 for smaller ones; comparisons would take longer
    above = side.sum(1)
    apart = side.abs_().sum(1)  # exact: whole numbers up to 2^24
    rank = (0.5 * (above + apart)).nan_to_num(float(logits.shape[1])).int()
    if logits.is_cuda or bool((apart < logits.shape[1] - 1).any()):  # a GPU need not wait for the answer
        before = torch.arange(logits.shape[1], device=logits.device) < index
        rank += ((logits == right) & before).sum(1, dtype=torch.int32)
    largest = logits.amax(1, keepdim=True)
    below = logits - largest
    # 0 log 0 is 0: classes to which the intact target gives a logit of -inf add nothing
    told = below.masked_fill(clean == 0, 0.0) if rules_out else below
    pieces = zip(torch.split(clean, _PIECE, 1), torch.split(told, _PIECE, 1), strict=True)
    # not a matrix product, whose precision autocast and TF32 lower
    expected = _moved(torch.stack([(one * other).sum(1) for one, other in pieces])).sum(0, dtype=torch.float64)
    total = _log_total(below)
    return rank, total + (_moved(largest).double() - _moved(right).double()).squeeze(1), total - expected


def _log_total(below: Tensor) -> Tensor:
    """The logarithm of the sum of exponentials, ``(n,)`` float64; ``below`` ``(n, classes)`` is written over."""
    sums = [piece.sum(1) for piece in torch.split(below.exp_(), _PIECE, 1)]
    return _moved(torch.stack(sums)).sum(0, dtype=torch.float64).log()


def _moved(values: Tensor) -> Tensor:
    return values.to(exact_device(values.device))


class SweepMetrics(Metric):
    """Sums of the scores of every example under every condition of a sweep; all ranks merge in one reduction.

    ``examples`` is their number, 0 if it isn't known; ``extra`` are the names of metrics of one's own.
    """

    full_state_update = False
    sums: Tensor  # (conditions, names, examples + 1); unknown examples are in the last column
    n: Tensor  # (examples + 1,) scored positions

    def __init__(self, conditions: int, examples: int = 0, extra: Sequence[str] = ()) -> None:
        super().__init__()
        self.conditions, self.examples, self.names = conditions, examples, (*METRICS, *extra)
        # made in `reset`, as torchmetrics keeps a copy of a state's first value
        self.add_state("sums", torch.zeros(0, dtype=torch.float64), dist_reduce_fx="sum", persistent=True)
        self.add_state("n", torch.zeros(examples + 1, dtype=torch.int64), dist_reduce_fx="sum", persistent=True)
        self.reset()

    def reset(self) -> None:
        """Forgets all scores, see :meth:`torchmetrics.Metric.reset`."""
        super().reset()
        self.sums = self.sums.new_zeros(self.conditions, len(self.names), self.examples + 1)

    def update(self, condition: int, scored: Scored, clean: Clean) -> None:
        """Adds the scores of one batch under the condition of this index; 0 is the baseline."""
        example = scored.example.to(self.n.device)
        counts = example >= 0
        place = torch.where(counts & (example < self.examples), example, self.examples)
        columns = [*scores(scored.logits, scored.targets, clean), *scored.extra.values()]
        each = torch.stack([column.to(self.n.device).double() for column in columns])
        self.sums[condition].index_add_(1, place, torch.where(counts, each, 0.0))
        if condition == 0:  # the same positions under all conditions
            self.n.index_add_(0, place, counts.long())

    def compute(self) -> dict[str, Tensor]:
        """See :attr:`means`."""
        return self.means

    @property
    def means(self) -> dict[str, Tensor]:
        """``n`` ``()`` int64, and ``(conditions,)`` means over n, by their names."""
        n = self.n.sum()
        return {"n": n, **dict(zip(self.names, (self.sums.sum(2) / n).unbind(1), strict=True))}

    @property
    def by_example(self) -> tuple[Tensor, Tensor] | None:
        """``n`` ``(examples,)`` and ``sums`` ``(conditions, names, examples)``; None if some example is unknown."""
        return None if not self.examples or int(self.n[-1]) else (self.n[:-1], self.sums[..., :-1])

    @property
    def finite(self) -> Tensor:
        """Whether the scores of each condition are finite, ``(conditions,)`` bool."""
        return self.sums.isfinite().all(2).all(1)
