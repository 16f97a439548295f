"""A run that died goes on, to the same bytes; test_kills.py is the same with the real command."""

import os
import pathlib
import signal
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data._utils.fetch import _MapDatasetFetcher

from lightning_ablate import AblationCallback
from lightning_ablate.calibration import saved_state
from lightning_ablate.errors import ConfigError, StatisticsError, TargetError
from lightning_ablate.files import fresh_folder
from lightning_ablate.methods import Optimal
from lightning_ablate.run import Store, is_unfinished
from lightning_ablate.trainer import from_first
from tests import tiny
from tests.command import assert_same_bytes
from tests.tiny import Counting, Death, Dies

EPOCHS, BATCHES = 4, 3  # two that calibrate and two that learn


def callback(folder, **options):
    given = {"fractions": [0.5, 1.0], "seeds": [1, 2], "save_every": 0, **options}
    given.setdefault("methods", ["zero", "peak", "noise", Optimal(steps=3, lr=0.02, examples=2)])
    return AblationCallback(**given, dirpath=folder)


def run(folder, *more, **options):
    """Runs ``fit``, to its death if there is a callback; the forward passes."""
    module = Counting(tiny.gpt2())
    with pytest.raises(Death) if more else nullcontext():
        tiny.fit(folder.parent, module, callback=callback(folder, **options), more=more)
    return module.passes


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, run(folder)


@pytest.mark.parametrize("epoch", [*range(EPOCHS), None])
@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_run_that_died_goes_on_from_the_end_of_an_epoch_or_the_last_batch_of_its_sweep(tmp_path, whole, epoch, batch):
    done = run(tmp_path / "run", Dies(epoch, batch)) + run(tmp_path / "run")
    assert_same_bytes(tmp_path / "run", whole[0])
    # of the one epoch that is run twice, and of finding the sites
    again = 0 if epoch is None or batch == BATCHES - 1 else batch + 1 + 3 * (epoch == 0)
    assert whole[1] <= done <= whole[1] + again
    assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in whole[0].iterdir()}


def test_a_run_that_dies_within_batches_20_times_goes_on_at_the_conditions_it_had_reached(tmp_path, whole, monkeypatch):
    monkeypatch.setattr("lightning_ablate.run._SHARE", 0)  # or saving would take too large a part of the time

    class DiesWithin(Callback):
        begun = 0

        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            pl_module.phase.announce = self.announce

        def announce(self, condition):
            self.begun += 1
            if self.begun > 3:  # the intact target again, and two conditions
                raise Death

    died = 0
    while not (tmp_path / "run" / "results.csv").exists():
        try:
            tiny.fit(tmp_path, callback=callback(tmp_path / "run", save_every=1e-9), more=[DiesWithin()])
        except Death:
            died += 1
    assert died >= 20
    assert_same_bytes(tmp_path / "run", whole[0])


def test_a_run_that_died_in_its_sweep_reads_no_calibration_data(tmp_path, whole, monkeypatch):
    read, fetch = [], _MapDatasetFetcher.fetch
    monkeypatch.setattr(_MapDatasetFetcher, "fetch", lambda self, rows: read.append(self.dataset) or fetch(self, rows))
    run(tmp_path / "run", Dies(None, 1))
    for folder, epochs in ((tmp_path / "run", 0), (tmp_path / "anew", EPOCHS)):
        train, before = tiny.loader(seed=1), len(read)
        tiny.fit(tmp_path, Counting(tiny.gpt2()), train, callback=callback(folder))
        assert sum(data is train.dataset for data in read[before:]) == epochs * BATCHES
        assert_same_bytes(folder, whole[0])


class Odd(Callback):
    """Has a state that isn't plain."""

    def state_dict(self):
        return {"where": pathlib.Path("here")}


def test_a_callback_whose_state_is_not_plain_keeps_no_run_from_going_on(tmp_path, whole):
    run(tmp_path / "run", Odd(), Dies(None, 1))
    run(tmp_path / "run")
    assert_same_bytes(tmp_path / "run", whole[0])


def test_an_unfinished_run_can_be_validated_and_then_go_on(tmp_path, whole):
    run(tmp_path / "run", Dies(None, 1))
    made = callback(tmp_path / "run")
    tiny.validate(tmp_path, tmp_path / "run" / "ablation.ckpt", made)
    assert made.folder == tmp_path / "run" / "run-2" and not (made.folder / "ablation.ckpt").exists()
    assert_same_bytes(made.folder, whole[0])
    run(tmp_path / "run")
    assert_same_bytes(tmp_path / "run", whole[0])


def test_a_run_may_die_many_times(tmp_path, whole):
    for epoch, batch in [(0, 1), (0, 2), (0, 0), (1, 1), (0, 2), (0, 0), (None, 0), (None, 0), (None, 1)]:
        run(tmp_path / "run", Dies(epoch, batch))
    run(tmp_path / "run")
    assert_same_bytes(tmp_path / "run", whole[0])


def test_validate_goes_on_as_well(tmp_path, whole):
    passes = []
    for more in ([Dies(None, 1)], []):
        module = Counting(tiny.gpt2())
        with pytest.raises(Death) if more else nullcontext():
            tiny.validate(tmp_path, whole[0] / "ablation.ckpt", callback(tmp_path / "again"), module, more)
        passes.append(module.passes)
    assert_same_bytes(tmp_path / "again", whole[0])
    assert passes[0] == 2 * passes[1]  # two batches, and the third


def test_an_unfinished_run_of_another_configuration_is_refused_by_the_first_difference(tmp_path):
    run(tmp_path / "run", Dies(1, 2))
    with pytest.raises(ConfigError, match=r"another configuration: seeds is \[7\] here, was \[1, 2\] there[^\n]*$"):
        run(tmp_path / "run", seeds=[7], sites="mlp")
    assert is_unfinished(tmp_path / "run", "fit")


def test_a_sweep_of_an_earlier_version_is_refused_in_a_line(tmp_path):
    run(tmp_path / "run", Dies(None, 1))
    file = tmp_path / "run" / "ablation.ckpt"
    state = torch.load(file, weights_only=True)
    (own,) = (one for one in state["callbacks"].values() if "calibration" in one)
    del own["phase"]["stops"]
    torch.save(state, file)
    with pytest.raises(StatisticsError, match="the unfinished run's checkpoint.*it lacks 'stops'"):
        run(tmp_path / "run")


def test_a_finished_folder_is_kept_and_saves_are_rare_by_default(tmp_path, whole):
    for _ in range(2):
        run(tmp_path / "run", save_every=60.0)
    assert_same_bytes(tmp_path / "run", whole[0])
    assert_same_bytes(tmp_path / "run" / "run-2", whole[0])
    run(tmp_path / "other", Dies(None, 1), save_every=60.0)
    saved = saved_state(tmp_path / "other" / "ablation.ckpt")
    assert saved["epochs"] == 4 and saved["phase"] == {}


def test_a_store_keeps_its_folder_and_gives_back_what_was_saved(tmp_path):
    first, second = (Store(tmp_path, 0.0) for _ in range(2))
    assert first.claim({"command": "fit"}) == {} and first.due
    state = {"calibration": {}, "facts": {"command": "fit"}, "finished": False, "x": torch.tensor(1)}
    first.save(lambda: {"callbacks": {"mine": state}})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ablation.ckpt", "ablation.lock"]
    again = Store(tmp_path, 60.0)
    with pytest.raises(ConfigError, match="a run is going on in"):
        again.claim({"command": "fit"})
    second.leave()
    with pytest.raises(ConfigError, match="a run is going on in"):
        again.claim({"command": "fit"})
    first.leave()
    found = again.claim({"command": "fit"})
    assert found["x"].item() == 1 and not again.due and is_unfinished(tmp_path, "fit")
    again.close(keep=False)
    assert not is_unfinished(tmp_path, "fit") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [None, ConfigError("in use")])
def test_what_the_first_process_reads_or_refuses_reaches_all_without_a_shared_disk(error):
    sent, made = [], []

    def make():
        made.append(1)
        if error:
            raise error
        return {"x": torch.tensor(1)}

    for rank in (0, 1):
        strategy = SimpleNamespace(
            broadcast=lambda found, rank=rank: sent.append(found) or found if rank == 0 else sent[0]
        )
        trainer = SimpleNamespace(is_global_zero=rank == 0, strategy=strategy)
        with pytest.raises(ConfigError, match="in use") if error else nullcontext():
            assert from_first(trainer, make) == {"x": torch.tensor(1)}
    assert len(made) == 1


def test_a_run_that_is_going_on_keeps_its_folder_and_one_that_leaves_takes_only_what_it_made(tmp_path):
    live = Store(tmp_path / "run", 0.0)
    live.claim({})
    other = Store(tmp_path / "run", 0.0)
    with pytest.raises(ConfigError, match="a run is going on in .*run; wait for it"):
        other.claim({})
    other.leave()
    assert (tmp_path / "run" / "ablation.lock").exists()
    child = os.fork()  # as a worker that loads data, which inherits the lock
    if not child:
        time.sleep(60)
    live.leave()
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    other = Store(tmp_path / "run", 0.0)
    other.claim({})
    assert fresh_folder(tmp_path / "run") == tmp_path / "run"  # where nothing is saved yet there is nothing to keep
    other.leave()
    assert (tmp_path / "run").is_dir()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_damaged_save_is_refused_in_a_line(tmp_path):
    run(tmp_path / "run", Dies(1, 2))
    save = tmp_path / "run" / "ablation.ckpt"
    save.write_bytes(save.read_bytes()[:500])
    with pytest.raises(TargetError, match="could not load .*ablation.ckpt"):
        run(tmp_path / "run")
