"""The results of a sweep: tables of numbers below, figures and texts above them (see README.md)."""

from lightning_ablate.results.difference import difference
from lightning_ablate.results.join import load
from lightning_ablate.results.results import Results
