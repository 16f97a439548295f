"""The same numbers on several processes (gloo on the CPU)."""

import json
import subprocess
import sys

import datasets
import pytest
import torch
from torch import multiprocessing

from lightning_ablate import Results
from lightning_ablate.calibration import saved_state
from lightning_ablate.metrics import Clean, Scored, SweepMetrics
from lightning_ablate.statistics import Covariance, Histogram, MeanByPosition, Moments, SiteStatistics
from tests import tiny
from tests.command import CONFIGS, FEW, TWO, assert_same, assert_same_bytes, command, found, free_port, killed

IMAGES = ["fit", *FEW, "--data.calibration_images=43", "--data.evaluation_images=37"]
TEXT = ["fit", "--config", CONFIGS / "demo_roberta.yaml", *FEW, "--data.max_length=48"]
OPTIMAL, TUNED = (
    {"class_path": f"lightning_ablate.methods.{name}", "init_args": {"steps": 4}}
    for name in ("Optimal", "ConditionalTuned")
)
METHODS = ["positional-mean", "noise", "resample-any-position", "conditional-mean"]
TUNED["init_args"]["examples"] = 32  # in a step, or a batch of each process would be more
METHODS += [OPTIMAL, TUNED]
LEARNED = 1e-4  # nats: the sums of a step are rounded in another order


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "run"
    return found(folder, *IMAGES, *TWO, "--ablation.save_every=0"), folder


def test_two_processes_find_what_one_does(tmp_path, two):
    """37 images don't divide by two; neither do those that calibrate."""
    one = found(tmp_path / "one", *IMAGES)
    assert len(one.table) == 1 + 4 * 2 and one.baseline["n"] == 37
    assert_same(one, two[0])


def test_two_processes_that_were_killed_go_on(tmp_path, two):
    died, folder = [*IMAGES, *TWO, "--ablation.save_every=0"], tmp_path / "run"
    killed(folder, *died, batch=1)
    saved = saved_state(folder / "ablation.ckpt")
    assert saved["phase"]["done"] == [1] and int(saved["phase"]["metrics"][0]["n"].sum()) > 0
    found(folder, *died)
    assert_same_bytes(folder, two[1])


@pytest.mark.filterwarnings("ignore:.*what was learned is worse")  # in so few steps
def test_two_processes_find_what_one_does_on_padded_and_masked_text(tmp_path):
    small = [*TEXT, "--data.calibration_tokens=1500", "--data.evaluation_tokens=700"]
    small.append(f"--ablation.methods={json.dumps(METHODS)}")
    one, two = found(tmp_path / "one", *small), found(tmp_path / "two", *small, *TWO)
    assert len(one.table) == 1 + len(METHODS) * 2
    assert_same(one, two, LEARNED)
    again = ["validate", "--ckpt_path", tmp_path / "one" / "ablation.ckpt", *TWO, "--trainer.strategy=sharded"]
    assert_same(one, found(tmp_path / "sharded", *again))


def draw():
    return torch.randn(4, 60, 5, generator=torch.Generator().manual_seed(0))


def gathered(x, synced=False):
    found = {}
    for kind in (Moments, Covariance, Histogram):
        found[kind] = kind(5, SiteStatistics("here", found))
        found[kind].update(x)
        if synced:
            found[kind].sync()
    return {kind.__name__: s.metric_state for kind, s in found.items()} | {"described": found[Histogram].described()}


def rank_of_two(rank, port, folder):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    states = gathered(draw().flatten(0, 1).tensor_split([130])[rank].unsqueeze(1), synced=True)
    lengths = MeanByPosition(5)
    lengths.update(draw()[rank::2, : 5 - rank])  # of which the ranks see different ones
    lengths.sync()
    metrics, logits = SweepMetrics(2, 3), torch.arange(12.0).view(3, 4) * (rank + 1)
    scored = Scored(logits, torch.tensor([3, 0, 1]), torch.tensor([0, 1, -1 if rank else 2]))
    for condition in (0, 1):
        metrics.update(condition, scored, Clean.of(scored._replace(logits=logits.flip(1))))
    metrics.sync()
    states["metrics"] = {**metrics.means, "sums": metrics.sums}
    torch.save({**states, "lengths": lengths.metric_state}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_statistics_and_metrics_merge_over_ranks_as_if_there_were_one(tmp_path):
    multiprocessing.start_processes(rank_of_two, (free_port(), tmp_path), 2, start_method="forkserver")
    ours = gathered(draw().flatten(0, 1).unsqueeze(1))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close({name: first[name] for name in ours}, ours, rtol=1e-12, atol=1e-12)
    x, lengths = draw(), first["lengths"]
    assert lengths["count"].tolist() == [4, 4, 4, 4, 2]
    torch.testing.assert_close(lengths["sums"][:4], x[:, :4].sum(0, dtype=torch.float64))
    torch.testing.assert_close(lengths["sums"][4], x[::2, 4].sum(0, dtype=torch.float64))
    # by hand: rank 0 hits its first target, rank 1 its first and drops its third
    assert first["metrics"]["n"] == 5 and first["metrics"]["top1"].tolist() == pytest.approx([2 / 5, 2 / 5])
    assert first["metrics"]["sums"][1, 0].tolist() == [2, 0, 0, 0]


@pytest.mark.filterwarnings("ignore:.*what was learned is worse")  # in so few steps
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
@pytest.mark.parametrize("target", ["vit", "roberta"])
def test_what_two_processes_learn_and_draw_is_what_one_does(tmp_path, full, strategy, target):
    """A step takes 32 examples: four batches of one process, two of two."""
    small = [*IMAGES, "--data.calibration_images=83"]
    if target == "roberta":  # padded to different lengths
        small = [*TEXT, "--data.max_length=128", "--data.calibration_tokens=4000", "--data.evaluation_tokens=1300"]
    methods = [*METHODS, "resample-same-position", "conditional-mean-per-head"]
    small.append(f"--ablation.methods={json.dumps(methods)}")
    one = found(tmp_path / "one", *small)
    two = found(tmp_path / "two", *small, "--trainer.devices=2", f"--trainer.strategy={strategy}")
    assert_same(one, two, LEARNED)


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("count", [36, 37, 1])
@pytest.mark.parametrize("target", ["vit", "gpt2"])
def test_any_count_on_any_number_of_processes(tmp_path, full, target, count, processes):
    small = [*IMAGES, f"--data.evaluation_images={count}"]
    if target == "gpt2":
        small = ["fit", "--config", CONFIGS / "demo_gpt2.yaml", *FEW, "--data.max_length=64", "--data.packing=pack"]
        small += ["--data.calibration_tokens=600", f"--data.evaluation_tokens={24 * count}"]
    several = [f"--trainer.devices={processes}", "--trainer.strategy=ddp"]
    assert_same(found(tmp_path / "one", *small), found(tmp_path / "several", *small, *several))


def test_a_stream_on_two_processes(tmp_path, full, gpt2_folder):
    datasets.Dataset.from_dict({"text": tiny.TEXTS}).to_parquet(tmp_path / "texts.parquet")
    small = ["fit", "--model=CausalLM", f"--model.name={gpt2_folder}", "--data=TextData", *FEW]
    small += [f"--data.name={tmp_path / 'texts.parquet'}", "--data.max_length=32", "--data.shuffle_seed=1"]
    small += ["--data.streaming=true", "--data.calibration_tokens=700", "--data.evaluation_tokens=900"]
    assert_same(found(tmp_path / "one", *small), found(tmp_path / "two", *small, *TWO))


def test_two_nodes_of_torchrun(tmp_path, full):
    one, port, nodes = found(tmp_path / "one", *IMAGES), free_port(), []
    ours = [*IMAGES, "--trainer.num_nodes=2", "--trainer.strategy=ddp", f"--ablation.dirpath={tmp_path / 'two'}"]
    for node in (0, 1):
        launcher = ["--nnodes=2", f"--node-rank={node}", "--nproc-per-node=1", "--master-addr=127.0.0.1"]
        launched = [sys.executable, "-m", "torch.distributed.run", *launcher, f"--master-port={port}"]
        with (tmp_path / f"said-{node}").open("w") as said:
            made = [*launched, *command(*ours, "--trainer.devices=1")[1:]]
            nodes.append(subprocess.Popen(made, cwd=tmp_path, stdout=said, stderr=said))
    for node, process in enumerate(nodes):
        assert process.wait(timeout=300) == 0, (tmp_path / f"said-{node}").read_text()
    assert_same(one, Results.load(tmp_path / "two"))
