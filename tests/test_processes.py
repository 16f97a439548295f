"""The same numbers on several processes (gloo on the CPU)."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import datasets
import pytest
import torch
import torch.multiprocessing as mp

from lightning_ablate.metrics import Clean, Scored, SweepMetrics
from lightning_ablate.results import read_rows
from lightning_ablate.statistics import LatticeHistogram, MeanByPosition, Moments, RangeHistogram, SiteStatistics
from tests import tiny
from tests.statistics.test_statistics import NEURONS, activations, gathered

SHARED = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
FEW = ["--data.batch_size=8", "--ablation.fractions=[0.5,1.0]", "--ablation.seeds=[1]"]
TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]
ROBERTA = Path(__file__).parent.parent / "configs" / "demo_roberta.yaml"


def figures(folder, *arguments):
    """Runs the command and reads the results it leaves."""
    command = [sys.executable, "-m", "lightning_ablate", *map(str, arguments), *SHARED]
    before = set(folder.glob("lightning_logs/*/*/results.csv"))
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (results,) = set(folder.glob("lightning_logs/*/*/results.csv")) - before
    return read_rows(results)


def assert_same(one, other):
    for row, again in zip(one, other, strict=True):
        for name, value in asdict(row).items():
            exact = not isinstance(value, float)
            assert getattr(again, name) == (value if exact else pytest.approx(value, abs=1e-6)), (row, again)


@pytest.mark.parametrize("images", [37, 1])
def test_two_processes_give_the_figures_of_one(tmp_path, full, images):
    """37 images don't divide by two; of one image the second process gets none. In short form in test_readme.py."""
    small = ["--data.calibration_images=43", f"--data.evaluation_images={images}", *FEW]
    one, two = figures(tmp_path, "fit", *small), figures(tmp_path, "fit", *small, *TWO)
    assert len(one) == 1 + 4 * 2 and one[0].n == images
    assert_same(one, two)


LEARNED = [
    {"class_path": f"lightning_ablate.methods.{name}", "init_args": {"steps": 12}}
    for name in ("Optimal", "ConditionalOptimal")
]
OTHERS = ["positional-mean", "noise", "resample-same-position", "resample-any-position", "conditional"]


@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
@pytest.mark.parametrize("target", ["vit", "roberta"])
def test_what_two_processes_learn_and_draw_is_what_one_does(tmp_path, full, strategy, target):
    """A step takes 32 examples: four batches of one process, two of two."""
    small = ["--data.calibration_images=83", "--data.evaluation_images=37"]
    if target == "roberta":  # padded to different lengths
        small = ["--config", ROBERTA, "--data.calibration_tokens=4000", "--data.evaluation_tokens=1300"]
    small += [*FEW, f"--ablation.methods={json.dumps([*OTHERS, *LEARNED])}"]
    two = figures(tmp_path, "fit", *small, "--trainer.devices=2", f"--trainer.strategy={strategy}")
    one = figures(tmp_path, "fit", *small)
    learned = [row.method.endswith("optimal") for row in one]
    assert sum(learned) == 4 and len(one) == 1 + 2 * 7
    assert_same(*([row for row, skip in zip(rows, learned, strict=True) if not skip] for rows in (one, two)))
    differences = [abs(row.cross_entropy - other.cross_entropy) for row, other in zip(one, two, strict=True)]
    print(f"{target}, {strategy}: largest difference {max(differences):.1e}")
    assert [row.method for row in one] == [row.method for row in two] and max(differences) < 1e-4


def test_a_stream_on_two_processes_gives_the_figures_of_one(tmp_path, full):
    tiny.save_language_model(tmp_path / "gpt2", tiny.gpt2())
    datasets.Dataset.from_dict({"text": tiny.TEXTS}).to_parquet(tmp_path / "texts.parquet")
    small = ["--model=CausalLM", f"--model.name={tmp_path / 'gpt2'}", "--data=TextData", "--data.streaming=true"]
    small += [f"--data.name={tmp_path / 'texts.parquet'}", "--data.length=32", "--data.shuffle_seed=1"]
    small += ["--data.calibration_tokens=700", "--data.evaluation_tokens=900", *FEW, "--ablation.folder"]
    for folder, several in (("one", []), ("two", TWO)):
        command = [sys.executable, "-m", "lightning_ablate", "fit", *small, folder, *SHARED, *several]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert_same(read_rows(tmp_path / "one" / "results.csv"), read_rows(tmp_path / "two" / "results.csv"))


def test_two_processes_give_the_figures_of_one_on_padded_and_masked_text(tmp_path, full):
    small = ["--config", ROBERTA, "--data.calibration_tokens=1500", "--data.evaluation_tokens=1300", *FEW]
    one = figures(tmp_path, "fit", *small)
    checkpoint = min(tmp_path.glob("lightning_logs/*/*/ablation.ckpt"))
    assert_same(one, figures(tmp_path, "fit", *small, *TWO))
    assert_same(one, figures(tmp_path, "validate", "--ckpt_path", checkpoint, *TWO))


TEXTS = {"batch_size": 4, "calibration_tokens": 600, "evaluation_tokens": 500, "length": 64}


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("count", ["n", "n + 1", "fewer than the processes"])
@pytest.mark.parametrize("target", ["vit", "gpt2", "roberta"])
def test_any_count_on_any_number_of_processes_gives_the_figures_of_one(tmp_path, full, target, count, processes):
    """At the same batch shape; the largest difference is printed."""
    if target == "vit":
        images = {"n": 36, "n + 1": 37, "fewer than the processes": 1}[count]
        small = [f"--data.evaluation_images={images}", "--data.calibration_images=43", "--data.batch_size=8"]
    else:
        tokens = {"n": 64 * 12, "n + 1": 64 * 12 + 1, "fewer than the processes": 10}[count]
        budgets = {**TEXTS, "evaluation_tokens": tokens, "packing": "pack"}
        small = ["--config", ROBERTA.with_name(f"demo_{target}.yaml")]
        small += [f"--data.{name}={value}" for name, value in budgets.items()]
    options = [*small, "--ablation.fractions=[0.5,1.0]", "--ablation.seeds=[1]"]
    several = [f"--trainer.devices={processes}", "--trainer.strategy=ddp"]
    one, others = figures(tmp_path, "fit", *options), figures(tmp_path, "fit", *options, *several)
    differences = [
        abs(getattr(row, name) - getattr(other, name))
        for row, other in zip(one, others, strict=True)
        for name in ("n", "top1", "top5", "cross_entropy", "kl")
    ]
    print(f"{target}, {count}, {processes} processes: largest difference {max(differences):.1e}")
    assert_same(one, others)


def test_two_nodes_of_torchrun_give_the_figures_of_one_process(tmp_path, full):
    small = ["--data.calibration_images=43", "--data.evaluation_images=37", *FEW]
    one = figures(tmp_path, "fit", *small)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = []
    for node in (0, 1):
        launcher = ["--nnodes=2", f"--node-rank={node}", "--nproc-per-node=1", "--master-addr=127.0.0.1"]
        ours = ["fit", *small, *SHARED, "--trainer.num_nodes=2", "--trainer.devices=1", "--trainer.strategy=ddp"]
        command = ["-m", "torch.distributed.run", *launcher, f"--master-port={port}", "-m", "lightning_ablate", *ours]
        with (tmp_path / f"said-{node}").open("w") as said:
            folder = [f"--ablation.folder={tmp_path / 'two'}"]
            nodes.append(subprocess.Popen([sys.executable, *command, *folder], cwd=tmp_path, stdout=said, stderr=said))
    for node, process in enumerate(nodes):
        assert process.wait(timeout=300) == 0, (tmp_path / f"said-{node}").read_text()
    assert_same(one, read_rows(tmp_path / "two" / "results.csv"))


def test_two_processes_that_were_killed_go_on(tmp_path, full):
    small = ["--data.calibration_images=200", "--data.evaluation_images=200", *FEW[1:], "--data.batch_size=4", *TWO]
    ours = ["fit", *small, *SHARED, "--ablation.note_every=0", "--trainer.logger=false"]
    command = [sys.executable, "-m", "lightning_ablate", *ours]
    subprocess.run([*command, "--ablation.folder=whole"], cwd=tmp_path, check=True, capture_output=True)
    for part in ("0.*.pt", "1.*.pt", "1000000.*.pt"):
        process = subprocess.Popen([*command, "--ablation.folder=died"], cwd=tmp_path, start_new_session=True)
        while len(list(tmp_path.glob(f"died/unfinished/{part}"))) < 4:
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run([*command, "--ablation.folder=died"], cwd=tmp_path, check=True, capture_output=True)
    whole = (tmp_path / "whole" / "results.csv").read_bytes()
    assert (tmp_path / "died" / "results.csv").read_bytes() == whole


def rank_of_two(rank, port, folder):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    part = activations().flatten(0, 1).tensor_split([130])[rank].unsqueeze(0)
    moments, bounds = Moments(NEURONS), LatticeHistogram(NEURONS)
    for statistic in (moments, bounds):
        statistic.update(part)
        statistic.sync()
    histogram = RangeHistogram(NEURONS, SiteStatistics("here", {LatticeHistogram: bounds}))
    histogram.update(part)
    histogram.sync()
    metrics = SweepMetrics(2)
    logits = torch.arange(12.0).view(3, 4) * (rank + 1)
    lengths = MeanByPosition(NEURONS)  # of which the ranks have seen different ones
    lengths.update(activations()[rank::2, : 5 - rank])
    lengths.sync()
    torch.save({k: v.clone() for k, v in lengths.state_dict().items()}, folder / f"lengths-{rank}.pt")
    scored = Scored(logits, torch.tensor([3, 0, 1]), torch.tensor([0, 1, -1 if rank else 2]))
    metrics.update(1, scored, Clean.of(scored._replace(logits=logits.flip(1))))
    states = [{k: v.clone() for k, v in s.state_dict().items()} for s in (moments, bounds, histogram)]
    torch.save((states, metrics.compute()), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_statistics_and_metrics_merge_over_ranks_as_if_there_were_one(tmp_path):
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(rank_of_two, (port, tmp_path), nprocs=2)
    (first, figures), (second, others) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    parts = activations()
    for rank in (0, 1):
        found = torch.load(tmp_path / f"lengths-{rank}.pt", weights_only=True)
        assert found["count"].tolist() == [len(parts)] * 4 + [len(parts[::2])]
        torch.testing.assert_close(found["sums"][:4], parts[:, :4].sum(0, dtype=torch.float64))
        torch.testing.assert_close(found["sums"][4], parts[::2, 4].sum(0, dtype=torch.float64))
    alone = gathered([activations()])
    for state, other, statistic in zip(first, second, alone, strict=True):
        for name, value in statistic.state_dict().items():
            assert torch.equal(state[name], other[name])
            torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-30)
    assert figures["n"].tolist() == others["n"].tolist() == [0, 5]
    # by hand: rank 0 hits its first target, rank 1 its first and drops its third
    assert figures["top1"][1].item() == others["top1"][1].item() == pytest.approx(2 / 5)
