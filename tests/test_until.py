"""Sweeps that end once their intervals are narrow enough, although one looks on the way."""

import math

import numpy as np
import pytest
import torch

from lightning_ablate import AblationCallback, Results
from lightning_ablate.errors import ConfigError
from lightning_ablate.metrics import SweepMetrics
from lightning_ablate.phases.stopping import Stop
from lightning_ablate.results.bootstrap import sequences
from lightning_ablate.results.text import interval
from tests import tiny
from tests.command import FEW, TWO, assert_same, assert_same_bytes, found, killed

UNTIL = ["fit", *FEW, "--data.calibration_images=43", "--data.evaluation_images=397", "--ablation.methods=[zero]"]
UNTIL += ["--ablation.fractions=[0.5,0.8]", "--ablation.until=0.8"]


class Alone:
    """A module of one process."""

    def summed(self, tensor):
        return tensor


def legend(figure):
    """The texts of a figure's legends and their titles."""
    return " ".join(text.get_text() for one in figure.legends for text in [one.get_title(), *one.get_texts()])


def swept(scores, positions, width, clusters=None, batch=8):
    """Where a sweep of one condition stops, and the interval there; the scores are sums over an example's positions."""
    count = len(scores)
    metrics = SweepMetrics(2, count)
    loader = type("Loader", (), {"dataset": type("Data", (), {"clusters": clusters})})
    stop = Stop(Alone(), metrics, width, loader)
    for first in range(0, count, batch):
        here = torch.arange(first, min(first + batch, count))
        if stop.at is None:
            metrics.sums[1, 2, here] = torch.from_numpy(scores)[here]
            metrics.n[here] = torch.from_numpy(positions)[here]
            stop.look(here)
    held = metrics.sums[1:, 2, :count].numpy(), metrics.n[:count].numpy()
    return stop, sequences(*held, stop.clusters)[:, 0]


def test_the_interval_is_that_of_the_paper_by_plain_arithmetic():
    """Equation 2.8 of Waudby-Smith et al. 2024 on means, with rho chosen for half of the examples."""
    values, seen, total = [0.3, -0.1, 0.4, 0.2, 0.9, -0.2], 6, 40
    mean = sum(values) / 6
    variance = sum((one - mean) ** 2 for one in values) / 5
    rho = math.sqrt((2 * math.log(20) + math.log(2 * math.log(20) + 1)) / 20)
    inner = 2 * (seen * rho**2 + 1) / (seen**2 * rho**2) * math.log(math.sqrt(seen * rho**2 + 1) / 0.05)
    half = math.sqrt(variance * inner)
    padded = np.array([[*values, *[0.0] * 34]])
    found = sequences(padded, np.array([1] * 6 + [0] * 34), np.arange(total))[:, 0]
    assert found.tolist() == pytest.approx([mean - half, mean + half], rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "width", "clustered"),
    [("normal", 0.05, False), ("skewed", 0.07, False), ("normal", 0.05, True), ("rare", 0.2, False)],
)
def test_stopped_intervals_hold_the_truth_at_least_as_often_as_they_say(kind, width, clustered, pytestconfig):
    draw, held, saved, draws = np.random.default_rng(0), [], [], 1000 if pytestconfig.getoption("full") else 150
    for _ in range(draws):
        clusters = np.repeat(np.arange(300), draw.integers(1, 5, size=300)) if clustered else np.arange(300)
        size = len(clusters)
        values = {
            "normal": lambda size: 0.1 + 0.1 * draw.standard_normal(size),
            "skewed": lambda size: 0.1 * np.exp(draw.standard_normal(size) - 0.5),
            "rare": lambda size: np.where(draw.random(size) < 0.05, 2.0, 0.0),  # of 300 examples, 15 by chance
        }[kind]
        each = values(300)[clusters] if clustered else values(size)
        positions = draw.integers(60, 129, size=size)
        stop, (low, high) = swept(each * positions, positions, width, clusters)
        held.append(low <= 0.1 <= high)
        saved.append(1 - (stop.at or size) / size)
        assert stop.at is None or high - low <= width
    assert np.mean(held) >= 0.95
    assert np.mean(saved) > 0.1 if kind == "normal" else np.mean(saved) >= 0  # what is rare is looked at to the end


def test_a_few_examples_that_decide_or_few_clusters_keep_a_sweep_going():
    positions = np.ones(200, dtype=np.int64)
    one = np.zeros(200)
    one[::2] = 1e-3
    assert swept(one, positions, 0.02)[0].at == 50  # half of the examples carry the error
    assert swept(one, positions, 0.02, np.arange(200) // 5)[0].at is None  # 40 clusters are never enough
    one[3] = 0.05  # and now a single one
    assert swept(one, positions, 0.02)[0].at is None


@pytest.mark.parametrize("batch", [1, 7, 16, 64])
def test_it_ends_at_the_same_example_for_any_batch_and_leaves_out_what_lies_behind(batch):
    draw = np.random.default_rng(1)
    scores, positions = 0.1 + 0.1 * draw.standard_normal(400), np.ones(400, dtype=np.int64)
    stop, ends = swept(scores, positions, 0.06, batch=batch)
    assert stop.at == swept(scores, positions, 0.06, batch=10)[0].at < 300
    assert int(stop.metrics.n.sum()) == stop.at
    assert ends.tolist() == swept(scores, positions, 0.06, batch=10)[1].tolist()


@pytest.mark.filterwarnings("ignore:.*figures")
def test_two_processes_and_a_run_that_was_killed_end_at_the_same_example(tmp_path):
    one = found(tmp_path / "one", *UNTIL)
    (said,) = one.partial
    assert " of 397 examples, as the 95% confidence sequence of each condition's added cross-entropy" in said
    n = int(said.split()[3])
    assert set(one.table["n"]) == {n} and n < 397 and one.counts == (n, n)
    width = one.compare(other="none").eval("cross_entropy_high - cross_entropy_low")
    assert width.max() <= 0.8
    assert "band: 95% confidence sequence" in legend(one.plot())
    assert "PARTIAL: evaluation ended" in str(one) and "95% confidence sequence over" in interval(one)
    assert_same(one, found(tmp_path / "two", *UNTIL, *TWO))
    died = [*UNTIL, "--ablation.save_every=0"]
    killed(tmp_path / "died", *died, batch=1)
    assert not (tmp_path / "died" / "results.csv").exists()
    found(tmp_path / "died", *died)
    assert_same_bytes(tmp_path / "died", tmp_path / "one")
    assert Results.load(tmp_path / "died").counts == one.counts


def test_what_can_not_be_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"until is 0, expected nats above 0.*--ablation.until"):
        AblationCallback(until=0)
    batches = list(tiny.loader())
    with pytest.raises(ConfigError, match="needs data that tell how many examples they hold"):
        tiny.fit(tmp_path, val=tiny.stream(batches), callback=AblationCallback(["zero"], until=0.1))
