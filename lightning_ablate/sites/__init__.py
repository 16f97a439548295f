"""Where a target is read and changed: the inputs of its projections, and what its modules return."""

from lightning_ablate.sites.attended import attended
from lightning_ablate.sites.basis import Basis, Directions, Features, Part
from lightning_ablate.sites.experts import one_by_one
from lightning_ablate.sites.find import find_sites
from lightning_ablate.sites.hooks import hooked, keep
from lightning_ablate.sites.mixing import MixingError, check_mixing, other_mixing
from lightning_ablate.sites.prefix import Prefix, blocks_of, left_of
from lightning_ablate.sites.site import Site, check_mask, exact_device, given_for, heads_of, weights_of
from lightning_ablate.sites.words import KINDS, is_asked, is_covered
