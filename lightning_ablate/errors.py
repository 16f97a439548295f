"""Errors that a user can cause and mend; the command line shows them as one line, without a traceback."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from glob import has_magic
from pathlib import Path
from pickle import UnpicklingError
from textwrap import shorten

_SAYS_NOTHING = re.compile(r"\s*($|An error (occurred|happened))")  # then the cause is shown


class AblationError(Exception):
    """Says in one line what was expected, what came, and what to do next."""

    def __init__(self, message: str) -> None:
        if "\nOriginal Traceback" in message:  # of a DataLoader's worker
            message = message.rpartition(f"{type(self).__name__}: ")[2]
        super().__init__(" ".join(message.splitlines()).rstrip())


class ConfigError(AblationError, ValueError):
    """An option has a value that it can't have."""


class TargetError(AblationError, ValueError):
    """The target can't be loaded, or the statistics are those of another one."""


class SiteError(AblationError, LookupError):
    """A site is missing, or can't be ablated as asked."""


class StatisticsError(AblationError, RuntimeError):
    """Statistics are missing, or can't be computed from these activations."""


class DataError(AblationError, ValueError):
    """The data are missing, too few, or not of the expected form."""


class NonFiniteError(AblationError, ArithmeticError):
    """An activation or a logit is NaN or infinite."""


def few(names: Iterable[str]) -> str:
    """The first five, and how many more there are."""
    listed = list(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "") or "none"


@contextmanager
def loading(name: str, kind: type[AblationError], flag: str = "") -> Iterator[None]:
    """Turns any error inside into one of the given kind, which names what is loaded (``name``) and its option."""
    named = f"{name!r} ({flag})" if flag else repr(name)
    try:
        yield
    except AblationError:
        raise
    except UnpicklingError as error:
        raise kind(f"could not load {named}: it is damaged, or holds more than tensors and plain values") from error
    except Exception as error:  # the libraries below raise dozens of kinds, some of them their own
        cause: BaseException = error
        while (inner := cause.__cause__ or cause.__context__) and _SAYS_NOTHING.match(str(cause)):
            cause = inner
        reason = " ".join(str(cause).split()) or type(cause).__name__
        reason = f"it lacks {reason}" if isinstance(cause, KeyError) else reason
        if flag and name.startswith((".", "/", "~")) and not (has_magic(name) or Path(name).expanduser().exists()):
            reason = "there is no such file or folder"
        raise kind(f"could not load {named}: {shorten(reason, 180, placeholder=' ...')}") from error
