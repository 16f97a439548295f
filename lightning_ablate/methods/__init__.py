"""What replaces an ablated neuron; one AblationMethod a file."""

import inspect
from collections.abc import Iterator

from lightning_ablate.errors import ConfigError
from lightning_ablate.methods.base import (
    Ablation,
    AblationMethod,
    Affine,
    Batch,
    ConstantMethod,
    LearnedMethod,
    Replacement,
    ablate,
    constant,
)
from lightning_ablate.methods.conditional import Conditional, ConditionalPerHead
from lightning_ablate.methods.mean import Mean
from lightning_ablate.methods.mode import HalfSampleMode, Median, Mode, OnePassPeak
from lightning_ablate.methods.noise import Noise
from lightning_ablate.methods.optimal import ConditionalOptimal, Optimal
from lightning_ablate.methods.peak import Peak
from lightning_ablate.methods.positional import PositionalMean
from lightning_ablate.methods.resample import (
    ResampleAnyPosition,
    ResampleCharacters,
    ResampleGenerated,
    ResampleIds,
    ResamplePixels,
    ResampleSamePosition,
)
from lightning_ablate.methods.zero import Zero

__all__ = [
    "Ablation",
    "AblationMethod",
    "Affine",
    "Batch",
    "Conditional",
    "ConditionalOptimal",
    "ConditionalPerHead",
    "ConstantMethod",
    "HalfSampleMode",
    "LearnedMethod",
    "Mean",
    "Median",
    "Mode",
    "Noise",
    "OnePassPeak",
    "Optimal",
    "Peak",
    "PositionalMean",
    "Replacement",
    "ResampleAnyPosition",
    "ResampleCharacters",
    "ResampleGenerated",
    "ResampleIds",
    "ResamplePixels",
    "ResampleSamePosition",
    "Zero",
    "ablate",
    "constant",
    "method_named",
]


def method_named(name: str) -> AblationMethod:
    """The method whose class has this ``name``, made with its defaults; any imported subclass counts.

    Raises:
        ConfigError: if there is none.

    Example:
        >>> method_named("peak").statistics[0].__name__
        'RangeHistogram'
    """
    known = {method.name: method for method in _concrete(AblationMethod)}  # type: ignore[type-abstract]
    if "class_path" in name:
        raise ConfigError(f"can't make methods of {name}: is a class path or the name of an option wrong?")
    if name not in known:
        raise ConfigError(
            f"unknown method {name!r}; expected one of {', '.join(sorted(known))}, "
            "or the class path of an AblationMethod"
        )
    return known[name]()


def _concrete(kind: type[AblationMethod]) -> Iterator[type[AblationMethod]]:
    for subclass in kind.__subclasses__():
        if not inspect.isabstract(subclass) and "name" in vars(subclass):
            yield subclass
        yield from _concrete(subclass)
