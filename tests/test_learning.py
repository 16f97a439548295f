import warnings

import lightning
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional

from lightning_ablate import AblationCallback, Scored
from lightning_ablate.errors import ConfigError, NonFiniteError, StatisticsError
from lightning_ablate.learning import Course
from lightning_ablate.masks import EachHead, RandomNeurons, seed_of
from lightning_ablate.methods import Conditional, ConditionalOptimal, LearnedMethod, Mean, Optimal
from lightning_ablate.statistics import Moments
from tests import tiny
from tests.test_resume import Death, Dies
from tests.test_sites import hooks

EXAMPLES = 12


def data(batch_size=2, examples=EXAMPLES, seed=1):
    return tiny.loader(examples, batch_size, seed)


def fit(folder, *methods, train=None, module=None, **options):
    """The values learned, by method and site; the callback; and the module."""
    taken = {name: options.pop(name) for name in ("choice", "note_every", "folder") if name in options}
    made = AblationCallback(methods=methods, fractions=[0.5, 1.0], seeds=[1, 2], **taken)
    module, _ = tiny.fit(folder, module, train=data() if train is None else train, callback=made, **options)
    return {name: {s.name: v for s, v in sites.items()} for name, sites in module.calibration.learned.items()}, made


class Descent(LearnedMethod):
    """Takes its steps by plain gradient descent."""

    def optimizer(self, parameters):
        return torch.optim.SGD(parameters, lr=self.lr)


class PlainOptimal(Descent, Optimal):
    pass


class PlainConditional(Descent, ConditionalOptimal):
    pass


def loss_by_hand(method, deltas, examples, moments, covariances):
    """Mean cross-entropy of examples that are run one by one in float64, with their neurons replaced by plain hooks."""
    model, batch = tiny.gpt2().double(), tiny.tokens(EXAMPLES, seed=1)
    sites, total, count = tiny.sites(tiny.gpt2()), 0.0, 0
    projections = [block.attn.c_proj for block in model.transformer.h]
    for row in examples:
        chosen = RandomNeurons().draw(sites, seed_of("learning", "epoch 0", row))

        def act(n, x, chosen=chosen):
            mask = RandomNeurons().mask(chosen, sites[n])
            mean, sd = moments[n]
            expected = (mean + sd * deltas[n]).expand(x.shape)
            if method == "conditional" and bool(mask.any()) and not bool(mask.all()):
                within, across = covariances[n][~mask][:, ~mask].clone(), covariances[n][~mask][:, mask]
                within.diagonal().mul_(1 + 1e-6)
                slope = torch.linalg.solve(within, across)
                left = (1 - (across * slope).sum(0) / sd[mask] ** 2).clamp(0, 1).sqrt()
                expected = x.clone()
                expected[..., mask] = mean[mask] + left * sd[mask] * deltas[n][mask] + (x - mean)[..., ~mask] @ slope
            return (torch.where(mask, expected, x),)

        handles = [p.register_forward_pre_hook(lambda m, x, n=n: act(n, x[0])) for n, p in enumerate(projections)]
        ids, real = batch["input_ids"][row : row + 1], batch["attention_mask"][row : row + 1]
        logits = model(input_ids=ids, attention_mask=real).logits[0]
        for handle in handles:
            handle.remove()
        for position in range(tiny.LENGTH - 1):
            if real[0, position + 1]:
                total = total + functional.cross_entropy(logits[position], ids[0, position + 1])
                count += 1
    return total / count


@pytest.mark.parametrize(("method", "kind"), [("optimal", PlainOptimal), ("conditional", PlainConditional)])
def test_a_step_is_that_of_the_gradient_of_the_mean_cross_entropy(tmp_path, method, kind):
    learned, _made = fit(tmp_path, kind(steps=1, lr=0.5, examples=8), train=data(2), limit_train_batches=4)
    assert Course.of(steps=1, examples=8, batch_size=2, batches=4) == Course(1, 4, 4)
    found = next(iter(learned.values()))
    x = activations()
    moments = [(rows.mean(0), rows.std(0, correction=0)) for rows in x]
    covariances = [torch.cov(rows.T, correction=0) for rows in x]
    deltas = [torch.zeros(16, dtype=torch.float64, requires_grad=True) for _ in x]
    loss_by_hand(method, deltas, range(8), moments, covariances).backward()
    for (mean, sd), delta, values in zip(moments, deltas, found.values(), strict=True):
        expected = mean - sd * 0.5 * delta.grad
        assert float((values - mean).abs().max()) > 1e-3
        torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=1e-6)


def activations():
    """Of the calibration's first eight examples at each site, ``(positions, 16)`` float64."""
    model, batch, seen = tiny.gpt2(), tiny.tokens(EXAMPLES, seed=1), {}
    for n, block in enumerate(model.transformer.h):
        block.attn.c_proj.register_forward_pre_hook(lambda m, x, n=n: seen.update({n: x[0]}))
    with torch.no_grad():
        model(input_ids=batch["input_ids"][:8], attention_mask=batch["attention_mask"][:8])
    return [seen[n][batch["attention_mask"][:8].bool()].double() for n in range(2)]


def test_batches_are_accumulated_to_the_same_steps(tmp_path):
    options = {"steps": 6, "lr": 0.1, "examples": 4}
    alone, _ = fit(tmp_path / "1", Optimal(**options), train=data(4))
    several, _ = fit(tmp_path / "2", Optimal(**options), train=data(2))
    asked, _ = fit(tmp_path / "3", Optimal(**options | {"examples": 1}), train=data(1), accumulate_grad_batches=4)
    for other in (several, asked):
        for site, values in alone["optimal"].items():
            torch.testing.assert_close(other["optimal"][site], values, rtol=1e-3, atol=1e-4)


def test_it_lowers_the_damage_and_leaves_the_target_to_the_bit(tmp_path):
    model = tiny.gpt2()
    before = {name: p.clone() for name, p in model.named_parameters()}
    methods = Mean(), Conditional(), Optimal(steps=60, lr=0.1, examples=4), ConditionalOptimal(steps=60, lr=0.1)
    module = tiny.Own(model)
    _, made = fit(tmp_path, *methods, module=module, train=data(4), val=data(4))  # the same examples
    damage = {}
    for row in made.results.rows[1:]:
        damage.setdefault(row.method, []).append(row.cross_entropy)
    mean, conditional, optimal, both = (sum(damage[method.name]) for method in methods)
    assert optimal < mean - 0.1 and both < conditional - 0.1
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in model.named_parameters())
    assert hooks(model) == 0 and module.learning is None and module.anchor.item() == 0
    assert [type(o) for o in module.trainer.optimizers] == [torch.optim.SGD]
    assert module.trainer.accumulate_grad_batches == 1 and made._held_out["optimal"][1] < made._held_out["optimal"][0]


def test_the_values_come_back_from_the_checkpoint(tmp_path):
    methods = ["mean", Optimal(steps=5), ConditionalOptimal(steps=5)]
    learned, made = fit(tmp_path, *methods)
    again = AblationCallback(methods=methods, fractions=[0.5, 1.0], seeds=[1, 2])
    trainer, module = tiny.trainer(tmp_path, again), tiny.Own(tiny.gpt2())
    trainer.validate(module, tiny.loader(seed=2), ckpt_path=made.folder / "ablation.ckpt", verbose=False)
    assert again.results.csv() == made.results.csv()
    for site, values in module.calibration.learned["optimal"].items():
        assert torch.equal(values, learned["optimal"][site.name]) and values.dtype == torch.float32
    _, without = fit(tmp_path / "without", "mean")
    with pytest.raises(StatisticsError, match="'optimal' needs the values it learns"):
        tiny.trainer(tmp_path, again).validate(
            tiny.Own(tiny.gpt2()), tiny.loader(seed=2), ckpt_path=without.folder / "ablation.ckpt", verbose=False
        )


@pytest.mark.parametrize(("epoch", "batch"), [(1, 1), (2, 5), (3, 2), (None, 0)])
def test_a_run_that_dies_while_it_learns_goes_on_to_the_same_bytes(tmp_path, epoch, batch):
    """Epochs 1 and 2 learn one method, 3 and 4 the other; a step takes two batches."""

    def run(folder, *more):
        methods = [Optimal(steps=4, examples=4), ConditionalOptimal(steps=4, examples=4)]
        made = AblationCallback(methods, fractions=[0.5, 1.0], seeds=[1], note_every=0, folder=folder)
        trainer = tiny.trainer(folder.parent, made)
        trainer.callbacks += more
        trainer.fit(tiny.Own(tiny.gpt2()), data(), tiny.loader(seed=2))
        return (folder / "results.csv").read_bytes()

    whole = run(tmp_path / "whole")
    with pytest.raises(Death):
        run(tmp_path / "dies", Dies(epoch, batch))
    assert run(tmp_path / "dies") == whole


def test_learning_curves_are_logged_and_the_held_out_check_told(tmp_path):
    logger = TensorBoardLogger(tmp_path / "tb")
    fit(tmp_path, Optimal(steps=8, examples=2), train=data(2), logger=logger)
    events = EventAccumulator(logger.log_dir).Reload()
    curve = events.Scalars("learning/optimal")
    assert [point.step for point in curve] == list(range(1, 11)) and all(3 < point.value < 9 for point in curve)
    held_out = [events.Scalars(f"learning/optimal held out{end}") for end in ("", ", mean")]
    assert [[point.step for point in points] for points in held_out] == [[5, 10], [5, 10]]
    assert held_out[1][0].value == held_out[1][1].value != held_out[0][1].value


def test_learning_that_does_harm_is_told(tmp_path):
    with pytest.warns(UserWarning, match="worse than the mean on examples held out"):
        fit(tmp_path, Optimal(steps=5, lr=30.0, examples=2))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_other_precisions_learn_in_float32(tmp_path, precision):
    learned, _made = fit(tmp_path, Optimal(steps=5), ConditionalOptimal(steps=5), precision=precision)
    for sites in learned.values():
        assert all(v.dtype == torch.float32 and bool(v.isfinite().all()) for v in sites.values())


def test_a_stream_and_other_choices_learn_as_well(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(data())

    stream = torch.utils.data.DataLoader(Stream(), batch_size=None)
    learned, made = fit(tmp_path / "1", Optimal(steps=5, examples=1), train=stream)
    expected, _ = fit(tmp_path / "2", Optimal(steps=5, examples=1), train=data())
    for site, values in expected["optimal"].items():
        torch.testing.assert_close(learned["optimal"][site], values)
    learned, made = fit(tmp_path / "3", Optimal(steps=5), choice=EachHead())
    assert len(made.results.rows) == 1 + 8
    drawn = {EachHead().draw(tiny.sites(tiny.gpt2()), seed) for seed in range(200)}
    assert len(drawn) == 8


def test_memory_that_ends_while_learning_halves_the_batches(tmp_path):
    class Small(tiny.Own):
        def evaluate(self, batch):
            if self.learning is not None and len(batch["input_ids"]) > 2:
                raise torch.OutOfMemoryError("out of memory")
            return super().evaluate(batch)

    whole, _ = fit(tmp_path / "1", Optimal(steps=3, examples=4), train=data(4))
    with pytest.warns(UserWarning, match="every batch is run in 2 pieces"):
        pieces, _ = fit(tmp_path / "2", Optimal(steps=3, examples=4), train=data(4), module=Small(tiny.gpt2()))
    for site, values in whole["optimal"].items():
        torch.testing.assert_close(pieces["optimal"][site], values, rtol=1e-4, atol=1e-5)


def test_examples_without_an_index_are_told_apart_by_their_order(tmp_path):
    class Plain(tiny.Own):
        def evaluate(self, batch):
            logits = self.target(input_ids=batch["ids"]).logits
            examples = torch.arange(len(logits)).repeat_interleave(tiny.LENGTH)
            return Scored(logits.flatten(0, 1), batch["ids"].roll(-1, 1).flatten(), examples)

        def valid(self, batch):
            return None

    rows = [{"ids": row["input_ids"]} for row in tiny.loader(8).dataset]
    loader = torch.utils.data.DataLoader(rows, batch_size=2)
    learned, made = fit(
        tmp_path, Optimal(steps=2), "noise", "mean", train=loader, val=loader, module=Plain(tiny.gpt2())
    )
    assert made.results.baseline.n == 8 * tiny.LENGTH and all(v.isfinite().all() for v in learned["optimal"].values())
    module = Plain(tiny.gpt2())
    module.trainer = tiny.trainer(tmp_path, made)
    assert [module._indices({"ids": torch.zeros(2, 3)}, number) for number in range(3)] == [[0, 1], [2, 3], [4, 5]]


def test_a_fast_dev_run_learns_a_step(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(tmp_path, Optimal(), fast_dev_run=True)


def test_what_does_not_learn_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="steps is 0"):
        Optimal(steps=0)
    with pytest.raises(NonFiniteError, match="optimal: the cross-entropy is"):
        fit(tmp_path, Optimal(steps=20, lr=1e30))


def test_the_course_has_the_fewest_epochs_that_give_the_steps():
    for batches in (1, 2, 3, 7, 25, 400):
        for examples in (1, 8, 32, 1000):
            course = Course.of(steps=50, examples=examples, batch_size=8, batches=batches)
            held = [course.is_held_out(batch) for batch in range(batches)]
            steps = len({b // course.accumulated for b in range(batches) if not held[b]})
            assert steps and (course.epochs - 1) * steps < 50 <= course.epochs * steps
            assert any(held) == (course.steps > 1) and sum(held) <= max(course.accumulated, batches / 2)


def test_moments_are_always_there():
    assert Moments in Optimal.statistics and Moments in ConditionalOptimal.statistics
    assert issubclass(Optimal, LearnedMethod) and isinstance(tiny.trainer(".", AblationCallback()), lightning.Trainer)


def test_logits_without_a_gradient_are_refused(tmp_path):
    class Detached(tiny.Own):
        @torch.no_grad()
        def evaluate(self, batch):
            return super().evaluate(batch)

    with pytest.raises(ConfigError, match="optimal can't learn: the logits"):
        fit(tmp_path, Optimal(steps=2), module=Detached(tiny.gpt2()))


def test_after_an_exception_the_same_module_and_callback_learn_anew(tmp_path):
    module, methods = tiny.Own(tiny.gpt2()), [Optimal(steps=4, examples=4)]
    made = AblationCallback(methods, fractions=[0.5], seeds=[1])
    trainer = tiny.trainer(tmp_path, made)
    trainer.callbacks.append(Dies(1, 1))
    with pytest.raises(Death):
        trainer.fit(module, data(), tiny.loader(seed=2))
    assert module.learning is None and trainer.accumulate_grad_batches == 1
    assert [type(optimizer) for optimizer in trainer.optimizers] == [torch.optim.SGD]
    again, _ = fit(tmp_path / "again", *methods, module=module)
    whole, _ = fit(tmp_path / "whole", *methods)
    assert all(torch.equal(values, whole["optimal"][site]) for site, values in again["optimal"].items())
