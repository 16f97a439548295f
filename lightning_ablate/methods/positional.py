"""The mean at each position."""

import torch
from torch import Tensor

from lightning_ablate.methods.base import Ablation, AblationMethod, Replacement
from lightning_ablate.statistics import MeanByPosition, Moments


class PositionalMean(AblationMethod):
    """An ablated neuron is its mean at that position over the calibration data.

    Positions are places in the sequence as the target gets it; for an image its patches and special tokens. At
    positions that calibration never saw it is the mean over all positions.
    """

    name = "positional-mean"
    statistics = (Moments, MeanByPosition)
    needs_batch = True

    def prepare(self, ablation: Ablation) -> Replacement:
        """Looks up the means of as many positions as a batch has."""
        found, device = ablation.statistics[MeanByPosition], ablation.mask.device
        overall = ablation.statistics[Moments].mean.float().to(device)

        def replace(activations: Tensor) -> Tensor:
            rows = ablation.by_example(activations)
            # made here, or every condition would hold a table of its own
            means = torch.where((found.count > 0).unsqueeze(1).to(device), found.mean.float().to(device), overall)
            beyond = overall.expand(max(0, rows.shape[1] - len(means)), -1)
            values = torch.cat([means[: rows.shape[1]], beyond]).to(activations.dtype)
            return values.expand(rows.shape).reshape(activations.shape)

        return replace
