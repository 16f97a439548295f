import pytest
import torch

from lightning_ablate import AblationCallback
from lightning_ablate.errors import ConfigError
from lightning_ablate.folding import weights_of
from lightning_ablate.methods import Conditional, ConditionalPerHead, Mean, Noise, Zero
from lightning_ablate.sweep import Prepared, Sweep
from tests import tiny
from tests.test_sites import hooks
from tests.test_sweep import calibrated, conditions_of
from tests.tiny import run

METHODS = [Zero(), Mean(), Conditional(), ConditionalPerHead(), Noise()]


def sweeps(model):
    conditions = conditions_of(METHODS, [0.3, 1.0], [1])
    for fold in (False, True):
        sweep = Sweep(calibrated(model, methods=METHODS), METHODS, conditions, fold=fold)
        sweep.batch.examples = torch.arange(3)
        sweep.prepare()
        yield sweep


@pytest.mark.parametrize("make", [tiny.gpt2, tiny.mistral, tiny.vit, tiny.roberta, tiny.opt])
def test_folded_equals_hooked_and_the_target_is_never_written(make):
    model = make()
    before, clean = {name: (p, p.clone()) for name, p in model.named_parameters()}, run(model)
    hooked, folded = sweeps(model)
    for condition in hooked.conditions:
        with hooked.applied(condition):
            expected = run(model)
        with folded.applied(condition):
            assert hooks(model) == (2 if condition.method == "noise" else 0)  # which isn't affine
            found = run(model)
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
        if condition.method != "none":
            assert float((found - clean).abs().max()) > 10 * float((found - expected).abs().max())
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(before[name][0] is p and torch.equal(before[name][1], p) for name, p in model.named_parameters())


def test_an_exception_leaves_the_own_weights():
    model = tiny.mistral()
    clean, sweep = run(model), list(sweeps(model))[1]
    with pytest.raises(RuntimeError, match="in the pass"), sweep.applied(sweep.conditions[1]):
        raise RuntimeError("in the pass")
    assert torch.equal(run(model), clean)


def test_what_there_is_no_room_for_is_made_anew(monkeypatch):
    model = tiny.gpt2()
    kept = list(sweeps(model))[1]
    monkeypatch.setattr("lightning_ablate.sweep._ROOM", 0)
    monkeypatch.setattr(Prepared, "nbytes", 20_000)  # of a target of 50,000
    tight = list(sweeps(model))[1]
    assert 0 < len(tight._prepared) < len(kept._prepared)
    for condition in kept.conditions:
        with kept.applied(condition):
            expected = run(model)
        with tight.applied(condition):
            assert torch.equal(run(model), expected)


def test_modules_that_are_more_than_a_matrix_keep_their_hooks():
    class Scaled(torch.nn.Linear):
        pass

    target = torch.nn.Sequential(Scaled(4, 4), torch.nn.Linear(4, 4))
    site = tiny.sites(tiny.albert())[0]
    assert weights_of(tiny.albert(), site) is None and site.uses == 3
    linear, scaled = (type(site)(name, 4) for name in ("1", "0"))
    assert weights_of(target, linear) is not None and weights_of(target, scaled) is None


def test_a_run_with_folding_gives_the_same_figures(tmp_path):
    figures = []
    for fold in (False, True):
        made = AblationCallback(methods=["zero", "conditional"], fractions=[0.5, 1.0], seeds=[1], fold=fold)
        tiny.fit(tmp_path / str(fold), callback=made)
        figures.append([(row.method, row.fraction, row.cross_entropy) for row in made.results.rows])
    for one, other in zip(*figures, strict=True):
        assert one[:2] == other[:2] and abs(one[2] - other[2]) < 1e-5
    with pytest.raises(ConfigError, match="fold and compile are both on"):
        AblationCallback(fold=True, compile=True)
