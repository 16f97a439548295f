"""What replaces an ablated neuron: an AblationMethod each."""

import inspect
from collections.abc import Iterator
from difflib import get_close_matches
from importlib import import_module
from textwrap import shorten

from lightning_ablate.errors import ConfigError, loading
from lightning_ablate.methods.base import Ablation, AblationMethod, Affine, Batch, Edit, Replacement, Source, constant
from lightning_ablate.methods.conditional import ConditionalMean, ConditionalMeanPerHead
from lightning_ablate.methods.constants import ConstantMethod, HalfSampleMode, Mean, Median, Mode, Peak, Zero
from lightning_ablate.methods.learned import ConditionalTuned, LearnedMethod, Optimal
from lightning_ablate.methods.noise import Noise
from lightning_ablate.methods.positional import PositionalMean
from lightning_ablate.methods.reroute import Reroute
from lightning_ablate.methods.resample import (
    Resample,
    ResampleAnyPosition,
    ResampleCharacters,
    ResampleGenerated,
    ResampleIds,
    ResamplePartner,
    ResamplePixels,
    ResampleSamePosition,
    others_of,
)


def method_of(given: AblationMethod | str, option: str = "--ablation.methods") -> AblationMethod:
    """A method as it is given; or of any imported class of this ``name``, with its defaults, or else ConfigError.

    The ``option`` is where it was given, as errors name it.
    """
    if isinstance(given, AblationMethod):
        return given
    if isinstance(given, type):
        raise ConfigError(
            f"a method is an instance or a name, got the class {given.__name__}; expected {given.__name__}()"
        )
    name = str(given)
    known = {method.name: method for method in _concrete(AblationMethod)}  # type: ignore[type-abstract]
    if "class_path" in name or "." in name:
        why = "is the class path, or an option's name, wrong?"
        if "class_path" not in name:
            module, _, kind = name.rpartition(".")
            with loading(name, ConfigError, option):
                why = f"{getattr(import_module(module), kind)!r:.60} is no AblationMethod"
        raise ConfigError(f"can't make a method of {name:.120} ({option}): {why}")
    if name not in known:
        close, names = ", ".join(get_close_matches(name, known, 2)) or "none", shorten(" ".join(known), 190)
        raise ConfigError(f"{option} has no {name!r:.24}; alike: {close}; known: {names}")
    return known[name]()


def shipped() -> list[str]:
    """The names of this package's own methods, the shortest and plainest first."""
    own = {kind.name for kind in _concrete(AblationMethod) if kind.__module__.startswith(__name__)}  # type: ignore[type-abstract]
    return sorted(own, key=lambda name: (len(name), name))


def _concrete(kind: type[AblationMethod]) -> Iterator[type[AblationMethod]]:
    for subclass in kind.__subclasses__():
        if not inspect.isabstract(subclass) and "name" in vars(subclass):
            yield subclass
        yield from _concrete(subclass)
