"""Batches that are too much for the memory are run in pieces."""

import json

import pytest
import torch

from lightning_ablate import AblationCallback
from lightning_ablate.errors import ConfigError
from lightning_ablate.statistics import LatticeHistogram, Moments
from tests import tiny

METHODS = ["zero", "mean", "peak"]


class Scarce(tiny.Own):
    """Has memory for so many examples at a time; each pass that is too large fails within layer ``at``, as a GPU's."""

    def __init__(self, most, at="transformer.h.1.mlp", on=lambda passes: True):
        super().__init__(tiny.gpt2())
        self.most, self.at, self.on, self.passes = most, at, on, 0

    def build_target(self):
        target = super().build_target()

        def allocate(module, inputs):
            self.passes += 1
            if len(inputs[0]) > self.most and self.on(self.passes):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        target.get_submodule(self.at).register_forward_pre_hook(allocate)
        return target


def run(folder, module, **options):
    callback = AblationCallback(METHODS, [0.5, 1.0], [1, 2])
    tiny.fit(folder, module, tiny.loader(7, 4, seed=1), tiny.loader(7, 4, seed=2), callback, **options)
    return callback


@pytest.fixture(scope="module")
def plenty(tmp_path_factory):
    return run(tmp_path_factory.mktemp("plenty"), tiny.Own(tiny.gpt2()))


def assert_alike(callback, plenty):
    for row, other in zip(callback.results.rows, plenty.results.rows, strict=True):
        assert (row.method, row.fraction, row.seed, row.n, row.top1) == (
            *(other.method, other.fraction, other.seed, other.n, other.top1),
        )
        assert row.cross_entropy == pytest.approx(other.cross_entropy, abs=1e-5)


@pytest.mark.parametrize("most", [3, 2, 1])
@pytest.mark.parametrize("at", ["transformer.h.0.attn", "transformer.h.1.mlp"])
def test_batches_in_pieces_give_the_statistics_and_figures_of_whole_ones(tmp_path, plenty, most, at):
    """Within the second layer, the first one's statistics have seen the whole batch already."""
    module = Scarce(most, at)
    with pytest.warns(UserWarning, match="out of memory: every batch is run in"):
        callback = run(tmp_path, module)
    assert_alike(callback, plenty)
    for mine, theirs in zip(
        *(c.state_dict()["statistics"]["sites"] for c in (callback, plenty)),
        strict=True,
    ):
        counted = mine["statistics"]["Moments"]["parts"][0], theirs["statistics"]["Moments"]["parts"][0]
        assert torch.equal(*counted)
        counts = mine["statistics"]["LatticeHistogram"]["lattice"], theirs["statistics"]["LatticeHistogram"]["lattice"]
        assert counts[0][:, 6:].sum() == counts[1][:, 6:].sum()
    assert json.loads((tmp_path / "run.json").read_text())["pieces_of_a_batch"] == {3: 2, 2: 2, 1: 4}[most]


@pytest.mark.parametrize("late", [5, 12, 20])
def test_memory_that_ends_in_the_middle_of_a_sweep_repeats_no_condition(tmp_path, plenty, late):
    module = Scarce(2, on=lambda passes: passes > late)
    with pytest.warns(UserWarning, match="in 2 pieces"):
        assert_alike(run(tmp_path, module), plenty)


def test_an_update_that_fails_leaves_the_statistic_as_it_was(monkeypatch, tmp_path, plenty):
    """The histogram has counted, then there is no memory for the rest of the update."""
    whole, calls = LatticeHistogram._replace, []

    def replace(self, head, counts):
        calls.append(1)
        whole(self, head, counts)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(LatticeHistogram, "_replace", replace)
    with pytest.warns(UserWarning, match="in 2 pieces"):
        callback = run(tmp_path, tiny.Own(tiny.gpt2()))
    assert_alike(callback, plenty)
    for mine, theirs in zip(*(c.state_dict()["statistics"]["sites"] for c in (callback, plenty)), strict=True):
        for name in ("Moments", "LatticeHistogram"):
            (mine_state,), (state,) = (site["statistics"][name].values() for site in (mine, theirs))
            sums = (mine_state[0].sum(), state[0].sum()) if name == "Moments" else (mine_state.sum(), state.sum())
            assert name == "LatticeHistogram" or torch.equal(*sums)


def test_a_single_example_that_is_too_much_ends_in_an_error(tmp_path):
    with pytest.warns(UserWarning, match="out of memory"), pytest.raises(ConfigError, match="with a single example"):
        run(tmp_path, Scarce(0))


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path):
    class Broken(tiny.Own):
        def evaluate(self, batch):
            raise RuntimeError("shapes don't match")

    with pytest.raises(RuntimeError, match="shapes don't match"):
        run(tmp_path, Broken(tiny.gpt2()))


def test_any_batch_of_tensors_can_be_cut():
    module, batch = tiny.Own(tiny.gpt2()), {"a": torch.arange(5), "b": [torch.arange(10).view(5, 2), "name"]}
    pieces = module.split(batch, 2)
    assert [piece["a"].tolist() for piece in pieces] == [[0, 1, 2], [3, 4]] and pieces[1]["b"][1] == "name"
    assert len(module.split(batch, 16)) == 5
    with pytest.raises(ConfigError, match=r"first dimensions \[2, 5\] can't be cut"):
        module.split({"a": torch.arange(5), "b": torch.arange(2)}, 2)


def test_resumed_runs_keep_the_pieces(tmp_path):
    class Died(Exception):
        pass

    class Mortal(Scarce):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            if self.mortal:
                self.mortal = False
                raise Died

    def callback(name):
        return AblationCallback(METHODS, [0.5], [1], folder=tmp_path / name, note_every=0)

    def fit(name, module, taken):
        data = tiny.loader(7, 4, seed=1), tiny.loader(7, 2, seed=2)
        tiny.trainer(tmp_path, taken).fit(module, *data)

    module, other = Mortal(2), Mortal(2)
    module.mortal, other.mortal = False, True
    with pytest.warns(UserWarning, match="in 2 pieces"):
        fit("whole", module, callback("whole"))
    with pytest.warns(UserWarning, match="in 2 pieces"), pytest.raises(Died):
        fit("died", other, callback("died"))
    again = Mortal(2)
    again.mortal = False
    fit("died", again, callback("died"))
    assert again.pieces == 2
    assert (tmp_path / "died" / "results.csv").read_bytes() == (tmp_path / "whole" / "results.csv").read_bytes()


def test_moments_count_each_position_once_after_a_failure():
    from lightning_ablate.calibration import _whole

    statistic = Moments(2)
    statistic.update(torch.ones(1, 3, 2))
    with pytest.raises(ZeroDivisionError), _whole(statistic):
        statistic.update(torch.ones(1, 3, 2))
        raise ZeroDivisionError
    assert int(statistic.count) == 3
