"""What the callback does with a Trainer, on tiny targets; what a row says is checked in test_ablations.py."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import lightning
import pandas as pd
import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader, DistributedSampler

from lightning_ablate import AblationCallback, Attribution, CausalLM, EachHead, Results
from lightning_ablate.errors import ConfigError, DataError, SiteError
from lightning_ablate.identity import fingerprint
from lightning_ablate.methods import AblationMethod
from lightning_ablate.modules.phase import Amount
from lightning_ablate.phases import plan, schedule
from lightning_ablate.sites import find_sites
from lightning_ablate.trainer import check_counts_once
from tests import tiny
from tests.command import assert_same_bytes
from tests.reference import hooks


def test_the_table_the_text_and_the_facts_are_left(tmp_path, capsys):
    _, callback = tiny.fit(tmp_path)
    loaded = Results.load(tmp_path)
    pd.testing.assert_frame_equal(loaded.table, callback.results.table, check_exact=True)
    assert len(loaded.table) == 1 + 3 * 3 and len(loaded.examples) == 6 * len(loaded.table)
    shown = capsys.readouterr().out
    assert str(callback.results) in shown and str(tmp_path / "results.csv") in shown
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["sites"] == [asdict(site) for site in tiny.sites(tiny.gpt2())]
    assert facts["target"]["sha256"] == fingerprint(tiny.gpt2()) and facts["partial"] == []


def test_a_page_is_told_first_and_one_that_fails_loses_nothing(tmp_path, capsys, monkeypatch):
    tiny.fit(tmp_path)
    paths = [line for line in capsys.readouterr().out.splitlines() if str(tmp_path) in line]
    assert paths[0] == f"open {tmp_path / 'report.html'}" and (tmp_path / "report.html").is_file()
    monkeypatch.setattr("lightning_ablate.results.page.LARGEST", None)
    with pytest.warns(UserWarning, match=r"^could not write .*report.html: TypeError: [^\n]*$"):
        tiny.fit(tmp_path / "again")
    assert "open " not in capsys.readouterr().out and len(Results.load(tmp_path / "again").table) == 10


def test_twice_the_same_run_gives_the_same_bytes(tmp_path, gpt2_folder):
    for seed, name in enumerate(("first", "second")):
        module = tiny.built(CausalLM(gpt2_folder))
        torch.manual_seed(seed)  # what the process drew before doesn't matter
        methods = ["zero", "mean", "peak", "noise", "resample-characters", "resample-ids", "resample-generated"]
        tiny.fit(tmp_path / name, module, callback=AblationCallback(methods, [0.5, 1.0], [1, 2]))
    assert_same_bytes(tmp_path / "first", tmp_path / "second")


def test_the_same_module_and_callback_fitted_again_give_the_same_table(tmp_path, capsys):
    module, callback = tiny.fit(tmp_path)
    first, one, other = callback.results, *(tiny.trainer(tmp_path, callback) for _ in range(2))
    for number, trainer in enumerate((one, one, other, other), 2):
        capsys.readouterr()
        trainer.fit(module, tiny.loader(seed=1), tiny.loader(seed=2))
        pd.testing.assert_frame_equal(callback.results.table, first.table, check_exact=True)
        assert callback.folder == tmp_path / f"run-{number}" and "plan: 10 conditions" in capsys.readouterr().out
        assert (callback.folder / "results.csv").read_bytes() == (tmp_path / "results.csv").read_bytes()


def test_weights_never_change_and_the_target_stays_in_eval_mode(tmp_path):
    model, modes = tiny.gpt2(attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    handle = model.transformer.h[0].register_forward_pre_hook(lambda module, _: modes.append(module.training))
    module, _ = tiny.fit(tmp_path, tiny.Own(model), callback=AblationCallback(["mean"]))
    handle.remove()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert modes and not any(modes) and hooks(model) == 0 and module.anchor.item() == 0 and module.phase is None


def test_no_hook_is_left_after_an_exception(tmp_path):
    broken = {"name": "broken-of-the-tests", "prepare": lambda self, ablation: lambda activations: activations[..., :3]}
    model, method = tiny.gpt2(), type("Broken", (AblationMethod,), broken)()
    with pytest.raises(RuntimeError, match="size of tensor"):
        tiny.fit(tmp_path, tiny.Own(model), callback=AblationCallback([method], [0.5], [1]))
    assert hooks(model) == 0
    assert (tmp_path / "ablation.ckpt").exists()  # the statistics were complete: nothing gathered is lost


def test_a_run_cut_short_is_marked_and_a_dry_one_writes_nothing(tmp_path):
    _, callback = tiny.fit(tmp_path, fast_dev_run=True)
    assert len(callback.results.table) == 10 and not list(tmp_path.iterdir())
    _, callback = tiny.fit(tmp_path, limit_train_batches=2, limit_val_batches=1)
    cut = ["calibration was cut to 2 of 3 batches", "evaluation was cut to 1 of 3 batches"]
    assert callback.results.partial == Results.load(tmp_path).partial == cut
    assert callback.results.baseline["n"] == 13 + 15


@pytest.mark.parametrize(("methods", "epochs"), [(["zero"], 1), (["mean"], 1), (["zero", "peak"], 2)])
def test_epochs_follow_from_the_methods(tmp_path, methods, epochs):
    module, _ = tiny.fit(tmp_path, callback=AblationCallback(methods, [0.5], [1]), max_epochs=7)
    assert module.trainer.fit_loop.total_batch_idx + 1 == 3 * epochs


def test_the_plan_says_how_many_passes_the_run_then_does(tmp_path, capsys):
    class Resampling(tiny.Counting):
        def source(self, kind, seed, batch):
            return {name: tensor[:1] for name, tensor in batch.items()}

    module, finding, methods = Resampling(tiny.gpt2()), [], ["zero", "peak", "resample-ids", "resample-characters"]
    tiny.fit(tmp_path, module, callback=AblationCallback(methods, [0.5, 1.0], [1, 2]))
    find_sites(module.target, lambda: finding.append(tiny.run(module.target)))
    passes = 2 * 3 + 3 * (15 + 4)
    assert f"plan: 15 conditions, {passes} forward passes, about " in capsys.readouterr().out
    assert module.passes == passes + len(finding) + 2  # by which the axes are told


@pytest.mark.parametrize(("examples", "used"), [(None, 5), (3, 2), (99, 5)])  # 5 batches of 2
def test_the_plan_counts_a_pass_of_the_used_batches_for_each_unit_that_is_verified(tmp_path, capsys, examples, used):
    module, attribution = (
        tiny.Counting(tiny.gpt2()),
        Attribution(["zero", "mean"], draws=3, verify=6, examples=examples),
    )
    callback = AblationCallback(["zero"], [0.5], [1], sites=["attention", "mlp"], attribution=attribution)
    tiny.fit(tmp_path, module, tiny.loader(9, seed=1), tiny.loader(seed=2), callback)
    # neurons and MLP neurons: the 6 largest and 6 others; heads: all 8
    verified = 1 + 2 * (12 + 12 + 8)
    assert callback.attributions["verified"].notna().sum() == 2 * (12 + 12 + 8)
    forward = 5 + used * (1 + verified) + 3 * 2
    assert f"plan: 2 conditions, {forward + used * 2 * 4} forward passes, about " in capsys.readouterr().out
    # 3 find the sites and the axes, and 1 proves that the first layer needn't run again
    assert module.passes == forward + 3 + 1


def test_the_plan_counts_the_heads_that_are_measured_with_an_attribution(tmp_path, capsys):
    module, attribution = tiny.Counting(tiny.gpt2()), Attribution(["zero"])
    callback = AblationCallback(["zero"], [0.5], [1], attribution=attribution)
    tiny.fit(tmp_path, module, tiny.loader(9, seed=1), tiny.loader(seed=2), callback)
    first = sum(own.numel() for own in module.target.transformer.h[0].parameters())
    part = 1 - first / sum(own.numel() for own in module.target.parameters())  # is left, of heads of the second layer
    expected = round(5 + 5 * (1 + 2 * (1 + 8) + 1 + 4 + 4 * part) + 3 * 2)
    # 3 find the sites and the axes, and 1 proves that the first layer needn't run again
    assert module.passes == 5 + 5 * (1 + 1 + 8) + 3 * 2 + 3 + 1
    assert len(callback.run.measured) == 8
    assert f"plan: 2 conditions, {expected} forward passes, about " in capsys.readouterr().out


def test_a_plan_of_more_than_an_hour_names_the_options_that_shorten_it():
    target, data = tiny.gpt2(), SimpleNamespace(unit="tokens")
    sites = tiny.sites(target)

    def said(attribution=(), seconds=100.0, data=data, **options):
        module = SimpleNamespace(trainer=SimpleNamespace(datamodule=data), target=target)
        phase = SimpleNamespace(calibration=SimpleNamespace(sites=sites), seconds=seconds, module=module)
        made = AblationCallback(["zero"], attribution=Attribution(attribution), **options)
        epochs = schedule(made.sweep, made.attribution, Amount(5, 2, 9))
        return plan(epochs, made.sweep, made.attribution, phase, (5.0, 20.0)).partition(" (h:mm:ss)")[2]

    fewer = "; for a shorter run give fewer "
    assert said() == fewer + "--ablation.fractions, --data.evaluation_tokens"
    assert said(["mean"], fractions=[0.5], seeds=[1, 2]) == (
        fewer + "--ablation.seeds, --data.evaluation_tokens, --ablation.attribution.examples"
    )
    assert said(seconds=1.0) == ""
    first = sum(own.numel() for own in target.transformer.h[0].parameters())
    part = 1 - 4 / 9 * first / sum(own.numel() for own in target.parameters())  # 4 of 9 conditions leave it alone
    assert said(neurons=EachHead(), data=None) == (
        f"; a condition takes {part:.0%} of a pass, as layers before it aren't run again"
    )


def test_a_fit_that_is_stopped_before_its_last_epoch_does_not_sweep(tmp_path):
    class Stopping(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = True

    with pytest.raises(ConfigError, match="fit ended before the sweep"):
        tiny.fit(tmp_path, callback=AblationCallback(["peak"], [0.5], [1]), more=[Stopping()])
    assert not (tmp_path / "results.csv").exists()


def test_what_does_not_belong_together_is_refused(tmp_path, gpt2_folder):
    with pytest.raises(ConfigError, match="needs an AblationModule, got a BoringModel"):
        tiny.fit(tmp_path, BoringModel())
    module = tiny.Own(tiny.gpt2())
    alone = tiny.trainer(tmp_path, lightning.Callback())
    for run in (lambda: alone.fit(module, tiny.loader(), tiny.loader()), lambda: alone.validate(module, tiny.loader())):
        with pytest.raises(ConfigError, match="need an AblationCallback[^\n]*$"):
            run()
    with pytest.raises(ConfigError, match="'pixels', which CausalLM doesn't make"):
        tiny.fit(tmp_path / "text", CausalLM(gpt2_folder), callback=AblationCallback(["resample-pixels"], [0.5], [1]))
    nothing = DataLoader([{**tiny.tokens(1), "index": torch.tensor([-1])}], batch_size=None)
    with pytest.raises(DataError, match="no scored position"):
        tiny.fit(tmp_path / "nothing", val=nothing)
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match="taken' is a file, expected a folder[^\n]*$"):
        tiny.fit(tmp_path, callback=AblationCallback(["zero"], dirpath=tmp_path / "taken"))


def test_a_stream_without_a_length_is_evaluated_whole(tmp_path, capsys):
    train, val = (tiny.stream(tiny.loader(seed=seed)) for seed in (1, 2))
    _, callback = tiny.fit(tmp_path / "stream", train=train, val=val)
    assert "the data tell no length" in capsys.readouterr().out
    _, whole = tiny.fit(tmp_path / "whole")
    pd.testing.assert_frame_equal(callback.results.table, whole.results.table, rtol=1e-12)  # summed in another order
    assert callback.results.examples is None and not (tmp_path / "stream" / "examples.parquet").exists()


def test_a_sampler_that_repeats_examples_is_refused():
    two = SimpleNamespace(world_size=2)
    loaders = [DataLoader(range(n), sampler=DistributedSampler(range(n), num_replicas=2, rank=0)) for n in (7, 8)]
    with pytest.raises(ConfigError, match="7 examples don't divide by 2 processes"):
        check_counts_once(two, loaders[0])
    check_counts_once(two, loaders[1])


def test_a_target_that_mixes_by_other_ways_is_told_or_refused_before_anything_is_gathered(tmp_path):
    def convolved():
        model, convolution = tiny.gpt2(), torch.nn.Conv1d(16, 16, 3, padding=1)
        model.transformer.h[0].ln_2.register_forward_hook(lambda m, i, out: out + convolution(out.mT).mT)
        return model

    class Probed(tiny.Own):
        def probes(self, batch):
            one = {name: value[:1] for name, value in batch.items()}
            return one, {**one, "input_ids": one["input_ids"] + (torch.arange(tiny.LENGTH) == 3)}

        def hidden(self, batch):
            return [self.logits(batch)]

    tiny.fit(tmp_path / "pure", Probed(tiny.gpt2()))
    for sites in ("attention", "self-attention"):
        with pytest.raises(SiteError, match="also mixes positions by other ways"):
            tiny.fit(tmp_path / sites, Probed(convolved()), callback=AblationCallback(sites=sites, strict=True))
    with pytest.warns(UserWarning, match="other mixing: 1 of 2 layers"):
        _, callback = tiny.fit(tmp_path / "all the same", Probed(convolved()), callback=AblationCallback(["zero"]))
    assert "other mixing: 1 of 2 layers" in str(callback.results)
    assert "other mixing: 1 of 2 layers" in (tmp_path / "all the same" / "run.json").read_text()
    pattern = AblationCallback(sites="*.attn.c_proj", strict=True)
    tiny.fit(tmp_path / "pattern", Probed(convolved()), callback=pattern)


def test_a_choice_that_the_sites_do_not_allow_is_refused_at_the_first_batch(tmp_path):
    module = tiny.Own(tiny.gpt2())
    with pytest.raises(SiteError, match="h.0.mlp.c_proj .mlp, 64 neurons. has no heads"):
        tiny.fit(tmp_path, module, callback=AblationCallback(sites="mlp", neurons=EachHead()))
    assert module.trainer.fit_loop.total_batch_idx == 0


MONITORED = "cross_entropy/zero 0.5 seed 1"


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: callbacks.EarlyStopping(MONITORED, patience=0),
        lambda folder: callbacks.EarlyStopping("val_loss"),
        lambda folder: callbacks.EarlyStopping(MONITORED, check_on_train_epoch_end=True),
        lambda folder: callbacks.ModelCheckpoint(folder, monitor=MONITORED, save_on_train_epoch_end=True),
        lambda folder: callbacks.ModelCheckpoint(folder, monitor=MONITORED, every_n_train_steps=1),
    ],
)
@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:.*could not find the monitored key")
@pytest.mark.parametrize("first", [True, False])
def test_callbacks_that_look_at_our_metrics_before_the_sweep_change_nothing(make, first, tmp_path):
    """Of two epochs of calibration, as peaks take, the sweep is behind the second."""
    found = []
    for other in ([], [make(tmp_path / "own")]):
        ours = AblationCallback(["zero", "peak"], [0.5], [1])
        each = [*other, ours] if first else [ours, *other]
        options = {"logger": False, "accelerator": "cpu", "enable_progress_bar": False, "max_epochs": 1}
        made = lightning.Trainer(callbacks=each, default_root_dir=tmp_path, enable_checkpointing=True, **options)
        made.fit(tiny.Own(tiny.gpt2()), tiny.loader(seed=1), tiny.loader(seed=2))
        found.append(ours.results.table)
    assert found[0].equals(found[1])


@pytest.mark.parametrize(
    "other",
    [
        callbacks.EMAWeightAveraging,
        callbacks.LearningRateFinder,
        callbacks.SpikeDetection,
        lambda: callbacks.ModelPruning("l1_unstructured"),
    ],
)
def test_callbacks_that_train_are_refused(other, tmp_path):
    with pytest.raises(
        ConfigError, match="is for training, but nothing is trained here; leave it out .--trainer.callbacks"
    ):
        tiny.fit(tmp_path, more=[other()])
