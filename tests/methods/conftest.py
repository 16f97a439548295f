"""What a method does at one site."""

import pytest

from lightning_ablate import Site
from lightning_ablate.methods import Ablation, Batch, Edit
from lightning_ablate.statistics import SiteStatistics, with_needs


@pytest.fixture
def edit():
    """Makes the edit of a method at a site whose statistics are those of ``x`` ``(batch, ..., neurons)``."""

    def make(method, x, mask, *, valid=None, heads=None, seed=1, batch=None, site="attn.proj"):
        here, gathered = Site(site, x.shape[-1], heads=heads), {}
        for kind in with_needs(method.statistics):
            gathered[kind] = kind.of(here, SiteStatistics(site, gathered))
            gathered[kind].update(x, valid)
        ablation = Ablation(here, mask, SiteStatistics(site, gathered), seed, batch or Batch())
        return Edit(mask, method.prepare(ablation))

    return make
