import pytest
import torch
from scipy import stats
from torch.nn import functional

from lightning_ablate import AblationCallback
from lightning_ablate.errors import ConfigError, DataError
from lightning_ablate.masks import RandomNeurons, Selection
from lightning_ablate.methods import ResampleAnyPosition, ResampleSamePosition
from lightning_ablate.methods.resample import donors_of
from tests import tiny

SEEDS = [3, 4]


def test_a_donor_is_drawn_evenly_and_never_the_example_itself():
    drawn = torch.stack([donors_of(torch.arange(5), seed, 5) for seed in range(4000)])
    for example in range(5):
        counts = torch.bincount(drawn[:, example], minlength=5)
        assert counts[example] == 0 and stats.chisquare(counts[counts > 0].numpy()).pvalue > 1e-3
    assert torch.equal(donors_of(torch.tensor([3, -1]), 7, 5)[:1], donors_of(torch.arange(5), 7, 5)[3:4])


def padded():
    """Sequences of different lengths, the longer ones also with padding in front."""
    batch = tiny.tokens(6, seed=2)
    for row, (first, last) in enumerate([(0, 16), (0, 9), (2, 16), (0, 5), (3, 12), (0, 16)]):
        batch["attention_mask"][row] = 0
        batch["attention_mask"][row, first:last] = 1
    return batch


def rows(batch, size):
    examples = [{name: value[i] for name, value in batch.items()} for i in range(len(batch["index"]))]
    return torch.utils.data.DataLoader(examples, batch_size=size)


def by_hand(method, seed, fraction=0.5):
    """Mean cross-entropy with one example at a time, plain hooks and a loop over positions."""
    model, batch = tiny.gpt2(), padded()
    donors = donors_of(torch.arange(6), seed, 6)
    projections = [block.attn.c_proj for block in model.transformer.h]
    sites = tiny.sites(model)

    def logits(row, act):
        handles = [p.register_forward_pre_hook(lambda m, x, n=n: act(n, x[0])) for n, p in enumerate(projections)]
        with torch.no_grad():
            found = model(
                input_ids=batch["input_ids"][row : row + 1], attention_mask=batch["attention_mask"][row : row + 1]
            )
        for handle in handles:
            handle.remove()
        return found.logits[0]

    total, count = 0.0, 0
    for row in range(6):
        donor, seen = int(donors[row]), {}
        logits(donor, lambda n, x, seen=seen: seen.update({n: x.clone()}))
        real = batch["attention_mask"][donor].nonzero().squeeze(1)

        def act(n, x, row=row, seen=seen, real=real):
            mask = RandomNeurons().mask(Selection(fraction, seed), sites[n])
            changed = x.clone()
            place = method.places(seed, torch.tensor([[row]]), torch.arange(16), torch.tensor([[len(real)]]))[0]
            for position in range(16):
                changed[0, position, mask] = seen[n][0, real[place[position]]][mask]
            return (changed,)

        found, ids, mask = logits(row, act), batch["input_ids"][row], batch["attention_mask"][row]
        for position in range(15):
            if mask[position + 1]:
                total += float(functional.cross_entropy(found[position], ids[position + 1]))
                count += 1
    return total / count, count


@pytest.mark.parametrize("method", [ResampleSamePosition(), ResampleAnyPosition()])
def test_a_run_equals_plain_hooks_for_any_batch_size(tmp_path, method):
    for size in (2, 4):
        made = AblationCallback(methods=[method], fractions=[0.5, 1.0], seeds=SEEDS)
        tiny.fit(tmp_path / str(size), val=rows(padded(), size), callback=made)
        found = {(row.fraction, row.seed): (row.cross_entropy, row.n) for row in made.results.rows[1:]}
        assert list(found) == [(0.5, 3), (0.5, 4), (1.0, 3), (1.0, 4)]
        for seed in SEEDS:
            expected, count = by_hand(method, seed)
            assert abs(found[0.5, seed][0] - expected) < 1e-5 and found[0.5, seed][1] == count


def test_positions_are_drawn_anew_for_every_example_and_position():
    places = ResampleAnyPosition().places(1, torch.arange(50).unsqueeze(1), torch.arange(40), torch.full((50, 1), 10))
    assert places.shape == (50, 40) and stats.chisquare(torch.bincount(places.flatten()).numpy()).pvalue > 1e-3
    assert not bool((places[0] == places).all(1)[1:].any())


def test_data_without_another_example_or_without_an_index_are_refused(tmp_path):
    def run(val):
        tiny.fit(tmp_path, val=val, callback=AblationCallback(methods=["resample-any-position"], fractions=[1.0]))

    with pytest.raises(DataError, match="more than 1"):
        run(tiny.loader(1, 1))
    with pytest.raises(ConfigError, match="read in any order"):
        run(torch.utils.data.DataLoader(Stream(), batch_size=None))


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(tiny.loader())
