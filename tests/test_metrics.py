import pytest
import torch
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_ablate import metrics as module
from lightning_ablate.metrics import Clean, Scored, SweepMetrics
from lightning_ablate.metrics import scores as scores_of


def case(n=200, classes=50, dtype=torch.float32):
    logits, clean = (3 * torch.randn(2, n, classes)).to(dtype)
    return logits, clean, torch.randint(classes, (n,))


def cleaned(logits, targets):
    return Clean.of(Scored(logits, targets, torch.arange(len(logits))))


def scores(logits, targets, clean):
    return scores_of(logits, targets, cleaned(clean, targets))


@pytest.mark.parametrize("chunk", [1, 1000, 2**20])
def test_scores_equal_torch(monkeypatch, chunk):
    monkeypatch.setitem(module._CHUNK_BYTES, "cpu", chunk)
    logits, clean, targets = case()
    found = scores(logits, targets, clean)
    assert torch.equal(found.top1, logits.argmax(1) == targets)
    top5 = multiclass_accuracy(logits, targets, num_classes=50, top_k=5, average="micro")
    torch.testing.assert_close(found.top5.float().mean(), top5)
    torch.testing.assert_close(found.cross_entropy, F.cross_entropy(logits, targets, reduction="none"))
    kl = F.kl_div(logits.log_softmax(1), clean.log_softmax(1), reduction="none", log_target=True).sum(1)
    torch.testing.assert_close(found.kl, kl, rtol=1e-4, atol=5e-6)


def test_kl_of_a_target_with_itself_is_exactly_zero():
    logits, _, targets = case()
    assert bool((scores(logits, targets, logits.clone()).kl == 0).all())


def test_equal_logits_rank_as_argmax_ranks_them():
    logits = torch.zeros(1, 8, dtype=torch.bfloat16)
    ranks = [scores(logits, torch.tensor([target]), logits) for target in range(8)]
    assert [bool(score.top1) for score in ranks] == [True] + [False] * 7
    assert [bool(score.top5) for score in ranks] == [True] * 5 + [False] * 3


def test_classes_that_the_clean_target_rules_out_add_nothing():
    logits, clean, targets = case(n=4, classes=6)
    ruled_out = clean.clone()
    ruled_out[:, 5] = -torch.inf
    targets[:] = 0
    found = scores(logits, targets, ruled_out).kl
    p = ruled_out[:, :5].softmax(1)
    expected = (p * (p.log() - logits.log_softmax(1)[:, :5])).sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    both = logits.clone()
    both[:, 5] = -torch.inf
    assert bool(scores(both, targets, ruled_out).kl.isfinite().all())


def test_nan_logits_do_not_hide():
    logits, clean, targets = case()
    logits[7, 3] = torch.nan
    found = scores(logits, targets, clean)
    assert bool(found.cross_entropy[7].isnan()) and bool(found.kl[7].isnan()) and not bool(found.top1[7])


def test_sweep_metrics_average_over_the_scored_positions_alone():
    sweep, kept = SweepMetrics(3), torch.rand(200) < 0.6
    logits, clean, targets = case()
    example = torch.where(kept, torch.arange(200), -1)
    logits[~kept] = torch.nan
    for part in torch.arange(200).split(64):
        sweep.update(1, Scored(logits[part], targets[part], example[part]), cleaned(clean[part], targets[part]))
    found = {name: value[1].item() for name, value in sweep.compute().items()}
    assert found["n"] == int(kept.sum())
    assert found["top1"] == pytest.approx((logits.argmax(1) == targets)[kept].double().mean().item())
    assert found["cross_entropy"] == pytest.approx(F.cross_entropy(logits[kept], targets[kept]).item(), rel=1e-6)
    assert sweep.compute()["n"].tolist() == [0, int(kept.sum()), 0]


def test_counts_and_sums_keep_their_dtypes():
    sweep = SweepMetrics(2)
    logits, clean, targets = case(dtype=torch.bfloat16)
    sweep.update(0, Scored(logits, targets, torch.arange(200)), cleaned(clean, targets))
    assert {sweep.n.dtype, sweep.top1.dtype, sweep.top5.dtype} == {torch.int64}
    assert {sweep.cross_entropy.dtype, sweep.kl.dtype} == {torch.float64}
