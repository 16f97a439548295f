"""The conditions of a run, and how the sweep applies them."""

from unittest.mock import Mock

import pytest
import torch
from torch.nn import functional

from lightning_ablate import AblationMethod, Mean, Peak, Random, ResampleIds, Zero
from lightning_ablate.conditions import BASELINE, Condition
from lightning_ablate.errors import NonFiniteError, SiteError, StatisticsError
from lightning_ablate.methods import Affine
from lightning_ablate.phases import SweepPhase
from lightning_ablate.run import Run
from lightning_ablate.sweep import Sweep
from tests import reference, tiny

SEEDS = [42, 123, 456]


def conditions_of(methods, fractions, seeds):
    return Sweep(methods, fractions, seeds, Random()).conditions([])


def sweep_of(
    model,
    methods=(Zero(), Mean(), Peak()),
    fractions=(0.5, 1.0),
    seeds=(1, 2),
    module=None,
    examples=0,
    calibrated=None,
):
    calibration, sweep = tiny.calibrated(model, *(calibrated or methods)), Sweep(methods, fractions, seeds, Random())
    return SweepPhase(module or tiny.Ran(model), Run("", calibration), sweep, [examples], sweep.conditions([]))


def test_every_distinct_condition_comes_once():
    fractions = [0, 0.0, *(step / 10 for step in range(1, 11)), 0.5]
    found = conditions_of([Zero(), ResampleIds()], fractions, [*SEEDS, 42])
    assert len(found) == len(set(found)) == 1 + 28 + 30 and found[0] == BASELINE
    whole = [(c.method, c.seed) for c in found if c.fraction == 1.0]
    assert whole == [("zero", None), *(("resample-ids", seed) for seed in SEEDS)]  # which draws something else from it


@pytest.mark.parametrize("make", [tiny.gpt2, tiny.mistral, tiny.roberta, tiny.vit])
def test_nothing_ablated_changes_no_bit_and_zero_everywhere_equals_projections_without_weights(make):
    """A projection whose weight is 0 gives its bias alone, as it does for an input of 0."""
    model, other = make(), make()
    clean, sweep = tiny.run(model), sweep_of(model)
    for site in tiny.sites(other):
        torch.nn.init.zeros_(other.get_submodule(site.name).weight)
    with sweep.applied(BASELINE):
        assert torch.equal(tiny.run(model), clean)
    with pytest.raises(RuntimeError, match="in the pass"), sweep.applied(Condition(1.0, method="zero")):
        found = tiny.run(model)
        raise RuntimeError("in the pass")
    assert torch.equal(tiny.run(model), clean) and reference.hooks(model) == 0
    torch.testing.assert_close(found, tiny.run(other), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, clean, atol=1e-2)


def test_a_step_runs_every_condition_and_source_once_and_compares_with_the_clean_logits_of_the_batch():
    model, batch, found = tiny.gpt2(), tiny.tokens(), []
    module = tiny.Own(model)
    module.target, module.evaluate = model, Mock(wraps=module.evaluate)
    module.source = Mock(side_effect=lambda kind, seed, batch: tiny.tokens(1, seed=seed))
    sweep = sweep_of(model, (Zero(), ResampleIds()), (0.5,), SEEDS, module, examples=3)
    for number in (0, 0):  # what an earlier run has done is passed over
        sweep.step(batch, number)
    assert module.evaluate.call_count == 7 + 3
    assert [call.args[:2] for call in module.source.call_args_list] == [("ids", seed) for seed in SEEDS]
    masks = {site.name: Random().mask(sweep.conditions[1], site) for site in tiny.sites(model)}
    for replace in ({}, {path: reference.put(mask, torch.zeros(16)) for path, mask in masks.items()}):
        with torch.no_grad(), reference.plain_hooks(model, replace):
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        found.append(logits[:, :-1].double().log_softmax(-1))
    kl = functional.kl_div(found[1], found[0], reduction="none", log_target=True).sum(2)
    n, sums = sweep.metrics.by_example
    assert n.tolist() == batch["attention_mask"][:, 1:].sum(1).tolist() and not bool(sums[0, 3].any())
    torch.testing.assert_close(sums[1, 3], (kl * batch["attention_mask"][:, 1:]).sum(1), rtol=1e-5, atol=1e-6)


def test_constants_are_computed_once_a_site_and_what_there_is_no_memory_for_is_made_anew():
    class Huge(Affine):
        nbytes = 2**31

    class Once(Mean):
        name, values = "once", Mock(return_value=torch.zeros(16))

    class Anew(AblationMethod):
        name, prepare = "anew", Mock(return_value=Huge(torch.zeros(16)))

    with pytest.warns(match="values of 4 of 9 conditions don't fit .* again for every batch"):
        sweep = sweep_of(tiny.gpt2(), (Once(), Anew()), [0.5], [1, 2, 3, 4])
    assert (Once.values.call_count, Anew.prepare.call_count) == (2, 2 * 4)
    sweep.step(None, 0)
    assert (Once.values.call_count, Anew.prepare.call_count) == (2, 2 * 8)


def test_missing_statistics_a_site_that_runs_twice_or_never_and_logits_that_are_not_finite_are_refused():
    model = tiny.gpt2()
    with pytest.raises(StatisticsError, match="the method 'peak' needs the statistic Histogram of the site"):
        sweep_of(model, [Peak()], calibrated=[Mean()])
    sweep = sweep_of(model)
    with pytest.raises(SiteError, match="h.0.attn.c_proj ran 0 times"), sweep.applied(sweep.conditions[1]):
        pass
    with pytest.raises(SiteError, match="ran 2 times in one forward pass"), sweep.applied(sweep.conditions[1]):
        tiny.run(model), tiny.run(model)
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    with pytest.raises(NonFiniteError, match=r"logits under 'baseline' are NaN or infinite \(10 of 10 conditions"):
        sweep.step(None, 0)
