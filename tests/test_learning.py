"""Values that are learned by gradient descent."""

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_ablate import AblationCallback, EachHead, Mean, Optimal, Random
from lightning_ablate.errors import ConfigError, NonFiniteError, StatisticsError
from lightning_ablate.modules.phase import Amount
from lightning_ablate.phases.learning import Course
from lightning_ablate.seeds import seed_of
from tests import reference, tiny

PATHS = [f"transformer.h.{n}.attn.c_proj" for n in range(2)]


def data(batch_size=2):
    return tiny.loader(12, batch_size, seed=1)


def fit(folder, *methods, train=None, module=None, neurons=None, **options):
    made = AblationCallback(methods, [0.5, 1.0], [1, 2], neurons=neurons)
    tiny.fit(folder, module, train=data() if train is None else train, callback=made, **options)
    return {name: {s.name: v for s, v in sites.items()} for name, sites in made.run.calibration.learned.items()}, made


def replacement(mask, delta, mean, sd):
    """A change for plain hooks: the mean and so many standard deviations."""
    return lambda x: torch.where(mask, mean + sd * delta, x)


def course_of(steps, examples, batch_size, batches):
    return Course.of(Optimal(steps=steps, examples=examples), Amount(batches, batch_size, 0))


def test_a_step_is_that_of_the_gradient_of_the_mean_cross_entropy(tmp_path):
    """By hand: eight examples one by one in float64, with their neurons replaced by plain hooks."""
    descent = type("Descent", (Optimal,), {"optimizer": lambda self, values: torch.optim.SGD(values, lr=self.lr)})
    learned, _ = fit(tmp_path, descent(steps=1, lr=0.5, examples=8), limit_train_batches=4)
    assert course_of(1, 8, 2, 4) == Course(1, 4, 4)
    batch = {name: value[:8] for name, value in tiny.tokens(12, seed=1).items()}
    raw = [x.double() for x in reference.raw_activations(tiny.gpt2(), [batch], PATHS).values()]
    known = [(x.mean(0), x.std(0, correction=0)) for x in raw]
    deltas = [torch.zeros(16, dtype=torch.float64, requires_grad=True) for _ in raw]
    model, sites, losses = tiny.gpt2().double(), tiny.sites(tiny.gpt2()), []
    for row in range(8):
        chosen = Random().draw(sites, seed_of("learning", "epoch 0", row))
        masks = [Random().mask(chosen, site) for site in sites]
        changes = [replacement(masks[n], deltas[n], *known[n]) for n in range(2)]
        losses.append(reference.losses(model, batch, row, dict(zip(PATHS, changes, strict=True))))
    torch.cat(losses).mean().backward()
    for (mean, sd), delta, values in zip(known, deltas, learned["optimal"].values(), strict=True):
        assert float((values - mean).abs().max()) > 1e-3
        torch.testing.assert_close(values.double(), mean - sd * 0.5 * delta.grad, rtol=1e-4, atol=1e-6)


def test_batches_are_accumulated_to_the_same_steps(tmp_path):
    found = [fit(tmp_path / str(n), Optimal(steps=6, lr=0.1, examples=4), train=data(n))[0] for n in (1, 4)]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_it_lowers_the_damage_and_leaves_the_target_to_the_bit(tmp_path):
    options, module, again = {"steps": 60, "lr": 0.1, "examples": 4}, tiny.Own(tiny.gpt2()), tiny.gpt2().state_dict()
    _, made = fit(tmp_path, Mean(), Optimal(**options), module=module, train=data(4), val=data(4))  # the same examples
    damage = made.results.table.groupby("method")["cross_entropy"].sum()
    assert damage["optimal"] < damage["mean"] - 0.1
    model, (before, after) = module.target, made.run.held_out["optimal"]
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items()) and after < before
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters()) and reference.hooks(model) == 0


def test_the_values_come_back_from_the_checkpoint(tmp_path):
    methods = ["mean", Optimal(steps=5)]
    again, (learned, made) = AblationCallback(methods, [0.5, 1.0], [1, 2]), fit(tmp_path, *methods)
    tiny.validate(tmp_path, made.folder / "ablation.ckpt", again)
    assert again.results.table.equals(made.results.table)
    for site, values in again.run.calibration.learned["optimal"].items():
        assert torch.equal(values, learned["optimal"][site.name]) and values.dtype == torch.float32
    _, without = fit(tmp_path / "without", "mean")
    with pytest.raises(StatisticsError, match="'optimal' needs the values it learns"):
        tiny.validate(tmp_path, without.folder / "ablation.ckpt", again)


def test_learning_curves_are_logged_and_the_held_out_check_told(tmp_path):
    logger = TensorBoardLogger(tmp_path / "tb")
    _, made = fit(tmp_path, Optimal(steps=8, examples=2), logger=logger)
    events = EventAccumulator(logger.log_dir).Reload()
    curve = events.Scalars("learning/optimal")
    assert [point.step for point in curve] == list(range(1, 11)) and all(3 < point.value < 9 for point in curve)
    mean, learned = (events.Scalars(f"learning/optimal held out{end}") for end in (", before", ""))
    assert [point.step for point in [*mean, *learned]] == [5, 10, 5, 10] and mean[0].value == mean[1].value
    assert made.run.held_out["optimal"] == pytest.approx((mean[1].value, learned[1].value))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_other_precisions_learn_in_float32(tmp_path, precision):
    learned, _ = fit(tmp_path, Optimal(steps=5), precision=precision, neurons=EachHead())
    values = [values for sites in learned.values() for values in sites.values()]
    assert len(values) == 2 and all(v.dtype == torch.float32 and bool(v.isfinite().all()) for v in values)


def test_a_stream_learns_once_it_has_a_length(tmp_path):
    stream, method = tiny.stream(data()), Optimal(steps=5, examples=1)
    with pytest.raises(ConfigError, match="optimal learns in steps over the calibration data, which tell no length"):
        fit(tmp_path / "0", method, train=stream)
    learned, _ = fit(tmp_path / "1", method, train=stream, limit_train_batches=6)
    torch.testing.assert_close(learned, fit(tmp_path / "2", method)[0])


def test_what_does_harm_is_told_and_what_does_not_learn_is_refused(tmp_path):
    detached = type("Detached", (tiny.Own,), {"evaluate": torch.no_grad()(tiny.Own.evaluate)})
    with pytest.warns(UserWarning, match="worse than what it began with on examples held out"):
        fit(tmp_path / "0", Optimal(steps=5, lr=30.0, examples=2))
    with pytest.raises(NonFiniteError, match="optimal: the cross-entropy is"):
        fit(tmp_path / "1", Optimal(steps=20, lr=1e30))
    with pytest.raises(ConfigError, match="optimal can't learn: the logits that `evaluate` gives have no gradient"):
        fit(tmp_path / "2", Optimal(steps=2), module=detached(tiny.gpt2()))


def test_after_an_exception_the_same_module_and_callback_learn_anew(tmp_path):
    module, made = tiny.Own(tiny.gpt2()), AblationCallback([Optimal(steps=4, examples=4)], [0.5, 1.0], [1, 2])
    with pytest.raises(tiny.Death):
        tiny.fit(tmp_path / "1", module, data(), callback=made, more=[tiny.Dies(1, 1)])
    assert module.phase is None and reference.hooks(module.target) == 0
    tiny.fit(tmp_path / "2", module, data(), callback=made)
    _, other = fit(tmp_path / "3", *made.sweep.methods)
    assert made.results.table.equals(other.results.table)


def test_the_course_has_the_fewest_epochs_that_give_the_steps():
    for batches, examples in ((b, e) for b in (1, 2, 3, 7, 25, 400) for e in (1, 8, 32, 1000)):
        course = course_of(50, examples, 8, batches)
        held = [course.is_held_out(batch) for batch in range(batches)]
        steps = len({b // course.accumulated for b in range(batches) if not held[b]})
        assert steps and (course.epochs - 1) * steps < 50 <= course.epochs * steps
        assert any(held) == (course.steps > 1) and sum(held) <= max(course.accumulated, batches / 2)
