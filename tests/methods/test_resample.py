import pytest
import torch
from scipy import stats

from lightning_ablate import AblationCallback, Random, ResampleAnyPosition, ResampleIds, ResampleSamePosition, Site
from lightning_ablate.conditions import Selection
from lightning_ablate.errors import ConfigError, DataError
from lightning_ablate.methods import Batch, Source, others_of
from tests import reference, tiny

SEEDS = [3, 4]


@pytest.mark.parametrize("method", [ResampleIds(), ResampleSamePosition()])
def test_every_kind_takes_the_source_position_by_position(edit, method):
    """A source of another length begins again, its padding left out; one source serves a whole batch."""
    site, x, batch = Site("attn.proj", 2), torch.randn(2, 6, 2), Batch(torch.tensor([7, 8]))
    replace = edit(method, x, torch.tensor([True, False]), seed=5, batch=batch)
    for places in ([[1, 2, 3] * 2], [[1, 2, 3] * 2, [0, 1] * 3]):
        activations = torch.randn(len(places), 4, 2)
        valid = torch.tensor([[False, True, True, True], [True, True, False, False]])[: len(places)]
        batch.sources[method.source, 5] = {site: Source(activations, valid)}
        found = replace(x)
        expected = torch.stack([one[place, 0] for one, place in zip(activations, places, strict=True)])
        assert torch.equal(found[..., 0], expected.expand(2, 6)) and torch.equal(found[..., 1], x[..., 1])


def test_examples_and_positions_are_drawn_evenly_and_never_the_example_itself():
    drawn = torch.stack([others_of(torch.arange(5), seed, 5) for seed in range(4000)])
    for example in range(5):
        counts = torch.bincount(drawn[:, example], minlength=5)
        assert counts[example] == 0 and stats.chisquare(counts[counts > 0].numpy()).pvalue > 1e-3
    assert torch.equal(others_of(torch.tensor([3, -1]), 7, 5)[:1], others_of(torch.arange(5), 7, 5)[3:4])
    places = ResampleAnyPosition().places(1, torch.arange(50).unsqueeze(1), torch.arange(40), torch.full((50, 1), 10))
    assert places.shape == (50, 40) and stats.chisquare(torch.bincount(places.flatten()).numpy()).pvalue > 1e-3
    assert not bool((places[0] == places).all(1)[1:].any())


def padded():
    """Six examples, with padding in front and behind."""
    batch = tiny.tokens(6, seed=2)
    place, ends = torch.arange(16), torch.tensor([[0, 16], [4, 16], [0, 9], [0, 5], [3, 12], [0, 16]])
    return {**batch, "attention_mask": ((place >= ends[:, :1]) & (place < ends[:, 1:])).long()}


@torch.no_grad()
def by_hand(method, seed):
    """Mean cross-entropy at 50% and the scored positions, with one example at a time under plain hooks."""
    model, batch, losses = tiny.gpt2(), padded(), []
    masks = {site.name: Random().mask(Selection(0.5, seed), site) for site in tiny.sites(model)}
    for row, other in enumerate(others_of(torch.arange(6), seed, 6).tolist()):
        seen, real = {}, batch["attention_mask"][other].nonzero().squeeze(1)
        reference.losses(model, batch, other, {p: lambda x, p=p, seen=seen: seen.update({p: x}) for p in masks})
        place = method.places(seed, torch.tensor([[row]]), torch.arange(16), torch.tensor([[len(real)]]))[0]
        changes = {path: reference.put(mask, seen[path][0, real[place]]) for path, mask in masks.items()}
        losses.append(reference.losses(model, batch, row, changes))
    return float(torch.cat(losses).mean()), len(torch.cat(losses))


@pytest.mark.parametrize("method", [ResampleSamePosition(), ResampleAnyPosition()])
def test_a_run_equals_plain_hooks_for_any_batch_size(tmp_path, method):
    rows = [{name: value[row] for name, value in padded().items()} for row in range(6)]
    for size in (2, 4):
        made = AblationCallback([method], [0.5, 1.0], SEEDS)
        tiny.fit(tmp_path / str(size), val=torch.utils.data.DataLoader(rows, size), callback=made)
        table = made.results.table[1:]
        assert list(zip(table["fraction"], table["seed"], strict=True)) == [(0.5, 3), (0.5, 4), (1.0, 3), (1.0, 4)]
        for seed, row in zip(SEEDS, table.itertuples(), strict=False):
            assert (row.cross_entropy, row.n) == pytest.approx(by_hand(method, seed), abs=1e-5)


def test_data_without_another_example_or_without_an_index_are_refused(tmp_path):
    texts = torch.utils.data.DataLoader([{"input_ids": row, "attention_mask": row} for row in torch.ones(4, 9).long()])
    for val, error, message in (
        (tiny.loader(1, 1), DataError, "needs more than 1 of them"),
        (texts, ConfigError, "data that can be read in any order, whose batches are mappings with an `index`"),
    ):
        with pytest.raises(error, match=message):
            tiny.fit(tmp_path / error.__name__, val=val, callback=AblationCallback(["resample-any-position"], [1.0]))
