"""What a condition scores."""

import pytest
import torch
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_ablate.metrics import METRICS, Clean, Scored, SweepMetrics
from lightning_ablate.metrics import scores as scores_of


def case(n=200, classes=50, dtype=torch.float32):
    logits, clean = (3 * torch.randn(2, n, classes)).to(dtype)
    return logits, clean, torch.randint(classes, (n,))


def cleaned(logits, targets):
    return Clean.of(Scored(logits, targets, torch.arange(len(logits))))


def scores(logits, targets, clean):
    return scores_of(logits, targets, cleaned(clean, targets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "classes"), [(200, 50), (9, 50_000), (37, 262_144)])  # a few rows are scored at a time
def test_scores_equal_torch_in_float64(n, classes, dtype):
    logits, clean, targets = case(n, classes, dtype)
    targets[::2] = logits.argmax(1)[::2]
    found = scores(logits, targets, clean)
    assert torch.equal(found.top1, logits.argmax(1) == targets)
    top5 = multiclass_accuracy(logits, targets, num_classes=classes, top_k=5, average="micro")
    torch.testing.assert_close(found.top5.float().mean(), top5)
    exact = F.cross_entropy(logits.double(), targets, reduction="none")
    torch.testing.assert_close(found.cross_entropy, exact, rtol=0, atol=1e-6)
    kl = F.kl_div(logits.double().log_softmax(1), clean.double().log_softmax(1), reduction="none", log_target=True)
    torch.testing.assert_close(found.kl, kl.sum(1), rtol=5e-7, atol=1e-6)  # float32 logits, and up to 20 nats
    assert bool((scores(logits, targets, logits.clone()).kl == 0).all())  # exactly


def test_autocast_makes_no_score_less_precise():
    logits, clean, targets = case(9, 5_000)
    with torch.autocast("cpu", torch.bfloat16):
        found = scores(logits, targets, clean)
    assert all(map(torch.equal, found, scores(logits, targets, clean)))


def test_equal_logits_rank_as_argmax_ranks_them():
    logits = torch.zeros(1, 8, dtype=torch.bfloat16)
    found = scores(logits.expand(8, 8), torch.arange(8), logits.expand(8, 8))
    assert found.top1.tolist() == [True] + [False] * 7 and found.top5.tolist() == [True] * 5 + [False] * 3


def test_classes_that_the_clean_target_rules_out_add_nothing_and_nan_does_not_hide():
    logits, ruled_out, targets = case(n=4, classes=6)
    ruled_out[:, 5], targets[:] = -torch.inf, 0
    p = ruled_out[:, :5].softmax(1)
    expected = (p * (p.log() - logits.log_softmax(1)[:, :5])).sum(1)
    torch.testing.assert_close(scores(logits, targets, ruled_out).kl.float(), expected, rtol=1e-5, atol=1e-6)
    logits[:, 5] = -torch.inf
    assert bool(scores(logits, targets, ruled_out).kl.isfinite().all())
    logits[3, 2], sweep = torch.nan, SweepMetrics(2)  # which doesn't hide
    found = scores(logits, targets, ruled_out)
    assert bool(found.cross_entropy[3].isnan()) and bool(found.kl[3].isnan()) and not bool(found.top1[3])
    sweep.update(1, Scored(logits, targets, torch.arange(4)), cleaned(ruled_out, targets))
    assert sweep.finite.tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sweep_sums_by_example_over_the_scored_positions_alone(dtype):
    logits, clean, targets = case(dtype=dtype)
    example, sweep, fewer, none = torch.randint(-1, 9, (200,)), *(SweepMetrics(3, known) for known in (9, 5, 0))
    each = torch.stack([column.double() for column in scores(logits, targets, clean)])
    logits[example < 0] = torch.nan  # what only fills a batch
    for part in torch.arange(200).split(64):
        for place, own in ((0, clean), (2, logits)):
            scored = Scored(own[part], targets[part], example[part])
            for metrics in (sweep, fewer, none):
                metrics.update(place, scored, cleaned(clean[part], targets[part]))
    n, sums = sweep.by_example
    assert n.tolist() == [int((example == own).sum()) for own in range(9)] and n.dtype == torch.int64
    expected = torch.stack([each[:, example == own].sum(1) for own in range(9)], 1)
    torch.testing.assert_close(sums[2], expected, rtol=1e-12, atol=1e-12)
    assert not bool(sums[1].any()) and not bool(sums[0, METRICS.index("kl")].any())
    means = torch.stack([sweep.means[name][2] for name in METRICS])
    torch.testing.assert_close(means, each[:, example >= 0].mean(1), rtol=1e-12, atol=0)
    for other in (fewer, none):  # of which some, or all, don't know the examples
        assert other.by_example is None and int(other.means["n"]) == int(n.sum())
        torch.testing.assert_close(other.sums.sum(2), sums.sum(2), rtol=1e-12, atol=0)
    assert fewer.n.tolist() == [*n[:5].tolist(), int(n[5:].sum())] and none.n.tolist() == [int(n.sum())]
