"""Which units are ablated: a Choice each."""

from lightning_ablate.choices.base import Choice, Ordered, Random, Unit
from lightning_ablate.choices.named import EachExpert, EachHead, EachLayer, Only
from lightning_ablate.choices.ranked import Quantity, Ranked
