"""What a condition scores, per scored position."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric

# float32 logits scored at a time: what a core's cache holds, or enough to keep a GPU busy
_CHUNK_BYTES = {"cpu": 2**22, "cuda": 2**28}


class Scored(NamedTuple):
    """What a target says at the scored positions of a batch.

    Attributes:
        logits: ``(n, classes)``, floating.
        targets: ``(n,)`` int64, the right classes.
        example: ``(n,)`` int64, which example of the data each position belongs to; positions below 0 don't count.
    """

    logits: Tensor
    targets: Tensor
    example: Tensor


class Scores(NamedTuple):
    """The scores of each position, ``(n,)``: top1 and top5 bool; cross_entropy and kl float32, nats."""

    top1: Tensor
    top5: Tensor
    cross_entropy: Tensor
    kl: Tensor


class Clean(NamedTuple):
    """What the target says of a batch with nothing ablated, made once for all conditions.

    Attributes:
        probabilities: ``(n, classes)`` float32.
        surprise: ``(n,)`` float32, their entropy, in nats.
        rules_out: whether some class has no probability at all, its logit being -inf.
    """

    probabilities: Tensor
    surprise: Tensor
    rules_out: bool

    @classmethod
    def of(cls, scored: Scored) -> "Clean":
        """The same positions' probabilities and their entropy."""
        logits, targets, _ = scored
        probabilities = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
        for own, chunk in zip(_chunks(probabilities), _chunks(logits), strict=True):
            torch.softmax(chunk.float(), 1, out=own)
        rules_out = bool((probabilities == 0).any()) and bool((logits == -torch.inf).any())
        parts = [_scores(*chunk, rules_out=rules_out) for chunk in _chunks(logits, targets, probabilities)]
        return cls(probabilities, torch.cat([surprise for _, _, surprise in parts]), rules_out)


def scores(logits: Tensor, targets: Tensor, clean: Clean) -> Scores:
    """Scores logits against the targets and against the clean target, a few rows at a time in float32.

    Equal logits rank by their class index, as argmax ranks them, so that low-precision ties flatter nobody.

    Args:
        logits: ``(n, classes)``, floating.
        targets: ``(n,)`` int64.
        clean: what the target says of the same positions with nothing ablated.

    Example:
        >>> logits, targets = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([1])
        >>> score = scores(logits, targets, Clean.of(Scored(logits, targets, torch.tensor([0]))))
        >>> bool(score.top1), bool(score.top5), round(score.cross_entropy.item(), 4), score.kl.item()
        (False, True, 1.4076, 0.0)
    """
    parts = [_scores(*chunk, rules_out=clean.rules_out) for chunk in _chunks(logits, targets, clean.probabilities)]
    rank, cross_entropy, surprise = (torch.cat(column) for column in zip(*parts, strict=True))
    # of two that are nearly alike the rounding can fall below 0
    return Scores(rank < 1, rank < 5, cross_entropy, (surprise - clean.surprise).clamp_min(0))


def _chunks(*columns: Tensor) -> Any:
    """The columns, the first and last of which may have as many columns as there are classes, a few rows at a time."""
    rows = max(1, _CHUNK_BYTES.get(columns[0].device.type, 2**24) // (4 * columns[0].shape[1]))
    split = [torch.split(column, rows) for column in columns]
    return zip(*split, strict=True) if len(split) > 1 else split[0]


def _scores(logits: Tensor, targets: Tensor, clean: Tensor, *, rules_out: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The rank of the target among the classes, its cross-entropy, and that of the clean probabilities, ``(n,)``."""
    logits, index = logits.float(), targets.unsqueeze(1)
    right = logits.gather(1, index)
    rank = (logits > right).sum(1, dtype=torch.int32)
    tied = (logits >= right).sum(1, dtype=torch.int32) > rank + 1
    if logits.is_cuda or bool(tied.any()):  # a GPU need not wait for the answer
        before = torch.arange(logits.shape[1], device=logits.device) < index
        rank += ((logits == right) & before).sum(1, dtype=torch.int32)
    cross_entropy = functional.cross_entropy(logits, targets, reduction="none")
    # 0 log 0 is 0: classes that the clean target rules out (logit -inf) add nothing
    expected = torch.linalg.vecdot(clean, logits.masked_fill(clean == 0, 0.0) if rules_out else logits)
    return rank, cross_entropy, cross_entropy + right.squeeze(1) - expected


class SweepMetrics(Metric):
    """Sums over the scored positions for every condition of a sweep.

    One metric for all conditions, so that ranks merge in one reduction. Counts are int64, sums float64.

    Args:
        conditions: how many there are.
        examples: how many there are, to keep what each of them scored as well, ``n_by_example`` ``(examples,)`` int64,
            ``top1_by_example`` and ``cross_entropy_by_example`` ``(conditions, examples)`` float64; 0 keeps none.

    Example:
        >>> metrics = SweepMetrics(conditions=1)
        >>> logits = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
        >>> scored = Scored(logits, targets=torch.tensor([0, 0]), example=torch.tensor([0, 1]))
        >>> metrics.update(0, scored, Clean.of(scored))
        >>> metrics.compute()["top1"].tolist()
        0.5
    """

    full_state_update = False
    n: Tensor
    top1: Tensor
    top5: Tensor
    cross_entropy: Tensor
    kl: Tensor
    n_by_example: Tensor
    top1_by_example: Tensor
    cross_entropy_by_example: Tensor
    elsewhere: Tensor

    def __init__(self, conditions: int, examples: int = 0) -> None:
        super().__init__()
        self.examples = examples
        counts = torch.zeros(examples, dtype=torch.int64)
        self.add_state("n_by_example", counts, dist_reduce_fx="sum", persistent=True)
        self.add_state("elsewhere", counts.new_zeros(()), dist_reduce_fx="sum", persistent=True)
        for name in ("top1_by_example", "cross_entropy_by_example"):
            sums = torch.zeros(conditions, examples, dtype=torch.float64)
            self.add_state(name, sums, dist_reduce_fx="sum", persistent=True)
        for name in ("n", "top1", "top5"):
            self.add_state(name, torch.zeros(conditions, dtype=torch.int64), dist_reduce_fx="sum", persistent=True)
        for name in ("cross_entropy", "kl"):
            self.add_state(name, torch.zeros(conditions, dtype=torch.float64), dist_reduce_fx="sum", persistent=True)

    def update(self, condition: int, scored: Scored, clean: Clean) -> None:
        """Adds what one condition scored on one batch.

        Args:
            condition: its index.
            scored: of the ablated target.
            clean: the same positions with nothing ablated.
        """
        counts = scored.example >= 0
        score = scores(scored.logits, scored.targets, clean)
        sums = {
            "n": counts.sum(),
            "top1": (score.top1 & counts).sum(),
            "top5": (score.top5 & counts).sum(),
            "cross_entropy": torch.where(counts, score.cross_entropy, 0.0).sum(dtype=torch.float64),
            "kl": torch.where(counts, score.kl, 0.0).sum(dtype=torch.float64),
        }
        for name, value in sums.items():  # all of them, or none where the memory was not enough
            getattr(self, name)[condition] += value
        if self.examples:
            self._add_by_example(condition, scored.example, counts, score)

    def _add_by_example(self, condition: int, example: Tensor, counts: Tensor, score: Scores) -> None:
        inside = counts & (example < self.examples)
        place = torch.where(inside, example, 0)
        for name, values in (("top1", score.top1), ("cross_entropy", score.cross_entropy)):
            values = torch.where(inside, values, 0).double()
            getattr(self, f"{name}_by_example")[condition].index_add_(0, place, values)
        if condition == 0:  # all conditions score the same positions
            self.n_by_example.index_add_(0, place, inside.long())
            self.elsewhere += (counts & ~inside).sum()

    def compute(self) -> dict[str, Tensor]:
        """See :attr:`figures`."""
        return self.figures

    @property
    def figures(self) -> dict[str, Tensor]:
        """``n`` ``(conditions,)`` int64, and the means over n: top1, top5 (fractions), cross_entropy, kl (nats)."""
        means = {name: getattr(self, name).double() / self.n for name in ("top1", "top5", "cross_entropy", "kl")}
        return {"n": self.n, **means}
