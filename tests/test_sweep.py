from collections import Counter

import pytest
import torch

from lightning_ablate.calibration import Calibration
from lightning_ablate.errors import ConfigError, NonFiniteError, SiteError, StatisticsError
from lightning_ablate.masks import RandomNeurons
from lightning_ablate.methods import Mean, Peak, ResampleIds, Zero
from lightning_ablate.metrics import Clean, Scored
from lightning_ablate.sweep import BASELINE, Condition, Prepared, Sweep, check_conditions, distinct_conditions
from tests import tiny
from tests.test_sites import hooks
from tests.tiny import run

TENTHS = [step / 10 for step in range(1, 11)]
SEEDS = [42, 123, 456]
ALL = [tiny.gpt2, tiny.mistral, tiny.roberta, tiny.vit]


def everywhere(site):
    return None


def conditions_of(methods, fractions, seeds):
    return distinct_conditions(methods, RandomNeurons().selections([], sorted(fractions), seeds), seeds)


def calibrated(model, epochs=2, methods=(Zero(), Mean(), Peak())):
    kinds = [kind for method in methods for kind in method.statistics]
    calibration = Calibration(model, kinds)
    calibration.find(lambda: run(model))
    for epoch in range(epochs):
        calibration.start(epoch)
        with calibration.collecting(everywhere):
            run(model)
        calibration.finish()
    return calibration


def sweep_of(model, methods=(Zero(), Mean(), Peak()), fractions=(0.5, 1.0), seeds=(1, 2)):
    sweep = Sweep(calibrated(model), methods, conditions_of(methods, fractions, seeds))
    sweep.prepare()
    return sweep


def test_every_distinct_condition_comes_once():
    found = conditions_of([Zero(), Mean(), Peak()], TENTHS, SEEDS)
    assert len(found) == len(set(found)) == 1 + 3 * 28
    assert Counter(condition.method for condition in found) == {"none": 1, "zero": 28, "mean": 28, "peak": 28}
    assert [c for c in found if c.fraction == 1.0] == [Condition(m, 1.0, None) for m in ("zero", "mean", "peak")]
    assert found[0] == BASELINE


def test_a_seed_that_matters_at_fraction_one_is_kept():
    found = conditions_of([ResampleIds()], [0.5, 1.0], SEEDS)
    assert [c.seed for c in found if c.fraction == 1.0] == SEEDS


def test_repeated_fractions_and_seeds_and_fraction_zero_add_nothing():
    assert conditions_of([Zero()], [0, 0.5, 0.5, 0.0], [1, 1]) == [BASELINE, Condition("zero", 0.5, 1)]


@pytest.mark.parametrize(
    ("methods", "fractions", "seeds", "message"),
    [
        ([Zero()], [1.2], [1], "fractions holds 1.2, expected a share"),
        ([Zero()], [-0.1], [1], "fractions holds -0.1"),
        ([Zero()], [float("nan")], [1], "fractions holds nan"),
        ([], [0.5], [1], "methods is empty"),
        ([Zero()], [], [1], "fractions is empty"),
        ([Zero()], [0.5], [], "seeds is empty"),
        ([Zero(), Zero()], [0.5], [1], r"\['zero'\] more than once"),
    ],
)
def test_conditions_that_make_no_sense_are_refused(methods, fractions, seeds, message):
    with pytest.raises(ConfigError, match=message):
        check_conditions(methods, fractions, seeds)


@pytest.mark.parametrize("make", ALL)
def test_nothing_ablated_leaves_the_logits_bit_identical(make):
    model = make()
    clean, sweep = run(model), sweep_of(model)
    with sweep.applied(BASELINE):
        assert torch.equal(run(model), clean)
    # also by way of the hooks, with a mask that takes nothing
    nothing, made = Condition("none", 0.0, 7), sweep._prepared[Condition("peak", 0.5, 1)].hooks
    masked = {site: (torch.zeros_like(mask), replace) for site, (mask, replace) in made.items()}
    sweep._prepared[nothing] = Prepared(masked, {})
    with sweep.applied(nothing):
        assert torch.equal(run(model), clean)
    with sweep.applied(Condition("peak", 0.5, 1)):
        assert not torch.equal(run(model), clean)
    assert torch.equal(run(model), clean) and hooks(model) == 0


@pytest.mark.parametrize("make", ALL)
def test_zero_at_fraction_one_equals_projections_without_weights(make):
    """A projection whose weight is 0 gives its bias alone, as it does for an input of 0."""
    model, other = make(), make()
    sweep = sweep_of(model)
    for site in tiny.sites(other):
        torch.nn.init.zeros_(other.get_submodule(site.name).weight)
    with sweep.applied(Condition("zero", 1.0, None)):
        ablated = run(model)
    torch.testing.assert_close(ablated, run(other), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ablated, run(make()), atol=1e-2)


def test_half_of_the_neurons_equal_a_projection_without_those_columns():
    """Mean ablation by another route: those input rows of the weight at 0 and their means folded into the bias."""
    model, other = tiny.gpt2(), tiny.gpt2()
    sweep = sweep_of(model)
    condition = Condition("mean", 0.5, 2)
    first = tiny.sites(model)[0]
    for site in tiny.sites(other):
        mask, replace = sweep._prepared[condition].hooks[site]
        projection = other.get_submodule(site.name)  # Conv1D: weight (inputs, outputs)
        with torch.no_grad():
            projection.bias += replace(torch.zeros(1, 1, 16))[mask] @ projection.weight[mask]
            projection.weight[mask] = 0
    assert int(sweep._prepared[condition].hooks[first][0].sum()) == 8
    with sweep.applied(condition):
        torch.testing.assert_close(run(model), run(other), rtol=1e-4, atol=1e-4)


def test_all_methods_share_the_masks_of_a_fraction_and_seed():
    sweep = sweep_of(tiny.mistral(), fractions=TENTHS, seeds=SEEDS)
    for site in tiny.sites(tiny.mistral()):
        for fraction in TENTHS[:-1]:
            for seed in SEEDS:
                masks = [sweep._prepared[Condition(m, fraction, seed)].hooks[site][0] for m in ("zero", "mean", "peak")]
                assert torch.equal(masks[0], masks[1]) and torch.equal(masks[1], masks[2])
                assert int(masks[0].sum()) == round(fraction * 32)


def test_a_method_without_statistics_is_refused_by_name():
    model = tiny.gpt2()
    with pytest.raises(StatisticsError, match=r"the method 'peak' needs the statistic RangeHistogram of the site"):
        Sweep(calibrated(model, epochs=1), [Peak()], [BASELINE, Condition("peak", 0.5, 1)]).prepare()


def test_unrelated_inputs_are_one_for_each_kind_and_seed():
    methods = [Zero(), ResampleIds()]
    sweep = Sweep(calibrated(tiny.gpt2()), methods, conditions_of(methods, TENTHS, SEEDS))
    assert sweep.unrelated == [("ids", seed) for seed in SEEDS]


def test_a_site_that_runs_twice_or_never_is_refused():
    model = tiny.gpt2()
    calibration = Calibration(model, [])
    calibration.find(lambda: run(model))
    with pytest.raises(SiteError, match="ran 2 times in one forward pass"), calibration.collecting(everywhere):
        run(model), run(model)
    with pytest.raises(SiteError, match="ran 0 times in one forward pass"), calibration.collecting(everywhere):
        pass


def test_a_site_that_no_longer_runs_is_refused_in_the_sweep():
    sweep = sweep_of(tiny.gpt2())
    with pytest.raises(SiteError, match="h.0.attn.c_proj ran 0 times"), sweep.applied(Condition("mean", 0.5, 1)):
        pass


def test_a_non_finite_activation_names_its_site():
    model = tiny.gpt2()
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.bias[-1] = torch.inf
    calibration = Calibration(model, Mean.statistics)
    calibration.find(lambda: run(model))
    message = r"activations at transformer.h.1.attn.c_proj are NaN or infinite \(1 of 2 sites\)"
    with pytest.raises(NonFiniteError, match=message), calibration.collecting(everywhere):
        run(model)


def test_non_finite_logits_name_their_condition():
    sweep = sweep_of(tiny.gpt2())
    logits = torch.randn(4, 5)
    good = Scored(logits, torch.zeros(4, dtype=torch.int64), torch.arange(4))
    sweep.score(0, good, Clean.of(good))
    sweep.check_finite()
    sweep.score(2, good._replace(logits=logits * torch.nan), Clean.of(good))
    with pytest.raises(NonFiniteError, match="logits under 'zero 50% seed 2' are NaN"):
        sweep.check_finite()


def test_calibration_survives_its_state_dict():
    model = tiny.gpt2()
    calibration = calibrated(model)
    copy = Calibration(model, calibration.kinds)
    copy.load_state_dict(calibration.state_dict())
    for site in calibration.sites:
        for kind, statistic in calibration.statistics[site].items():
            for name, value in statistic.state_dict().items():
                assert torch.equal(copy[site][kind].state_dict()[name], value)


def test_constants_are_computed_once_a_site_not_once_a_condition():
    class Counted(Mean):
        name, calls = "counted-mean", 0

        def values(self, site, statistics):
            Counted.calls += 1
            return super().values(site, statistics)

    model = tiny.gpt2()
    conditions = [BASELINE, *(Condition("counted-mean", 0.5, seed) for seed in range(4))]
    Sweep(calibrated(model, epochs=1), [Counted()], conditions).prepare()
    assert Counted.calls == 2
