"""Classes of data, as the indices of the target's classes."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_ablate.errors import DataError, few

_NUMBER = re.compile(r"\s*(LABEL_)?\d+\s*")


def names_of(names: Iterable[Any] | Mapping[Any, Any] | None) -> list[str] | None:
    """Names of classes in the order of their indices; None where there are only numbers."""
    if isinstance(names, Mapping):
        names = [names[index] for index in sorted(names, key=int)]
    found = [str(name) for name in names or ()]
    return None if all(_NUMBER.fullmatch(name) for name in found) else found


def class_index(data: str, column: str, own: list[str] | None, known: list[str] | None) -> Callable[[Any], int]:
    """Maps labels of the data, whose classes are ``own``, to indices of the target's classes ``known``.

    Labels are mapped by name, up to case, where the target has each of the data's names. Otherwise they are taken as
    the target's indices, with a warning where both have names. The map raises DataError for what is no class.
    """
    names = [name.casefold() for name in known or ()]
    by_name = {name: index for index, name in enumerate(names) if names.count(name) == 1}
    order: list[int] = []  # the target's index of each class of the data, where they differ
    if own and known and [name.casefold() for name in own] != names:
        order = [by_name.get(name.casefold(), -1) for name in own]
        if min(order) < 0 or len(set(order)) < len(order):
            order = []
            rank_zero_warn(
                f"{data} names its classes {few(own)}, and the target {few(known)}: the names don't agree, so labels "
                "are taken as the target's class indices"
            )

    def index(label: Any) -> int:
        if isinstance(label, str) and known:
            if label.casefold() in by_name:
                return by_name[label.casefold()]
            raise DataError(f"{data} holds {label!r} in {column!r}, expected a class of the target's: {few(known)}")
        if not (isinstance(label, int) or (isinstance(label, float) and label.is_integer())):
            raise DataError(f"{data} holds {label!r} in {column!r}, expected a class index")
        return order[int(label)] if 0 <= label < len(order) else int(label)

    return index
