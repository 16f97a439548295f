import pytest

from lightning_ablate.data import ExactSampler


@pytest.mark.parametrize("examples", [0, 1, 2, 7, 8, 9, 64])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_example_comes_exactly_once_in_batches_of_one_shape(examples, world_size, batch_size):
    shares = [list(ExactSampler(examples, batch_size, rank, world_size)) for rank in range(world_size)]
    real = sorted(i for share in shares for i in share if i >= 0)
    assert real == list(range(examples))
    assert len({len(share) for share in shares}) == 1
    assert len(shares[0]) == len(ExactSampler(examples, batch_size, 0, world_size))
    if world_size > 1:
        assert len(shares[0]) % batch_size == 0
