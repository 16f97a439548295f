"""What the embedded targets and their data are."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from lightning_ablate.data.demo import ROLES, digits, python_texts, role_of
from lightning_ablate.demo import resolve
from tests.demos import NAMES


def test_roles_share_no_name_and_no_text():
    shares = Counter(role_of(f"module {i}") for i in range(1000))
    assert shares["train"] == pytest.approx(800, abs=60) and set(shares) == set(ROLES)
    texts = [set(python_texts(role)) for role in ROLES]
    assert len(texts[0] | texts[1] | texts[2]) == sum(map(len, texts))


def test_digits_are_the_images_as_they_are():
    source, evaluation, train = load_digits(), digits("evaluation"), digits("train")
    assert (len(evaluation), len(train)) == (449, 1348)
    for row, index in ((0, 3), (1, 7), (448, 1795)):
        assert np.array_equal(np.array(evaluation[row]["image"]) / 15, source.images[index])
        assert evaluation[row]["label"] == source.target[index]
    assert digits("calibration")["label"] == train["label"]


def test_embedded_targets_are_small_and_in_their_libraries_formats():
    folders = [Path(resolve(f"demo:{name}")) for name in NAMES]
    assert sum(path.stat().st_size for folder in folders for path in folder.iterdir()) < 12 * 2**20
    assert all((folder / "model.safetensors").is_file() and (folder / "config.json").is_file() for folder in folders)
