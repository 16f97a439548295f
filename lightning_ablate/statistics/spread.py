"""How far each neuron strays from its mean."""

import torch
from torch import Tensor

from lightning_ablate.statistics.base import ActivationStatistic, SiteStatistics, positions


class Spread(ActivationStatistic):
    """The standard deviation of each neuron over the valid positions, in float64.

    Every batch gives its own mean and sum of squared deviations; two such parts merge by the formula of Chan, Golub &
    LeVeque (1979, "Updating formulae and a pairwise algorithm for computing sample variances"), so that neurons far
    from zero keep their digits.

    Example:
        >>> statistic = Spread(neurons=2)
        >>> statistic.update(torch.tensor([[[1.0, 1e6], [3.0, 1e6 + 4]]]))
        >>> statistic.compute().tolist()
        [1.0, 2.0]
    """

    parts: Tensor

    def __init__(self, neurons: int, earlier: SiteStatistics | None = None) -> None:
        super().__init__(neurons, earlier)
        zeros = torch.zeros(3, neurons, dtype=torch.float64)
        self.add_state("parts", zeros, dist_reduce_fx=_merged, persistent=True)

    def update(self, activations: Tensor, valid: Tensor | None = None) -> None:
        """Adds a batch, see :meth:`ActivationStatistic.update`."""
        rows = positions(activations, valid).double()
        if len(rows):
            mean = rows.mean(0)
            part = torch.stack([torch.full_like(mean, len(rows)), mean, (rows - mean).square().sum(0)])
            self.parts = _merged(torch.stack([self.parts, part]))

    def compute(self) -> Tensor:
        """See :attr:`sd`."""
        return self.sd

    @property
    def sd(self) -> Tensor:
        """The standard deviations of the positions seen (divided by their number), ``(neurons,)`` float64."""
        return (self.parts[2] / self.parts[0]).sqrt()

    def finite(self) -> Tensor:
        """Whether the means are finite, which they are if every activation was."""
        return self.parts[1].isfinite().all()


def _merged(parts: Tensor) -> Tensor:
    """Merges ``(parts, 3, neurons)``, the count, mean and sum of squared deviations of each, into one of them."""
    count, mean, squares = parts.unbind(1)
    total, reference = count.sum(0), mean[count[:, 0].argmax()]  # of equal means the merged one is exactly that
    center = reference + (count / total.clamp_min(1) * (mean - reference)).sum(0)
    return torch.stack([total, center, (squares + count * (mean - center).square()).sum(0)])
