"""Nothing in the tests reaches a hub."""

import os
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # which run beside one another
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from lightning_ablate.results import figures
from tests import tiny

DRAWN = figures.drawn
# files whose few tests take longest, as they start processes: first, so that no worker waits for them at the end
LONG = "device kills processes attribution notebook export benchmarks readme evidence files until terminal".split()


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run long tests too, and others in full")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(config, items):
    """Leaves long tests out, unless ``--full`` asks for them; each has a short form beside it. Sorts the others."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)
    if not config.getoption("--full"):
        long = [item for item in items if "full" in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


@pytest.fixture(scope="session")
def full(request):
    """For tests that take too long for every day."""
    if not request.config.getoption("--full"):
        pytest.skip("takes long; --full runs it")


@pytest.fixture(scope="session", autouse=True)
def _drawing():
    """Drawing takes as long as a tiny run, so tests that don't look at a figure get an empty file."""
    with mock.patch.object(figures, "drawn", lambda picture, form="png": b""):
        yield


@pytest.fixture
def drawn(monkeypatch):
    """For tests that look at figures."""
    monkeypatch.setattr(figures, "drawn", DRAWN)


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory):
    return tiny.save_language_model(tmp_path_factory.mktemp("models") / "gpt2", tiny.gpt2())


@pytest.fixture(scope="session")
def roberta_folder(tmp_path_factory):
    return tiny.save_language_model(tmp_path_factory.mktemp("models") / "roberta", tiny.roberta(), masked=True)
