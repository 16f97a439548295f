import numpy as np
import pytest
import torch

from lightning_ablate import PositionalMean
from lightning_ablate.errors import StatisticsError
from lightning_ablate.methods import Batch


def test_it_is_the_mean_at_that_position_and_beyond_that_of_all_positions(edit):
    valid = torch.arange(5) < torch.tensor([5, 3, 1, 4, 5]).unsqueeze(1)
    x = torch.where(valid.unsqueeze(2), torch.randn(5, 5, 3), torch.nan)
    mask = torch.tensor([True, True, False])
    replace = edit(PositionalMean(), x, mask, valid=valid, batch=Batch(torch.tensor([3, 9])))
    values, found = x[..., :2].double().numpy(), replace(torch.zeros(2, 7, 3))
    np.testing.assert_allclose(found[1, :5, :2].numpy(), np.nanmean(values, 0), rtol=1e-5)
    np.testing.assert_allclose(found[0, 5:, :2].numpy(), [np.nanmean(values, (0, 1))] * 2, rtol=1e-5)
    assert torch.equal(replace(torch.zeros(14, 3)).view(2, 7, 3), found)  # examples and positions in one dimension
    assert replace(torch.zeros(2, 7, 3).bfloat16()).dtype == torch.bfloat16 and not bool(found[..., 2].any())
    with pytest.raises(StatisticsError, match="where 2 examples of 1 positions are expected"):
        replace(torch.zeros(3, 7, 3))
