"""What the embedded targets and their data are, and that their sites hold all of attention."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_ablate import AblationCallback
from lightning_ablate.data.demo import ROLES, digits, python_texts, role_of
from lightning_ablate.demo import resolve
from lightning_ablate.sites import find_sites
from tests import tiny
from tests.demos import NAMES, data_of, module_of
from tests.reference import plain_hooks


def test_roles_share_no_name_and_no_text():
    shares = Counter(role_of(f"module {i}") for i in range(1000))
    assert shares["train"] == pytest.approx(800, abs=60) and set(shares) == set(ROLES)
    texts = [set(python_texts(role)) for role in ROLES]
    assert len(texts[0] | texts[1] | texts[2]) == sum(map(len, texts))


def test_digits_are_the_images_as_they_are():
    from sklearn.datasets import load_digits

    source = load_digits()
    evaluation, train = digits("evaluation"), digits("train")
    assert (len(evaluation), len(train)) == (449, 1348)
    for row, index in ((0, 3), (1, 7), (448, 1795)):
        assert np.array_equal(np.array(evaluation[row]["image"]) / 15, source.images[index])
        assert evaluation[row]["label"] == source.target[index]
    assert digits("calibration")["label"] == train["label"]


def test_embedded_targets_are_small_and_in_their_libraries_formats():
    folders = [Path(resolve(f"demo:{name}")) for name in NAMES]
    assert sum(path.stat().st_size for folder in folders for path in folder.iterdir()) < 12 * 2**20
    assert all((folder / "model.safetensors").is_file() and (folder / "config.json").is_file() for folder in folders)


def last_hidden(name, target, batch):
    if name == "vit":
        return target.forward_features(batch["pixel_values"])
    body = target.transformer if name == "gpt2" else target.roberta
    return body(input_ids=batch["input_ids"], attention_mask=torch.ones_like(batch["input_ids"])).last_hidden_state


def mixing(name, module, paths):
    """How far one place's last hidden state moves when all other places change and the sites are constant."""
    data = data_of(name)
    data.trainer = tiny.trainer(".", AblationCallback())
    data.trainer.strategy.connect(module)
    batch = next(iter(data.val_dataloader()))
    first, second = ({key: value[i : i + 1].clone() for key, value in batch.items()} for i in (1, 2))
    if name == "vit":
        second["pixel_values"][..., :2, 2:4] = first["pixel_values"][..., :2, 2:4]
        place = 2  # after the class token, the second patch of 2 x 2
    else:
        place = 9
        second["input_ids"][:, place] = first["input_ids"][:, place]
    constant = dict.fromkeys(paths, lambda x: torch.full_like(x, 0.1))
    with torch.no_grad(), plain_hooks(module.target, constant):
        states = [last_hidden(name, module.target, one)[0, place] for one in (first, second)]
    return (states[0] - states[1]).abs().max().item()


@pytest.mark.parametrize("name", NAMES)
def test_with_every_site_constant_nothing_mixes_and_with_one_left_out_it_does(name):
    module, inputs = module_of(name), {"pixel_values": torch.randn(2, 1, 8, 8), "input_ids": torch.arange(20)[None]}
    paths = [site.path for site in find_sites(module.target, lambda: last_hidden(name, module.target, inputs))]
    assert len(paths) == 4 and mixing(name, module, paths) < 1e-4
    for left_out in paths:
        assert mixing(name, module, [path for path in paths if path != left_out]) > 1e-2
