"""What a method does at one site."""

import pytest

from lightning_ablate import Site
from lightning_ablate.methods import Ablation, Batch, Edit
from lightning_ablate.statistics import with_needs
from tests import tiny


@pytest.fixture
def edit():
    """Makes the edit of a method at a site whose statistics are those of ``x`` ``(batch, ..., neurons)``."""

    def make(method, x, mask, *, valid=None, heads=None, seed=1, batch=None, site="attn.proj"):
        here = Site(site, x.shape[-1], heads=heads)
        statistics = tiny.gathered(here, [x], *with_needs(method.statistics), valid=valid)
        ablation = Ablation(here, mask, statistics, seed, batch or Batch())
        return Edit(mask, method.prepare(ablation))

    return make
