"""Nothing in the tests reaches a hub, and every test ends without a hook left anywhere."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from tests import tiny


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory):
    return tiny.save_language_model(tmp_path_factory.mktemp("models") / "gpt2", tiny.gpt2())


@pytest.fixture(scope="session")
def roberta_folder(tmp_path_factory):
    return tiny.save_language_model(tmp_path_factory.mktemp("models") / "roberta", tiny.roberta(), masked=True)
