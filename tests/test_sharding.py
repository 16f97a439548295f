"""Targets sharded over processes (FSDP2, also on the CPU); test_processes.py compares them with whole ones."""

import os

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from lightning_ablate import AblationCallback, Results, ShardedStrategy
from lightning_ablate.errors import ConfigError
from tests import tiny
from tests.command import assert_same, free_port

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none")


class Counted(tiny.Own):
    def __init__(self, folder):
        super().__init__(None, "own")
        self.folder = folder

    def build_target(self):
        (self.folder / f"built-{self.global_rank}").touch()
        return tiny.gpt2()

    def on_fit_end(self):
        self.target.reshard()  # what is in no layer
        parts = [(parameter.to_local().numel(), parameter.numel()) for parameter in self.target.parameters()]
        held, whole = map(sum, zip(*parts, strict=True))
        (self.folder / f"held-{self.global_rank}").write_text(str(held / whole))


def fit_sharded(rank, port, folder):
    local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "NODE_RANK": 0}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "none"}
    os.environ |= {name: str(value) for name, value in (local | where).items()}
    callback = AblationCallback(["mean"], [0.5], [1])
    tiny.fit(folder, Counted(folder), callback=callback, strategy="sharded", devices=2)
    torch.distributed.destroy_process_group()  # a spawned process doesn't run what Lightning leaves to its end


def test_each_process_holds_a_share_that_the_first_one_dealt_and_all_find_what_one_does(tmp_path, full):
    torch.multiprocessing.start_processes(fit_sharded, (free_port(), tmp_path), 2, start_method="forkserver")
    assert {path.name for path in tmp_path.glob("built-*")} == {"built-0"}
    assert all(float((tmp_path / f"held-{rank}").read_text()) < 0.6 for rank in (0, 1))
    _, one = tiny.fit(tmp_path / "one", callback=AblationCallback(["mean"], [0.5], [1]))
    assert_same(one.results, Results.load(tmp_path))
    assert "target" not in str(list(torch.load(tmp_path / "ablation.ckpt", weights_only=True)["state_dict"]))


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_other_ways_to_shard_are_refused(tmp_path, strategy):
    callback, trainer = AblationCallback(["zero"]), tiny.trainer(tmp_path, AblationCallback(["zero"]))
    trainer.strategy.__class__ = strategy
    with pytest.raises(ConfigError, match="expected `sharded`"):
        callback.setup(trainer, tiny.Own(tiny.gpt2()), "fit")


@cuda
@pytest.mark.parametrize(("precision", "nats", "points"), [("32-true", 1e-5, 0.0), ("bf16-true", 0.02, 0.5)])
def test_a_sharded_target_on_a_gpu_scores_as_a_whole_one(tmp_path, precision, nats, points):
    tables = []
    for strategy in ("auto", ShardedStrategy()):
        callback = AblationCallback(["zero", "mean", "peak"], [0.5, 1.0], [1])
        options = {"accelerator": "cuda", "devices": 1, "precision": precision, "strategy": strategy}
        tiny.fit(tmp_path, tiny.Own(tiny.gpt2()), callback=callback, **options)
        tables.append(callback.results.table)
    differences = {name: (tables[1][name] - tables[0][name]).abs().max() for name in ("cross_entropy", "top1")}
    assert differences["cross_entropy"] <= nats and 100 * differences["top1"] <= points


@cuda
@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_a_quantised_target_is_swept(tmp_path, mode):
    pytest.importorskip("bitsandbytes")
    from lightning.pytorch.plugins import BitsandbytesPrecision

    options = {"accelerator": "cuda", "devices": 1, "plugins": [BitsandbytesPrecision(mode, dtype=torch.bfloat16)]}
    baselines = []
    for more in (options, {}):
        _, callback = tiny.fit(tmp_path, tiny.Own(tiny.mistral()), **more)
        baselines.append(callback.results.baseline["cross_entropy"])
    assert baselines[0] == pytest.approx(baselines[1], abs=0.3)
