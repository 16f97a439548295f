"""Regressions fitted where they act, against plain hooks and numpy's least squares."""

import itertools
import threading

import numpy as np
import pytest
import torch

from lightning_ablate import AblationCallback, ConditionalSequential, Random, ablated
from lightning_ablate.conditions import Selection
from lightning_ablate.errors import ConfigError, SiteError, StatisticsError
from lightning_ablate.phases import SweepPhase, fitting
from lightning_ablate.phases.sweep import digest_of, masks_of
from tests import reference, tiny

RIDGE = 1e-10


def callback(folder=None, fractions=(0.5, 1.0), intact=False, **options):
    return AblationCallback([ConditionalSequential(RIDGE, intact)], fractions, [1], dirpath=folder, **options)


def passes():
    """The threads of forward passes that are still there."""
    return [thread for thread in threading.enumerate() if isinstance(thread, fitting._Pass)]


def plainly(model, batch, sites, fraction, intact):
    """The logits, by site after site of least squares on what plain hooks see, and plain replacements."""
    real = batch["attention_mask"].bool()
    found, edits, shared = {}, {}, {site.path for site in sites if site.uses > 1}

    def change(path):
        uses = itertools.count()

        def changed(x):
            name = f"{path}#{next(uses)}" if path in shared else path
            found[name] = x.clone()
            if name in edits:
                mask, weights = edits[name]
                kept = torch.cat([torch.ones_like(x[..., :1]), x[..., ~mask]], -1)
                return x.masked_scatter(mask.expand_as(x), (kept.double() @ weights).float())

        return changed

    def run():
        found.clear()
        with torch.no_grad(), reference.plain_hooks(model, {site.path: change(site.path) for site in sites}):
            return reference.forward(model, batch), dict(found)

    _, clean = run()
    for site in sites:
        mask = Random().mask(Selection(fraction, 1), site)
        _, drifted = run()
        kept = np.column_stack([np.ones(int(real.sum())), drifted[site.name][real][:, ~mask].double().numpy()])
        regressed = (clean if intact else drifted)[site.name][real][:, mask]
        weights, *_ = np.linalg.lstsq(kept, regressed.double().numpy(), rcond=None)
        if fraction == 1:  # nothing is kept
            weights[0] = clean[site.name][real].double().mean(0).numpy()
        edits[site.name] = mask, torch.from_numpy(weights)
    return run()[0], edits


@pytest.mark.parametrize("make", [tiny.gpt2, tiny.albert])
@pytest.mark.parametrize("intact", [False, True])
@pytest.mark.parametrize("batch_size", [2, 6])
def test_each_site_is_regressed_with_all_before_it_ablated(tmp_path, make, batch_size, intact):
    """Also where one module runs three times, and however the data are cut into batches."""
    loader = tiny.loader(batch_size=batch_size)
    module, done = tiny.fit(tmp_path, tiny.Own(make()), loader, callback=callback(intact=intact))
    calibration, batch = done.run.calibration, tiny.tokens(6)
    for fraction in (0.5, 1.0):
        expected, edits = plainly(module.target, batch, calibration.sites, fraction, intact)
        condition = next(c for c in done._conditions() if c.fraction == fraction)
        masks = digest_of(masks_of(condition, done.neurons, calibration))
        for site in calibration.sites:
            learned = calibration.learned[done.methods[0].key(masks)][site]
            mask, weights = edits[site.name]
            assert learned.shape == ((~mask).sum() + 1, mask.sum())
            if make is tiny.gpt2:  # the other's neurons hardly differ between positions, so that weights say little
                torch.testing.assert_close(learned.roll(1, 0).double(), weights, rtol=1e-2, atol=1e-3)
        phase = SweepPhase(module, calibration, done.methods, done._conditions())
        with phase.applied(condition), torch.no_grad():
            found = module.logits(batch)
        with torch.no_grad():
            clean = module.logits(batch)
        assert float((found - expected).abs().max()) < 1e-2 * float((clean - expected).abs().max())
    assert not passes()


def test_a_killed_run_and_validate_need_no_new_fit_but_other_conditions_do(tmp_path):
    _, whole = tiny.fit(tmp_path, callback=callback(tmp_path / "whole", save_every=0))
    for dies in (tiny.Dies(0, 2), tiny.Dies(1, 2), tiny.Dies(None, 0)):
        folder = tmp_path / f"died{dies.epoch}"
        with pytest.raises(tiny.Death):
            tiny.fit(tmp_path, callback=callback(folder, save_every=0), more=[dies])
        _, again = tiny.fit(tmp_path, callback=callback(folder, save_every=0))
        assert again.results.table.equals(whole.results.table)
    checkpoint = tmp_path / "whole" / "ablation.ckpt"
    assert tiny.validate(tmp_path, checkpoint, callback()).table.equals(whole.results.table)
    others = [callback(fractions=[0.3]), callback(neurons=Random("head")), callback(intact=True)]
    others.append(AblationCallback([ConditionalSequential(0.1)], [0.5, 1.0], [1]))
    for other in others:  # of other neurons, or under other options
        with pytest.raises(StatisticsError, match=r"conditional-sequential.*needs the values it learns.*run `fit`"):
            tiny.validate(tmp_path, checkpoint, other)


class Second(tiny.Own):
    """Runs its layers in another order from the second batch on."""

    def logits(self, batch):
        if int(batch["index"][0]):
            self.target.transformer.h = torch.nn.ModuleList(reversed(self.target.transformer.h))
        return super().logits(batch)


def test_what_cannot_be_fitted_is_refused_and_leaves_no_thread(tmp_path):
    with pytest.raises(ConfigError, match="conditional-sequential can't be attributed"):
        tiny.fit(tmp_path, callback=callback(attribute=["conditional-sequential"]))
    with pytest.raises(SiteError, match="another order than when they were found"):
        tiny.fit(tmp_path, Second(tiny.gpt2()), callback=callback())
    assert not passes()
    model = tiny.gpt2()
    with (
        pytest.raises(StatisticsError, match="needs the values it learns"),
        ablated(model, {"transformer.h.0.attn.c_proj": torch.ones(16, dtype=torch.bool)}, "conditional-sequential"),
    ):
        pass
