import lightning
import pytest
import torch

from lightning_ablate import AblationCallback
from lightning_ablate.errors import ConfigError, StatisticsError
from lightning_ablate.journal import FOLDER, SWEEP, Journal, Place, is_unfinished
from tests import tiny

FILES = {"results.csv", "run.json", "degradation.png", "neurons.parquet", "neurons.png", "ablation.ckpt"}


class Death(Exception):
    """A run that dies."""


class Dies(lightning.Callback):
    """Lets a run die behind a batch: of a calibration epoch, or of the sweep (epoch None)."""

    def __init__(self, epoch, batch):
        self.epoch, self.batch = epoch, batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (self.epoch, self.batch):
            raise Death

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if (None, batch_idx) == (self.epoch, self.batch):
            raise Death


class Counting(tiny.Own):
    """Counts the forward passes."""

    passes = 0

    def evaluate(self, batch):
        self.passes += 1
        return super().evaluate(batch)


def callback(folder, **options):
    given = {"methods": ["zero", "mean", "peak"], "fractions": [0.5, 1.0], "seeds": [1, 2], "note_every": 0}
    return AblationCallback(**{**given, **options}, folder=folder)


def run(folder, *more, module=None, **options):
    module = module or Counting(tiny.gpt2())
    made = callback(folder, **options)
    trainer = tiny.trainer(folder.parent, made)
    trainer.callbacks += more  # behind the one that notes
    trainer.fit(module, tiny.loader(seed=1), tiny.loader(seed=2))
    return module, made


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    module, _ = run(folder)
    return (folder / "results.csv").read_bytes(), module.passes


@pytest.mark.parametrize("epoch", [0, 1, None])
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_a_run_that_died_goes_on_and_its_results_are_those_of_a_whole_one(tmp_path, whole, epoch, batch):
    folder = tmp_path / "run"
    first = Counting(tiny.gpt2())
    with pytest.raises(Death):
        run(folder, Dies(epoch, batch), module=first)
    assert is_unfinished(folder) and not (folder / "results.csv").exists()
    second, _ = run(folder)
    expected, passes = whole
    assert (folder / "results.csv").read_bytes() == expected
    assert first.passes + second.passes <= passes + 1  # nothing is done twice but the pass that finds the sites
    assert (
        not (folder / FOLDER).exists() and (folder / "ablation.ckpt").exists() and (folder / "neurons.parquet").exists()
    )


def test_a_run_may_die_many_times(tmp_path, whole):
    folder = tmp_path / "run"
    for epoch, batch in [(0, 1), (1, 0), (1, 2), (None, 0), (None, 1)]:
        with pytest.raises(Death):
            run(folder, Dies(epoch, batch))
    run(folder)
    assert (folder / "results.csv").read_bytes() == whole[0]


def test_validate_goes_on_as_well(tmp_path, whole):
    run(tmp_path / "fit")
    checkpoint, folder = tmp_path / "fit" / "ablation.ckpt", tmp_path / "again"
    for more in ([Dies(None, 1)], []):
        module = Counting(tiny.gpt2())
        trainer = tiny.trainer(tmp_path, callback(folder))
        trainer.callbacks += more
        try:
            trainer.validate(module, tiny.loader(seed=2), ckpt_path=checkpoint)
        except Death:
            assert more
    assert (folder / "results.csv").read_bytes() == whole[0]
    assert module.passes < whole[1] / 2


def test_an_unfinished_run_of_another_configuration_is_refused_by_name(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(Death):
        run(folder, Dies(0, 1))
    with pytest.raises(ConfigError, match=r"another configuration: seeds is \[7\] here, was \[1, 2\]"):
        run(folder, seeds=[7])
    run(folder)


def test_a_finished_folder_is_kept_and_notes_are_rare_by_default(tmp_path, whole):
    folder = tmp_path / "run"
    for _ in range(2):
        run(folder, note_every=60.0)
    assert (folder / "results.csv").read_bytes() == (folder / "run-2" / "results.csv").read_bytes() == whole[0]
    with pytest.raises(Death):
        run(tmp_path / "other", Dies(None, 0), note_every=60.0)
    assert not is_unfinished(tmp_path / "other")


def test_the_last_place_is_one_that_all_processes_noted(tmp_path):
    first, second = (Journal(tmp_path, rank, 2, 0.0) for rank in (0, 1))
    assert first.check({"seeds": (1, 2)}) == "" and first.latest() is None and first.due
    for place in (Place(0, 1), Place(0, 2), Place(1, 1), Place(SWEEP, 1)):
        first.note(place, {"x": torch.tensor(place.batches)})
    second.note(Place(1, 1), {})
    assert first.latest() == second.latest() == Place(1, 1)
    assert first.read(Place(1, 1))["x"] == 1
    assert sorted(path.name for path in first.folder.iterdir()) == [
        "1.1.0.pt",
        "1.1.1.pt",
        f"{SWEEP}.1.0.pt",
        "plan.json",
    ]
    again = Journal(tmp_path, 0, 2, 60.0)
    assert again.check({"seeds": [1, 2]}) == "" and "seeds is [3] here, was [1, 2]" in again.check({"seeds": [3]})
    assert not again.due
    first.close()
    assert not is_unfinished(tmp_path)


def test_a_damaged_note_is_refused_in_a_line(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(Death):
        run(folder, Dies(0, 1))
    for note in (folder / FOLDER).glob("*.pt"):
        note.write_bytes(note.read_bytes()[:500])
    with pytest.raises(StatisticsError, match="could not load .*unfinished"):
        run(folder)
    (folder / FOLDER / "plan.json").write_text("{")
    with pytest.raises(ConfigError, match="could not load .*plan.json"):
        run(folder)
