"""Targets sharded over processes (FSDP2, also on the CPU); in short form by the command in test_readme.py."""

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from lightning_ablate import AblationCallback, ShardedStrategy
from lightning_ablate.errors import ConfigError
from lightning_ablate.results import read_rows
from tests import tiny
from tests.test_processes import FEW, ROBERTA, assert_same, figures

SHARDED = ["--trainer.devices=2", "--trainer.strategy=sharded"]
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none")


def test_sharded_processes_give_the_figures_of_one(tmp_path, full):
    """37 images don't divide by two; statistics of either kind of run serve the other."""
    small = ["--data.calibration_images=43", "--data.evaluation_images=37", *FEW]
    one, two = figures(tmp_path, "fit", *small), figures(tmp_path, "fit", *small, *SHARDED)
    assert len(one) == 1 + 4 * 2 and one[0].n == 37
    assert_same(one, two)
    for checkpoint in sorted(tmp_path.glob("lightning_logs/*/*/ablation.ckpt"))[:1]:
        assert_same(one, figures(tmp_path, "validate", "--ckpt_path", checkpoint, *SHARDED))


@pytest.mark.parametrize("name", ["gpt2", "roberta"])
def test_sharded_language_models_give_the_figures_of_whole_ones(tmp_path, full, name):
    config = ROBERTA.with_name(f"demo_{name}.yaml")
    small = ["--config", config, "--data.calibration_tokens=1500", "--data.evaluation_tokens=1300", *FEW]
    assert_same(figures(tmp_path, "fit", *small), figures(tmp_path, "fit", *small, *SHARDED))


class Counted(tiny.Own):
    """Says which processes built the target, and how much of it each of them holds."""

    def __init__(self, folder):
        super().__init__(None, "own")
        self.folder = folder

    def build_target(self):
        (self.folder / f"built-{self.global_rank}").touch()
        return tiny.gpt2()

    def on_fit_end(self):
        self.target.reshard()  # what is in no layer
        held = sum(parameter.to_local().numel() for parameter in self.target.parameters())
        whole = sum(parameter.numel() for parameter in self.target.parameters())
        (self.folder / f"held-{self.global_rank}").write_text(f"{held} {whole}")


def fit_sharded(rank, port, folder):
    import os

    local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "NODE_RANK": 0}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "none"}
    os.environ |= {name: str(value) for name, value in (local | where).items()}
    options = {"strategy": "sharded", "devices": 2}
    tiny.fit(folder, Counted(folder), callback=AblationCallback(["mean"], [0.5], [1]), **options)
    torch.distributed.destroy_process_group()  # a spawned process doesn't run what Lightning leaves to its end


def test_each_process_holds_a_share_that_the_first_one_dealt_and_all_find_the_figures_of_one(tmp_path, full):
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(fit_sharded, (port, tmp_path), nprocs=2)
    assert {path.name for path in tmp_path.glob("built-*")} == {"built-0"}
    for rank in (0, 1):
        held, whole = map(int, (tmp_path / f"held-{rank}").read_text().split())
        assert held < 0.6 * whole
    tiny.fit(tmp_path / "one", callback=AblationCallback(["mean"], [0.5], [1]))
    assert_same(read_rows(tmp_path / "one" / "results.csv"), read_rows(tmp_path / "results.csv"))
    assert "target" not in str(list(torch.load(tmp_path / "ablation.ckpt", weights_only=True)["state_dict"]))


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_other_ways_to_shard_are_refused(tmp_path, strategy):
    callback, trainer = AblationCallback(["zero"]), tiny.trainer(tmp_path, AblationCallback(["zero"]))
    trainer.strategy.__class__ = strategy
    with pytest.raises(ConfigError, match="expected `sharded`"):
        callback.setup(trainer, tiny.Own(tiny.gpt2()), "fit")


@cuda
@pytest.mark.parametrize(("precision", "nats", "points"), [("32-true", 1e-5, 0.0), ("bf16-true", 0.02, 0.5)])
def test_a_sharded_target_on_a_gpu_gives_the_figures_of_a_whole_one(tmp_path, capsys, precision, nats, points):
    found = {}
    for strategy in ("auto", ShardedStrategy()):
        torch.cuda.reset_peak_memory_stats()
        callback = AblationCallback(["zero", "mean", "peak"], [0.5, 1.0], [1])
        options = {"accelerator": "cuda", "devices": 1, "precision": precision, "strategy": strategy}
        tiny.fit(tmp_path, tiny.Own(tiny.gpt2()), callback=callback, **options)
        found[str(strategy)] = callback.results.rows
        print(f"{strategy} {precision}: {torch.cuda.max_memory_allocated() / 1e6:.1f} MB at the peak")
    for one, other in zip(*found.values(), strict=True):
        assert other.cross_entropy == pytest.approx(one.cross_entropy, abs=nats)
        assert 100 * other.top1 == pytest.approx(100 * one.top1, abs=points)


@cuda
@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_a_quantised_target_is_swept(tmp_path, mode):
    pytest.importorskip("bitsandbytes")
    from lightning.pytorch.plugins import BitsandbytesPrecision

    callback = AblationCallback(["zero", "mean", "peak"], [0.5, 1.0], [1])
    plugins = [BitsandbytesPrecision(mode, dtype=torch.bfloat16)]
    _, callback = tiny.fit(
        tmp_path, tiny.Own(tiny.mistral()), callback=callback, accelerator="cuda", devices=1, plugins=plugins
    )
    _, whole = tiny.fit(tmp_path, tiny.Own(tiny.mistral()), callback=AblationCallback(["zero"], [1.0], [1]))
    assert callback.results.baseline.cross_entropy == pytest.approx(whole.results.baseline.cross_entropy, abs=0.3)
    assert read_rows(tmp_path / "results.csv")
