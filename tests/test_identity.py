"""Runs are the same only if all that shapes their numbers is, by content (invariant 15)."""

import functools

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from torch.utils.data import BatchSampler, DataLoader, SubsetRandomSampler, TensorDataset

from lightning_ablate import AblationCallback, Choice, Selection
from lightning_ablate.data.examples import Examples
from lightning_ablate.errors import ConfigError
from lightning_ablate.identity import content, described
from lightning_ablate.trainer import _loader_facts
from tests import tiny


def adding(number):
    return lambda x: x + number


class Given(Choice):
    def __init__(self, masks, rule=None):
        self.masks, self.rule = masks, rule

    def selections(self, sites, fractions, seeds):
        return [Selection(0.5)]

    def mask(self, selection, site, statistics=None):
        return self.masks[: site.width]


def written(body):
    """A class of the user's own with this code, always of the same name."""
    names = {"__name__": __name__}
    exec(f"class Own:\n    threshold = 1\n    def mask(self, x):\n        return {body}", names)
    return names["Own"]


def held(number):
    """A class of the user's own whose code is in what isn't a plain function."""
    names = {"__name__": __name__, "cached_property": functools.cached_property}
    kinds = ("staticmethod", "classmethod", "property", "cached_property")
    lines = [f"    {kind[0]} = {kind}(lambda *_: {number})" for kind in kinds]
    exec("\n".join(["class Own:", *lines]), names)
    return names["Own"]


class Looped:
    def __init__(self, number):
        self.number, self.me = number, self


PAIRS = {
    "tensors": lambda n: Given(torch.arange(16) < n),
    "arrays": lambda n: np.arange(3.0) * n,
    "tensors of bfloat16": lambda n: torch.full((2,), n, dtype=torch.bfloat16),
    "lambdas": lambda n: (lambda x: x + 1) if n == 1 else (lambda x: x + 2),
    "closures": adding,
    "partials": lambda n: functools.partial(max, n),
    "methods": lambda n: Looped(n).__init__,
    "sets": lambda n: {"a", "b", str(n)},
    "code of classes": lambda n: written(f"x > {n}")(),
    "code of properties": lambda n: held(n)(),
    "frames": lambda n: pd.DataFrame({"text": ["a", str(n)]}),
    "rows": lambda n: [{"ids": torch.tensor([n])}, {"ids": torch.tensor([3])}],
    "data of tensors": lambda n: TensorDataset(torch.arange(4) + n),
    "data of datasets": lambda n: Dataset.from_list([{"text": str(n)}]),
    "objects that hold themselves": Looped,
    "loaders": lambda n: DataLoader(TensorDataset(torch.arange(4) + n)),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_content_tells_values_apart_and_makes_equal_ones_the_same(kind):
    first, again, other = (PAIRS[kind](n) for n in (1, 1, 2))
    assert first is not again and content(first) == content(again) != content(other)


def test_what_cant_be_read_is_like_nothing_else():
    assert content(one := (n for n in range(3))) != content(one)


def test_a_description_says_plain_values_and_digests_of_the_rest():
    said = described(Given(torch.ones(3), rule=adding(1)))
    assert said["class"] == f"{__name__}.Given" and said["masks"].startswith("Tensor ") and said["rule"] != "function"
    assert said["rule"] != described(Given(None, adding(2)))["rule"] and described([1, "a", None]) == [1, "a", None]


def test_loaders_are_told_apart_by_data_and_by_order():
    data = [Examples([{}] * 9, [bytes([n, i]) for i in range(9)], dict) for n in (1, 2)]
    loaders = [
        *(DataLoader(one) for one in data),
        *(DataLoader(data[0], sampler=SubsetRandomSampler(range(n))) for n in (3, 4)),
        *(DataLoader(data[0], batch_sampler=BatchSampler(range(n), 2, False)) for n in (4, 5)),
    ]
    found = [_loader_facts(one)["content"] for one in loaders]
    assert len(set(found)) == len(found) and found == [_loader_facts(one)["content"] for one in loaders]


def test_a_description_of_an_object_that_holds_itself_ends():
    assert described(Looped(1))["number"] == 1 and described(Looped(1)) != described(Looped(2))


class Shifted(tiny.Own):
    def __init__(self, by):
        super().__init__(tiny.gpt2())
        self.by = by

    def evaluate(self, batch):
        scored = super().evaluate(batch)
        return scored._replace(logits=scored.logits + self.by)


CHANGES = {
    "loaders": {"val": tiny.loader(seed=7)},
    "loaders.": {"train": tiny.loader(seed=7)},
    "neurons.masks": {"callback": Given(torch.arange(16) < 4)},
    "target.module": {"module": Shifted(2.0)},
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_unfinished_run_of_other_content_is_not_gone_on_with(tmp_path, name):
    def run(*more, module=None, callback=None, **loaders):
        choice = callback or Given(torch.arange(16) < 8)
        made = AblationCallback("zero", [0.5], [1], neurons=choice, dirpath=tmp_path / "run", save_every=0.0)
        return tiny.fit(tmp_path, module or Shifted(1.0), callback=made, more=more, **loaders)

    with pytest.raises(tiny.Death):
        run(tiny.Dies(None, 0))
    with pytest.raises(ConfigError, match=f"unfinished run of another configuration: {name.rstrip('.')}"):
        run(**CHANGES[name])
    _, done = run()
    assert len(done.results.table) == 2
