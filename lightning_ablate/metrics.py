"""What a condition scores, per scored position."""

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

# float32 logits scored at a time: what a core's cache holds, or enough to keep a GPU busy
_CHUNK_BYTES = {"cpu": 2**20, "cuda": 2**28}


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


def scores(logits: Tensor, targets: Tensor, clean: Tensor) -> Scores:
    """Scores logits against the targets and against the clean logits, a few rows at a time in float32.

    Equal logits rank by their class index, as argmax ranks them, so that low-precision ties flatter nobody.

    Args:
        logits: ``(n, classes)``, floating.
        targets: ``(n,)`` int64.
        clean: ``(n, classes)``, the logits of the same positions with nothing ablated.

    Example:
        >>> logits = torch.tensor([[2.0, 1.0, 0.0]])
        >>> score = scores(logits, torch.tensor([1]), clean=logits)
        >>> bool(score.top1), bool(score.top5), round(score.cross_entropy.item(), 4), score.kl.item()
        (False, True, 1.4076, 0.0)
    """
    rows = max(1, _CHUNK_BYTES.get(logits.device.type, 2**24) // (4 * logits.shape[1]))
    chunks = zip(*(torch.split(column, rows) for column in (logits, targets, clean)), strict=True)
    parts = [_scores(*chunk) for chunk in chunks]
    return Scores(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _scores(logits: Tensor, targets: Tensor, clean: Tensor) -> Scores:
    logits, clean, index = logits.float(), clean.float(), targets.unsqueeze(1)
    right = logits.gather(1, index)
    before = torch.arange(logits.shape[1], device=logits.device) < index
    rank = ((logits > right) | ((logits == right) & before)).sum(1)
    total, clean_total = logits.logsumexp(1), clean.logsumexp(1)
    probability = (clean - clean_total.unsqueeze(1)).exp()
    # 0 log 0 is 0: classes that the clean target rules out (logit -inf) add nothing
    gain = torch.where(probability > 0, probability * (clean - logits), 0.0).sum(1)
    kl = (gain + total - clean_total).clamp_min(0)  # the rounding of a tiny divergence can fall below 0
    return Scores(rank < 1, rank < 5, total - right.squeeze(1), kl)


class SweepMetrics(Metric):
    """Sums over the scored positions for every condition of a sweep.

    One metric for all conditions, so that ranks merge in one reduction. Counts are int64, sums float64.

    Args:
        conditions: how many there are.

    Example:
        >>> metrics = SweepMetrics(conditions=1)
        >>> logits = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
        >>> scored = Scored(logits, targets=torch.tensor([0, 0]), example=torch.tensor([0, 1]))
        >>> metrics.update(0, scored, clean=logits)
        >>> metrics.compute()["top1"].tolist()
        0.5
    """

    full_state_update = False
    n: Tensor
    top1: Tensor
    top5: Tensor
    cross_entropy: Tensor
    kl: Tensor

    def __init__(self, conditions: int) -> None:
        super().__init__()
        for name in ("n", "top1", "top5"):
            self.add_state(name, torch.zeros(conditions, dtype=torch.int64), dist_reduce_fx="sum", persistent=True)
        for name in ("cross_entropy", "kl"):
            self.add_state(name, torch.zeros(conditions, dtype=torch.float64), dist_reduce_fx="sum", persistent=True)

    def update(self, condition: int, scored: Scored, clean: Tensor) -> None:
        """Adds what one condition scored on one batch.

        Args:
            condition: its index.
            scored: of the ablated target.
            clean: the logits ``(n, classes)`` of the same positions with nothing ablated.
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

    def compute(self) -> dict[str, Tensor]:
        """See :attr:`figures`."""
        return self.figures

    @property
    def figures(self) -> dict[str, Tensor]:
        """``n`` ``(conditions,)`` int64, and the means over n: top1, top5 (fractions), cross_entropy, kl (nats)."""
        means = {name: getattr(self, name).double() / self.n for name in ("top1", "top5", "cross_entropy", "kl")}
        return {"n": self.n, **means}
