"""A set of examples, and which process gets which of them."""

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

from scipy.cluster.hierarchy import DisjointSet
from torch.utils.data import Dataset, Sampler
from torch.utils.data.distributed import DistributedSampler

FILLER = -1


class Examples(Dataset[dict[str, Any]]):
    """A set of examples, each with its ``index``.

    Args:
        rows: what the examples are made of. A DataLoader sends them to its workers, where each tensor would need a
            file, so they hold none.
        contents: the bytes of each example, for the fingerprint.
        make: makes the dict of tensors of a row; it is pickled for workers.
        clusters: a number an example, equal for examples that share a document; by default each has its own.
    """

    def __init__(
        self,
        rows: Sequence[Any],
        contents: Sequence[bytes],
        make: Callable[[Any], dict[str, Any]] = dict,
        clusters: Sequence[int] | None = None,
    ) -> None:
        self.rows, self.contents, self.make = rows, list(contents), make
        self.clusters = list(range(len(contents)) if clusters is None else clusters)

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.contents)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """An example and its ``index``. The filler is the first example with an index below 0."""
        return {**self.make(self.rows[max(index, 0)]), "index": index}

    def fingerprint(self) -> str:
        """SHA-256 over all examples, in hexadecimal."""
        return hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in self.contents)).hexdigest()


def joined(held: Iterable[Sequence[Hashable]]) -> list[int]:
    """The cluster of each example, from the documents that it holds.

    Examples that hold a common document, directly or through other examples, get the same number; the numbers count
    from 0 in order of appearance.
    """
    documents, firsts = DisjointSet(), []
    for first, *others in held:
        documents.add(first)
        for other in others:
            documents.add(other)
            documents.merge(first, other)
        firsts.append(first)
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(documents[first], len(numbers)) for first in firsts]


class ExactSampler(DistributedSampler[int]):
    """Deals the examples to the processes in turn, each to one of them.

    Processes with fewer examples get ``FILLER`` as well, so that all have as many batches of the same shape. Lightning
    would replace the sampler if it were no DistributedSampler.
    """

    def __init__(self, count: int, batch_size: int, rank: int, world_size: int) -> None:
        Sampler.__init__(self)
        self.count, self.rank, self.world_size = count, rank, world_size
        share = -(-count // world_size)
        self.share = share if world_size == 1 else -(-share // batch_size) * batch_size

    def __iter__(self) -> Iterator[int]:
        """The examples of this process, then fillers."""
        own = range(self.rank, self.count, self.world_size)
        yield from own
        yield from [FILLER] * (self.share - len(own))

    def __len__(self) -> int:
        """The number of examples that this process gets, fillers included."""
        return self.share
