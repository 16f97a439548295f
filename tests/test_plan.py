"""What a run says before it does it."""

import pytest

from lightning_ablate import AblationCallback, CausalLM
from tests import tiny


class Counting(tiny.Own):
    """Counts the passes of whole batches behind the first plan."""

    passes = 0

    def evaluate(self, batch):
        self.passes += 1
        return super().evaluate(batch)


def test_the_plan_is_what_the_run_then_does(tmp_path, capsys):
    module, callback = Counting(tiny.gpt2()), AblationCallback(["zero", "mean", "peak"], [0.5, 1.0], [1, 2])
    tiny.trainer(tmp_path, callback).fit(module, tiny.loader(6, 2, seed=1), tiny.loader(5, 2, seed=2))
    plan = callback.plan
    assert plan.conditions == len(callback.results.rows) == 1 + 3 * 3
    # two calibration epochs of three batches, and a sweep of three; one more pass has found the sites
    assert plan.passes == 2 * 3 + 3 * 10 == module.passes - 1
    # both sets have two padded positions, in the first of the two examples that the plan knows, or of five
    assert plan.positions == round((2 * 15 - 2) / 2 * 5) and callback.results.baseline.n == 5 * 15 - 2
    state = callback.state_dict()["statistics"]["sites"]
    held = sum(t.nbytes for site in state for one in site["statistics"].values() for t in one.values())
    assert plan.statistics == held
    assert plan.seconds > 0 and str(plan) in capsys.readouterr().out


@pytest.mark.parametrize("methods", [["zero"], ["zero", "peak"]])
def test_plan_only_ends_after_the_first_batch(tmp_path, capsys, methods):
    module, callback = Counting(tiny.gpt2()), AblationCallback(methods, [0.5], [1], plan_only=True)
    tiny.trainer(tmp_path, callback).fit(module, tiny.loader(6, 2, seed=1), tiny.loader(6, 2, seed=2))
    assert module.passes == 2 and callback.results is None and not list(tmp_path.iterdir())
    assert "plan: " in capsys.readouterr().out


def test_plan_only_of_one_batch_does_not_sweep(tmp_path):
    module, callback = Counting(tiny.gpt2()), AblationCallback(["zero"], [0.5], [1], plan_only=True)
    tiny.trainer(tmp_path, callback).fit(module, tiny.loader(2, 2, seed=1), tiny.loader(2, 2, seed=2))
    assert module.passes == 2 and callback.results is None


def test_validate_plans_with_the_baseline_alone(tmp_path):
    tiny.fit(tmp_path)
    module, callback = Counting(tiny.gpt2()), AblationCallback(["zero"], [0.5], [1, 2], plan_only=True)
    before = set(tmp_path.iterdir())
    tiny.trainer(tmp_path, callback).validate(module, tiny.loader(6, 2), ckpt_path=tmp_path / "ablation.ckpt")
    assert module.passes == 1 and callback.plan.conditions == 3 and callback.plan.passes == 9
    assert callback.results is None and set(tmp_path.iterdir()) == before


def test_resampling_counts_its_own_passes(tmp_path, gpt2_folder):
    callback = AblationCallback(["zero", "resample-ids"], [0.5], [1, 2], plan_only=True)
    tiny.trainer(tmp_path, callback).fit(CausalLM(gpt2_folder), tiny.loader(6, 2), tiny.loader(6, 2))
    assert callback.plan.conditions == 5 and callback.plan.passes == 3 + 3 * (5 + 2)
