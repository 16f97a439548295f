"""Optimal ablation: values that are learned."""

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_ablate.errors import ConfigError
from lightning_ablate.methods.base import Ablation, AblationMethod, Affine
from lightning_ablate.methods.conditional import ConditionalMean
from lightning_ablate.methods.constants import ConstantMethod
from lightning_ablate.sites import Site
from lightning_ablate.statistics import ActivationStatistic, Moments, SiteStatistics


class LearnedMethod(AblationMethod):
    """A method with one value a neuron that ``fit`` learns by gradient descent on the cross-entropy.

    The target stays as it is. After calibration the ablated target reads the calibration data. Every example ablates
    other neurons, at a random fraction, so one fit serves all fractions and seeds. Values begin at the mean and move
    in units of each neuron's standard deviation. ``statistics.learned(self.name)`` gives them to the method.

    Args:
        steps: the least number of steps; the last epoch is completed.
        lr: the learning rate of Adam (Kingma & Ba 2015), in standard deviations; it falls to 0 along a cosine.
        examples: calibration examples in one step, of all processes together, as near as whole batches allow.
        name: what results call it, to tell several options of one method apart.
    """

    statistics: ClassVar[tuple[type[ActivationStatistic], ...]] = (Moments,)

    def __init__(self, steps: int = 100, lr: float = 0.05, examples: int = 32, name: str | None = None) -> None:
        if steps < 1 or examples < 1 or not lr > 0:
            raise ConfigError(f"steps is {steps}, lr {lr} and examples {examples}; expected all of them above 0")
        self.steps, self.lr, self.examples = steps, lr, examples
        self.name = name or self.name

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer. Override it to learn in another way."""
        return torch.optim.Adam(parameters, lr=self.lr)


class Optimal(LearnedMethod, ConstantMethod):
    """An ablated neuron is the constant with which the target does best (Li & Janson 2024, arXiv 2409.09951).

    Constants are learned for all neurons together, see :class:`LearnedMethod`.
    """

    name = "optimal"

    def values(self, site: Site, statistics: SiteStatistics) -> Tensor:
        """The values learned."""
        return statistics.learned(self.name, site.width)


class ConditionalTuned(LearnedMethod, ConditionalMean):
    """The conditional mean, tuned for each condition until the logits come near those of the intact target.

    Slopes and intercepts of all sites begin at :class:`ConditionalMean` and move together, down the gradient of the KL
    divergence of the ablated target from the intact one on the calibration data (distillation, Hinton et al. 2015), so
    nothing is learned of the text that the target doesn't know. A step costs three forward passes a condition and one
    of the intact target. All conditions are tuned side by side: each holds five times kept × ablated float32 numbers a
    site on the device. The checkpoint holds kept × ablated numbers a site for each; other conditions need another fit.

    Its options are those of :class:`ConditionalMean` and of :class:`LearnedMethod`; ``lr`` is in standard deviations of
    the ablated neuron, for the intercept and the slopes of all kept neurons together.
    """

    name = "conditional-tuned"
    statistics = ConditionalMean.statistics
    attributable = False  # values are tuned for whole conditions, not for units alone

    def __init__(
        self,
        ridge: float | None = None,
        steps: int = 50,
        lr: float = 0.3,
        examples: int = 8,
        name: str | None = None,
        *,
        centred: bool = True,
    ) -> None:
        ConditionalMean.__init__(self, ridge, centred=centred)
        LearnedMethod.__init__(self, steps, lr, examples, name)

    def prepare(self, ablation: Ablation) -> Affine:
        """Takes what was tuned for the condition."""
        mask, ablated = ablation.mask, int(ablation.mask.sum())
        packed = ablation.statistics.learned(self.key(ablation.masks), 1 + len(mask) - ablated, ablated)
        return self.unpacked(packed.to(mask.device), mask)

    def without_intercept(self) -> AblationMethod | None:
        """None: it would have to be tuned again."""
        return None

    def key(self, masks: str) -> str:
        """The name under which a calibration holds what was tuned for the masks of this digest."""
        return f"{self.name} {self.ridge} {self.centred} {self.steps} {self.lr} {self.examples} {masks}"

    def start(self, ablation: Ablation) -> Tensor:
        """The conditional mean as one tensor ``(kept + 1, ablated)`` float32, the intercept last."""
        affine = super().prepare(ablation)
        offset = affine.offset[ablation.mask]
        if affine.slope is None:
            return offset.unsqueeze(0)
        return torch.cat([affine.slope, (offset - affine.center @ affine.slope).unsqueeze(0)])

    def moved(self, start: Tensor, mask: Tensor, moments: Moments, delta: Tensor) -> Tensor:
        """A regression ``(kept + 1, ablated)`` float32, changed by a ``delta`` of this shape.

        Each row of delta is in standard deviations of the ablated neurons for one of a kept neuron; the last is that of
        an intercept at the means. Deltas are divided by their number of rows, so the step size doesn't depend on how
        many neurons are kept.
        """
        mean, sd = (values.float().to(mask.device) for values in (moments.mean, moments.sd))
        delta = delta / len(delta) * sd[mask]
        slope = torch.where(sd > 0, 1 / sd, 0.0)[~mask, None] * delta[:-1]
        intercept = delta[-1] - (mean[~mask, None] * slope).sum(0)  # a product that autocast leaves as it is
        return start + torch.cat([slope, intercept.unsqueeze(0) * self.centred])

    @staticmethod
    def unpacked(packed: Tensor, mask: Tensor) -> Affine:
        """A regression from :meth:`start` or :meth:`moved`, at ``mask`` ``(neurons,)`` bool."""
        offset = packed.new_zeros(len(mask)).masked_scatter(mask, packed[-1])
        kept, ablated = (~mask).nonzero().squeeze(1), mask.nonzero().squeeze(1)
        return Affine(offset, packed[:-1], packed.new_zeros(len(kept)), kept, ablated) if len(kept) else Affine(offset)
