"""Which axis of a site holds the examples is tried out, never told by sizes that happen to agree (invariant 5)."""

import pytest
import torch
from torch import nn

from lightning_ablate import AblationCallback, Moments, Scored
from lightning_ablate.errors import StatisticsError
from tests import reference, tiny


class Net(nn.Module):
    """Reads token ids ``(batch, seq)``; its projection reads ``(seq, batch)``, or both as one axis, in either order."""

    def __init__(self, layout):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.proj, self.layout = nn.Embedding(tiny.VOCABULARY, 8), nn.Linear(8, tiny.VOCABULARY), layout

    def forward(self, ids):
        x = self.embed(ids)
        if self.layout.startswith("seq"):
            return self.proj(self.flat(x.transpose(0, 1))).view(*ids.T.shape, -1).transpose(0, 1)
        return self.proj(self.flat(x)).view(*ids.shape, -1)

    def flat(self, x):
        return x.flatten(0, 1) if self.layout.endswith("flat") else x


class Module(tiny.Own):
    padded = True

    def logits(self, batch):
        return self.target(batch["input_ids"])

    def valid_at(self, site, batch):
        return self.valid(batch) if self.padded else None


def fitted(folder, layout, batch_size, padded):
    module = Module(Net(layout))
    module.padded = padded
    rows = tiny.loader(examples=16, batch_size=batch_size)
    other = tiny.loader(examples=16, batch_size=batch_size, seed=3)
    return tiny.fit(folder, module, rows, other, AblationCallback("mean", [0.5], [1], sites="proj")), rows


@pytest.mark.parametrize("layout", ["seq", "seq flat"])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_an_axis_of_positions_before_that_of_examples_is_refused(tmp_path, layout, padded, batch_size):
    """16 examples in a batch are as many as there are tokens; without padding any multiple of the batch passed."""
    with pytest.raises(StatisticsError, match=r"site proj gets \(.*expected the examples along the first axis"):
        fitted(tmp_path, layout, batch_size, padded)


@pytest.mark.parametrize("layout", ["batch", "batch flat"])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_examples_along_the_first_axis_are_counted_alone_or_flattened(tmp_path, layout, batch_size):
    (module, callback), rows = fitted(tmp_path, layout, batch_size, layout == "batch")
    (site,) = callback.run.calibration.sites
    seen = []
    with torch.no_grad(), reference.plain_hooks(module.target, {"proj": seen.append}):
        for batch in rows:
            module.logits(batch)
            real = batch["attention_mask"].bool() if layout == "batch" else torch.ones_like(batch["input_ids"]).bool()
            seen[-1] = seen[-1].reshape(*real.shape, 8)[real]
    expected = torch.cat(seen).double().mean(0)
    torch.testing.assert_close(callback.run.calibration[site][Moments].mean, expected, rtol=1e-9, atol=1e-12)


def test_a_batch_of_another_form_is_cut_by_its_module(tmp_path):
    class Pairs(Module):
        """Batches are lists of what isn't a tensor."""

        def evaluate(self, batch):
            ids = torch.stack([row["input_ids"] for row in batch["rows"]])
            logits = self.target(ids)
            return Scored(logits[:, 0], ids[:, 1], torch.tensor([row["index"] for row in batch["rows"]]))

        def examples_of(self, batch, batch_idx):
            return torch.tensor([row["index"] for row in batch["rows"]])

        def valid(self, batch):
            return None

        def first(self, batch, count):
            return {"rows": (batch["rows"] * count)[:count]}

    rows, other = (
        torch.utils.data.DataLoader(tiny.loader(seed=n).dataset, 3, collate_fn=lambda rows: {"rows": rows})
        for n in (1, 2)
    )
    for layout, fits in (("batch", True), ("seq", False)):
        callback = AblationCallback("mean", [0.5], [1], sites="proj")
        if fits:
            tiny.fit(tmp_path / layout, Pairs(Net(layout)), rows, other, callback)
        else:
            with pytest.raises(StatisticsError, match="batch first"):
                tiny.fit(tmp_path / layout, Pairs(Net(layout)), rows, other, callback)
