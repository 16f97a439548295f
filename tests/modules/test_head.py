"""Logits of the scored positions alone, against those of whole passes."""

import pytest
import torch
from torch import nn

from lightning_ablate import Attribution, CausalLM, MaskedLM, PairedLM, Seq2SeqLM
from lightning_ablate.modules.head import may_select
from lightning_ablate.phases import AttributionPhase
from lightning_ablate.run import Run
from tests import tiny

KINDS = [(CausalLM, tiny.gpt2), (PairedLM, tiny.mistral), (MaskedLM, tiny.roberta), (Seq2SeqLM, tiny.t5)]


def batch_of(kind):
    batch, real = tiny.tokens(), tiny.tokens()["attention_mask"].bool()
    if kind is MaskedLM:
        chosen = torch.arange(16) % 4 == 3
        return batch | {"labels": torch.where(chosen & real, batch["input_ids"], -100)}
    if kind is Seq2SeqLM:
        return batch | {"labels": torch.where(real, batch["input_ids"].roll(3, 1), -100)[:, :9]}
    last, answer, foil = torch.tensor([[13, 15, 7], [5, 6, 7], [8, 9, 5]])
    return batch | {"last": last, "answer": answer, "foil": foil} if kind is PairedLM else batch


@pytest.mark.parametrize(("kind", "make"), KINDS)
def test_the_output_embedding_reads_the_scored_positions_alone(kind, make):
    module, batch, read = tiny.built(kind.of(make())), batch_of(kind), []
    with torch.no_grad():
        whole = module.evaluate(batch)
        module.on_train_batch_start(batch, 0)
        assert module.selects
        forward = module.target.get_output_embeddings().forward
        module.target.get_output_embeddings().forward = lambda x: read.append(x.shape[:-1].numel()) or forward(x)
        found = module.evaluate(batch)
    assert read == [len(whole.logits)] and len(whole.logits) < 3 * 16
    torch.testing.assert_close(found.logits, whole.logits, rtol=1e-6, atol=1e-6)
    for name in ("targets", "example", "position"):
        assert torch.equal(getattr(found, name), getattr(whole, name))


@pytest.mark.parametrize(("kind", "make"), KINDS)
def test_attributions_are_those_of_whole_passes(kind, make):
    module, batch, found = tiny.built(kind.of(make())), batch_of(kind), []
    calibration = tiny.calibrated(module.target)
    for module.selects in (False, True):
        run = Run("", calibration)
        phase = AttributionPhase(module, run, Attribution(["zero"], draws=2), 0)
        phase.step(batch, 0)
        found.append(torch.cat([sums for sums in phase.sums["zero"].values()], 1))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert bool(found[0].any())


def test_a_batch_without_a_scored_position_runs_all_the_same():
    module, batch = tiny.built(CausalLM.of(tiny.gpt2())), tiny.tokens()
    for module.selects in (False, True):
        scored = module.evaluate(batch | {"index": torch.full((3,), -1)})
        assert scored.logits.shape == (0, tiny.VOCABULARY)


class Shifted(nn.Module):
    """A target that does with its logits what a choice of positions would change, or refuse."""

    def __init__(self, after):
        super().__init__()
        self.head, self.after = nn.Linear(4, 6), after

    def get_output_embeddings(self):
        return self.head

    def forward(self, x):
        return self.after(self.head(x))


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (lambda logits: logits.tanh(), True),
        (lambda logits: logits - logits.mean(1, keepdim=True), False),  # over the positions
        (lambda logits: logits.roll(1, 1), False),
        (lambda logits: logits.view(1, 8, 6), False),
        (lambda logits: logits.mean(1), False),  # a classifier
    ],
)
def test_what_does_more_with_its_logits_is_run_whole(after, expected):
    target, x = Shifted(after), torch.randn(1, 8, 4)
    assert may_select(target, lambda: target(x)) is expected
    target.get_output_embeddings = lambda: None
    assert may_select(target, lambda: target(x)) == (target(x).ndim == 3)  # and read everywhere


def test_whoever_reads_the_output_embeddings_input_gets_all_of_it():
    module, batch, seen = tiny.built(CausalLM.of(tiny.gpt2())), tiny.tokens(), []
    module.selects = True
    handle = module.target.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:2]))
    found = module.evaluate(batch)
    handle.remove()
    assert seen == [(3, 16)] and torch.allclose(found.logits, module.evaluate(batch).logits, atol=1e-6)
