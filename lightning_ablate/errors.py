"""The errors a user can cause and mend; the command line shows them as one line, without a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError


class AblationError(Exception):
    """What was expected, what came, and what to do next."""


class ConfigError(AblationError, ValueError):
    """An option is outside what it may be."""


class TargetError(AblationError, ValueError):
    """The target can't be loaded, or isn't the one the statistics were gathered on."""


class SiteError(AblationError, LookupError):
    """A site is missing, or doesn't behave as one."""


class StatisticsError(AblationError, RuntimeError):
    """Statistics are missing, or the activations can't give them."""


class DataError(AblationError, ValueError):
    """The data are missing, too few, or not of the expected form."""


class NonFiniteError(AblationError, ArithmeticError):
    """An activation or a logit is NaN or infinite."""


@contextmanager
def loading(name: str, kind: type[AblationError]) -> Iterator[None]:
    """Raises what goes wrong while ``name`` is loaded as an error of the given kind that names it."""
    try:
        yield
    except AblationError:
        raise
    except UnpicklingError as error:
        raise kind(f"could not load {name!r}: it is damaged, or holds more than tensors and plain values") from error
    except Exception as error:  # the libraries below raise dozens of kinds, some of them their own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise kind(f"could not load {name!r}: {lines[0]}") from error
