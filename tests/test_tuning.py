"""Regressions that are tuned by gradient descent, for each condition."""

import pytest
import torch

from lightning_ablate import AblationCallback, ConditionalMean, ConditionalTuned, EachLayer
from lightning_ablate.errors import ConfigError, StatisticsError
from lightning_ablate.seeds import digest
from tests import reference, tiny

PATHS = [f"transformer.h.{n}.attn.c_proj" for n in range(2)]
FEW = {"ridge": 1e-2, "steps": 4, "examples": 4}


class Descent(ConditionalTuned):
    """Goes straight down the gradient."""

    name = "descent"

    def optimizer(self, parameters):
        return torch.optim.SGD(parameters, lr=self.lr)


def fit(folder, *methods, fractions=(0.5, 1.0), train=None, **options):
    made = AblationCallback(methods, fractions, [1], dirpath=options.pop("dirpath", None), save_every=0)
    tiny.fit(folder, train=tiny.loader(12, seed=1) if train is None else train, callback=made, **options)
    return made


def weights_of(made, condition, method):
    """The masks of a condition, and what a method put in place, of each site."""
    masks = made.sweep.masks(condition, made.run.calibration)
    found = made.run.calibration.learned[method.key(digest({site.name: mask for site, mask in masks.items()}))]
    return list(masks.values()), [weights.double() for weights in found.values()]


def regression(mask, x, centred):
    """The conditional mean by hand, ``(kept + 1, ablated)``, from activations ``(positions, neurons)``."""
    mean = x.mean(0) if centred else torch.zeros(x.shape[1]).double()
    products = (x - mean).T @ (x - mean) / len(x)
    within = products[~mask][:, ~mask] + torch.diag(1e-2 * products.diagonal()[~mask])
    slope = torch.linalg.solve(within, products[~mask][:, mask])
    return torch.cat([slope, (mean[mask] - mean[~mask] @ slope).unsqueeze(0)])


def replaced(mask, weights):
    """Puts regressions on what is kept, ``(kept + 1, ablated)``, the intercept last, in the place of the others."""

    def change(x):
        kept = torch.cat([x[..., ~mask], torch.ones_like(x[..., :1])], -1)
        return x.masked_scatter(mask.expand_as(x), kept @ weights)

    return change


@pytest.mark.parametrize("centred", [True, False])
def test_a_step_is_that_of_the_gradient_of_the_mean_divergence(tmp_path, centred):
    """By hand: eight examples in float64, with neurons replaced by plain hooks, for each condition by itself."""
    descent = Descent(1e-2, steps=1, lr=50.0, examples=8, centred=centred)
    made = fit(tmp_path, descent, limit_train_batches=4)
    batch = {name: value[:8] for name, value in tiny.tokens(12, seed=1).items()}
    raw = [x.double() for x in reference.raw_activations(tiny.gpt2(), [batch], PATHS).values()]
    model, ids, real = tiny.gpt2().double(), batch["input_ids"], batch["attention_mask"]
    scored = real[:, 1:].bool()
    with torch.no_grad():
        intact = model(ids, attention_mask=real).logits[:, :-1][scored].log_softmax(1)

    def moved(start, mask, x, delta):
        mean, sd = x.mean(0), x.std(0, correction=0)
        changes = delta * sd[mask] / (1 + (~mask).sum())
        slope = changes[:-1] / sd[~mask].unsqueeze(1)
        intercept = (changes[-1] - mean[~mask] @ slope) if centred else torch.zeros_like(changes[-1])
        return start + torch.cat([slope, intercept.unsqueeze(0)])

    conditions = [
        condition for condition in made.sweep.conditions(made.run.calibration.sites) if condition.method == "descent"
    ]
    assert [condition.fraction for condition in conditions] == [0.5, 1.0]
    for condition in conditions:
        masks, tuned = weights_of(made, condition, descent)
        fitted = [regression(mask, x, centred) for mask, x in zip(masks, raw, strict=True)]
        deltas = [torch.zeros_like(one, requires_grad=True) for one in fitted]
        places = list(zip(fitted, masks, raw, deltas, strict=True))
        changes = [replaced(mask, moved(start, mask, x, delta)) for start, mask, x, delta in places]
        with reference.plain_hooks(model, dict(zip(PATHS, changes, strict=True))):
            logits = model(ids, attention_mask=real).logits[:, :-1][scored]
        (intact.exp() * (intact - logits.log_softmax(1))).sum(1).mean().backward()
        for (start, mask, x, delta), found in zip(places, tuned, strict=True):
            expected = moved(start, mask, x, -50 * delta.grad)
            if centred or condition.fraction < 1:
                assert float((found - start).abs().max()) > 1e-4
            torch.testing.assert_close(found - start, expected - start, rtol=1e-3, atol=1e-6)


def test_it_comes_nearer_to_the_intact_target_and_leaves_it_to_the_bit(tmp_path):
    module, again = tiny.Own(tiny.gpt2()), tiny.gpt2().state_dict()
    tuned = ConditionalTuned(1e-2, steps=60, lr=0.2, examples=4)
    data = {"train": tiny.loader(12, 4, seed=1), "val": tiny.loader(12, 4, seed=1)}  # the same examples
    made = fit(tmp_path, ConditionalMean(1e-2), tuned, module=module, **data)
    kl = made.results.table.set_index(["method", "fraction"])["kl"]
    for fraction in (0.5, 1.0):
        assert kl["conditional-tuned", fraction] < 0.9 * kl["conditional-mean", fraction]
    before, after = made.run.held_out["conditional-tuned"]
    assert 0 < after < before
    assert all(torch.equal(value, again[name]) for name, value in module.target.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in module.target.parameters())
    assert reference.hooks(module.target) == 0


def test_a_killed_run_and_validate_need_no_new_fit_but_other_options_do(tmp_path):
    method = ConditionalTuned(**FEW)
    whole = fit(tmp_path, method, dirpath=tmp_path / "whole")
    for epoch, batch in ((1, 1), (1, 3), (2, 0)):
        folder = tmp_path / f"died{epoch}"
        with pytest.raises(tiny.Death):
            fit(tmp_path, method, dirpath=folder, more=[tiny.Dies(epoch, batch)])
        again = fit(tmp_path, method, dirpath=folder)
        assert again.results.table.equals(whole.results.table)
    checkpoint = tmp_path / "whole" / "ablation.ckpt"
    swept = AblationCallback([method], [0.5, 1.0], [1])
    assert tiny.validate(tmp_path, checkpoint, swept).table.equals(whole.results.table)
    for option in ({"ridge": 0.1}, {"steps": 5}, {"lr": 0.1}, {"examples": 8}):
        other = AblationCallback([ConditionalTuned(**FEW | option)], [0.5, 1.0], [1])
        with pytest.raises(StatisticsError, match=r"conditional-tuned.*needs the values it learns.*run `fit`"):
            tiny.validate(tmp_path, checkpoint, other)


def test_the_plan_says_how_many_passes_tuning_takes(tmp_path, capsys):
    fit(tmp_path, ConditionalTuned(**FEW))
    # of 6 batches: calibration, and 2 epochs of tuning, of 2 steps each
    calibrating, swept = 6 * (1 + 2 * (1 + 2 * 3)), 3 * 3
    assert f"plan: 3 conditions, {calibrating + swept} forward passes, about " in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*what was learned is worse")  # in so few steps
def test_a_condition_may_leave_sites_alone(tmp_path):
    """Each layer alone: the other site keeps all of its neurons."""
    method = ConditionalTuned(**FEW)
    tuned = AblationCallback([method, "mean"], [0.5], [1], neurons=EachLayer())
    tiny.fit(tmp_path, callback=tuned)
    again = AblationCallback([method, "mean"], [0.5], [1], neurons=EachLayer())
    assert tiny.validate(tmp_path, tmp_path / "ablation.ckpt", again).table.equals(tuned.results.table)
    rows = tuned.results.table.set_index(["method", "part"])["cross_entropy"]
    assert len(rows) == 5 and rows.notna().all()


def test_where_nothing_is_ablated_there_is_nothing_to_tune(tmp_path):
    with pytest.raises(ConfigError, match="conditional-tuned has nothing to tune"):
        fit(tmp_path, ConditionalTuned(**FEW), fractions=[0.0])


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_other_precisions_tune_in_float32(tmp_path, precision):
    made = fit(tmp_path, ConditionalTuned(**FEW), precision=precision)
    weights = [weights for sites in made.run.calibration.learned.values() for weights in sites.values()]
    assert len(weights) == 4 and all(w.dtype == torch.float32 and bool(w.isfinite().all()) for w in weights)
    before, after = made.run.held_out["conditional-tuned"]
    assert after < before
