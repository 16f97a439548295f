"""Edits folded into weights."""

import copy

import pytest
import torch

from lightning_ablate import ConditionalMean, ConditionalMeanPerHead, ConditionalTuned, Mean, Noise, Random, Site, Zero
from lightning_ablate.conditions import Selection
from lightning_ablate.errors import SiteError
from lightning_ablate.export.shrink import fold
from lightning_ablate.methods import Ablation, Edit, constant
from lightning_ablate.sites import hooked
from tests import tiny

METHODS = [Zero(), Mean(), ConditionalMean(), ConditionalMeanPerHead()]


def edits_of(calibration, method, fraction):
    masks = {site: Random().mask(Selection(fraction, 1), site) for site in calibration.sites}
    return {s: Edit(m, method.prepare(Ablation(s, m, calibration[s], 1))) for s, m in masks.items()}


@pytest.mark.parametrize("make", [tiny.gpt2, tiny.mistral, tiny.vit, tiny.roberta, tiny.opt])
def test_folded_equals_hooked_and_the_target_is_never_written(make):
    model = make()
    calibration, clean = tiny.calibrated(model, *METHODS), tiny.run(model)
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    for method, fraction in ((method, fraction) for method in METHODS for fraction in (0.3, 1.0)):
        edits = edits_of(calibration, method, fraction)
        with hooked(model, edits, once=True):
            expected = tiny.run(model)
        folded = copy.deepcopy(model)
        for path, (weight, bias) in fold(model, edits).items():
            projection = folded.get_submodule(path)
            projection.weight, projection.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
        found = tiny.run(folded)
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
        assert float((found - clean).abs().max()) > 10 * float((found - expected).abs().max())
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(before[name][0] is p and torch.equal(*before[name]) for name, p in model.named_parameters())


def test_what_cannot_be_folded_is_refused():
    mask, zeros, albert, gpt2 = torch.ones(4, dtype=torch.bool), constant(torch.zeros(4)), tiny.albert(), tiny.gpt2()
    scaled = type("Scaled", (torch.nn.Linear,), {})
    target = torch.nn.Sequential(scaled(4, 4), torch.nn.Linear(4, 4))
    assert list(fold(target, {Site("1", 4): Edit(mask, zeros)})) == ["1"]
    for model, edits in (
        (target, {Site("0", 4): Edit(mask, zeros)}),  # more than a matrix, for all that is known
        (albert, edits_of(tiny.calibrated(albert), Mean(), 0.5)),  # whose projection runs three times
        (gpt2, edits_of(tiny.calibrated(gpt2), Noise(), 0.5)),
    ):
        with pytest.raises(SiteError, match="can't be folded, expected a constant or conditional method at the input"):
            fold(model, edits)


def test_a_method_says_how_it_does_without_an_intercept():
    method = ConditionalMeanPerHead(ridge=0.1)
    other = method.without_intercept()
    assert (type(other), other.ridge, other.centred, method.centred) == (ConditionalMeanPerHead, 0.1, False, True)
    assert Mean().without_intercept() is None and ConditionalTuned().without_intercept() is None
