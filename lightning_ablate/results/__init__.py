"""The results of a sweep: a table of its conditions, what each example scored, and what follows from both."""

from lightning_ablate.results.join import load
from lightning_ablate.results.table import Results
