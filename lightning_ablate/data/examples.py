"""A set of examples, and who gets which of them: each counts exactly once on any number of ranks."""

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torch.utils.data.distributed import DistributedSampler

FILLER = -1


def tensors(row: Mapping[str, Any]) -> dict[str, Tensor]:
    """The numbers or arrays of a row as tensors."""
    return {name: torch.as_tensor(value) for name, value in row.items()}


class Examples(Dataset[dict[str, Any]]):
    """A set of examples, each of which knows its place.

    Args:
        rows: what the examples are made of. Arrays go to a DataLoader's workers by value, tensors by a file each.
        contents: what identifies them in the fingerprint.
        make: makes a dict of tensors of a row; it is pickled for workers.
        clusters: a number an example, equal for examples that share a document; by default each has its own.
    """

    def __init__(
        self,
        rows: Sequence[Any],
        contents: Sequence[bytes],
        make: Callable[[Any], Any] = tensors,
        clusters: Sequence[int] | None = None,
    ) -> None:
        self.rows, self.contents, self.make = rows, contents, make
        self.clusters = list(range(len(contents)) if clusters is None else clusters)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.contents)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """An example and its ``index``; the filler is the first example, and its index stays below 0."""
        return {**self.make(self.rows[max(index, 0)]), "index": index}

    def fingerprint(self) -> str:
        """SHA-256 over all examples, in hexadecimal."""
        return hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in self.contents)).hexdigest()


def joined(held: Iterable[Iterable[Hashable]]) -> list[int]:
    """A cluster for each example of the documents that it holds.

    Examples that hold a common document, directly or through other examples, get the same number; the numbers count
    from 0 in order of appearance.
    """
    above: dict[Hashable, Hashable] = {}

    def root(document: Hashable) -> Hashable:
        while (upper := above.setdefault(document, document)) != document:
            document = above[document] = above[upper]
        return document

    firsts = []
    for first, *others in held:
        for other in others:
            above[root(other)] = root(first)
        firsts.append(first)
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(root(first), len(numbers)) for first in firsts]


class ExactSampler(DistributedSampler[int]):
    """Deals the examples to the ranks in turn, and fills the short ranks with :data:`FILLER` in place of a repetition.

    Every rank gets the same number of batches of the same shape. It is a DistributedSampler so that Lightning keeps it.
    """

    def __init__(self, examples: int, batch_size: int, rank: int, world_size: int) -> None:
        Sampler.__init__(self)
        self.examples, self.rank, self.world_size = examples, rank, world_size
        share = -(-examples // world_size)
        self.share = share if world_size == 1 else -(-share // batch_size) * batch_size

    def __iter__(self) -> Iterator[int]:
        """This rank's examples, then fillers."""
        own = range(self.rank, self.examples, self.world_size)
        yield from own
        yield from [FILLER] * (self.share - len(own))

    def __len__(self) -> int:
        """How many this rank gets, fillers included."""
        return self.share
