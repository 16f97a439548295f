"""Optimal ablation: values that are learned."""

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_ablate.errors import ConfigError
from lightning_ablate.methods.base import Ablation, AblationMethod, Replacement
from lightning_ablate.methods.conditional import ConditionalMean, ConditionalSequential, share
from lightning_ablate.methods.constants import ConstantMethod
from lightning_ablate.sites import Site
from lightning_ablate.statistics import ActivationStatistic, Covariance, Moments, SiteStatistics, solved


class LearnedMethod(AblationMethod):
    """A method with values that ``fit`` learns by gradient descent, by default one a neuron, on the cross-entropy.

    The target stays as it is. In the epochs behind the calibration the ablated target reads the calibration data, with
    neurons chosen anew for every example at a random fraction, so that one fit serves every fraction and seed. Values
    begin at the mean and move in units of each neuron's standard deviation. The method finds them by
    ``statistics.learned(self.name)``, as a leaf of what it computes. (:class:`ConditionalTuned` learns others.)

    Args:
        steps: of the optimizer, at least; the last epoch is completed.
        lr: of Adam (Kingma & Ba 2015) at the start, in standard deviations; it falls to 0 along a cosine.
        examples: of all processes together in one step, as near as whole batches allow, which are accumulated for it.
        name: what results call it, where one method is there with several options.
    """

    statistics: ClassVar[tuple[type[ActivationStatistic], ...]] = (Moments,)

    def __init__(self, steps: int = 100, lr: float = 0.05, examples: int = 32, name: str | None = None) -> None:
        if steps < 1 or examples < 1 or not lr > 0:
            raise ConfigError(f"steps is {steps}, lr {lr} and examples {examples}; expected all of them above 0")
        self.steps, self.lr, self.examples = steps, lr, examples
        self.name = name or self.name

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """What takes the steps. Override it to learn in another way."""
        return torch.optim.Adam(parameters, lr=self.lr)


class Optimal(LearnedMethod, ConstantMethod):
    """An ablated neuron is the constant with which the target does best (Li & Janson 2024, arXiv 2409.09951).

    They are learned for all neurons together, see :class:`LearnedMethod`.
    """

    name = "optimal"

    def values(self, site: Site, statistics: SiteStatistics) -> Tensor:
        """The values learned."""
        return statistics.learned(self.name)


class ConditionalOptimal(LearnedMethod, ConditionalMean):
    """The conditional mean with a learned intercept.

    What is kept has itself drifted when other sites are ablated as well, which the intercept can make good:
    ``x̂_a = μ_a + δ_a r_a + Σ_ak Σ_kk⁻¹ (x_k − μ_k)``. δ is learned, and r, the standard deviation of the neuron that
    the kept ones don't explain, as a share of its own, lets it fade where these tell enough.

    Its options are the ``ridge`` of :class:`ConditionalMean` and those of :class:`LearnedMethod`.
    """

    name = "conditional-optimal"
    attributable = False  # the intercept is learned where much is ablated
    statistics = ConditionalMean.statistics

    def __init__(
        self,
        ridge: float | None = None,
        steps: int = 100,
        lr: float = 0.05,
        examples: int = 32,
        name: str | None = None,
    ) -> None:
        ConditionalMean.__init__(self, ridge)
        LearnedMethod.__init__(self, steps, lr, examples, name)

    def without_intercept(self) -> AblationMethod | None:
        """Nothing: the intercept is what is learned."""
        return None

    def intercept(self, ablation: Ablation, unexplained: Tensor) -> Tensor:
        """The mean, and so much of what was learned as the kept neurons leave of the standard deviation."""
        mean = ablation.statistics[Moments].mean.to(unexplained)
        learned = ablation.statistics.learned(self.name).to(unexplained)
        return mean + unexplained.sqrt() * (learned - mean)

    def prepare(self, ablation: Ablation) -> Replacement:
        """As :class:`ConditionalMean`; while values are learned for other neurons in every example.

        Then all neurons take part in each regression, and those that aren't kept add nothing.
        """
        if ablation.mask.ndim == 1:
            return super().prepare(ablation)
        mask, statistics = ablation.mask, ablation.statistics
        gathered = statistics[Covariance]
        covariance = gathered.covariance.to(mask.device).double()
        among = torch.where(~mask.mT & ~mask, covariance, torch.eye(mask.shape[2], device=mask.device).double())
        across = torch.where(~mask.mT & mask, covariance, 0.0)
        slope = solved(among, across, self.ridge or gathered.ridge)
        explained = share(across * slope, covariance.diagonal(dim1=-2, dim2=-1)).unsqueeze(1)
        offset, center = self.intercept(ablation, 1 - explained).float(), statistics[Moments].mean.to(mask.device)

        def replace(activations: Tensor) -> Tensor:
            dtype = activations.dtype
            return (activations - center.to(dtype)) @ slope.to(dtype) + offset.to(dtype)

        return replace


class ConditionalTuned(LearnedMethod, ConditionalSequential):
    """What :class:`ConditionalSequential` fits, tuned for each condition until the logits come near the intact ones.

    Slopes and intercepts of all sites move together, down the gradient of the KL divergence of the ablated target from
    the intact one on the calibration data (distillation, Hinton et al. 2015), so that nothing is learned of the text
    that the target doesn't know. A step costs three forward passes a condition, and one of the intact target, and all
    conditions are tuned side by side: each holds five times kept × ablated float32 numbers a site on the device.

    Its options are those of :class:`ConditionalSequential` and of :class:`LearnedMethod`; ``lr`` is in standard
    deviations of the ablated neuron, for the intercept and the slopes of all kept neurons together.
    """

    name = "conditional-tuned"

    def __init__(
        self,
        ridge: float | None = None,
        intact: bool = False,
        steps: int = 50,
        lr: float = 0.3,
        examples: int = 8,
        name: str | None = None,
        *,
        centred: bool = True,
    ) -> None:
        ConditionalSequential.__init__(self, ridge, intact, centred=centred)
        LearnedMethod.__init__(self, steps, lr, examples, name)

    def key(self, masks: str) -> str:
        """See :meth:`ConditionalSequential.key`."""
        return f"{super().key(masks)} {self.steps} {self.lr} {self.examples}"

    def same(self, masks: str) -> str:
        """That of a :class:`ConditionalSequential` with these options. Override it if the regression is another one."""
        return ConditionalSequential(self.ridge, self.intact, centred=self.centred).key(masks)

    def moved(self, fitted: Tensor, mask: Tensor, moments: Moments, delta: Tensor) -> Tensor:
        """A regression as it is fitted, ``(kept + 1, ablated)`` float32, changed by ``delta`` of this shape.

        Each row of it is in standard deviations of the ablated neurons for one of the kept, the last that of an
        intercept at their means, divided by the number of rows, so that a step of all together is as long for any.
        """
        mean, sd = moments.mean.float(), moments.sd.float()
        delta = delta / len(delta) * sd[mask]
        slope = torch.where(sd > 0, 1 / sd, 0.0)[~mask, None] * delta[:-1]
        intercept = delta[-1] - (mean[~mask, None] * slope).sum(0)  # a product that autocast leaves as it is
        return fitted + torch.cat([slope, intercept.unsqueeze(0) * self.centred])
