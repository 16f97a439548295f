"""What the data modules share: two sets of examples, each counted exactly once on any number of ranks."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Literal, get_args

import lightning
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.distributed import DistributedSampler

from lightning_ablate.data.source import open_source
from lightning_ablate.errors import ConfigError, DataError

Purpose = Literal["calibration", "evaluation"]
FILLER = -1


class Examples(Dataset[dict[str, Any]], ABC):
    """A set of examples, which are dicts of tensors."""

    @abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abstractmethod
    def example(self, index: int) -> dict[str, Any]:
        """One of them."""

    @abstractmethod
    def content(self, index: int) -> bytes:
        """What identifies an example in the fingerprint."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        """An example and its ``index``; the filler is the first example, and its index stays below 0."""
        return {**self.example(max(index, 0)), "index": index}

    def fingerprint(self) -> str:
        """SHA-256 over all examples, in hexadecimal."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(hashlib.sha256(self.content(index)).digest())
        return digest.hexdigest()


class ExactSampler(DistributedSampler[int]):
    """Deals the examples to the ranks in turn, and fills the short ranks with :data:`FILLER` in place of a repetition.

    Every rank gets the same number of batches of the same shape. It is a DistributedSampler so that Lightning keeps it.

    Args:
        examples: how many there are.
        batch_size: of each rank.
        rank: of this process.
        world_size: number of processes.

    Example:
        >>> [list(ExactSampler(3, batch_size=2, rank=rank, world_size=2)) for rank in (0, 1)]
        [[0, 2], [1, -1]]
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

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: the order is the same in every epoch."""


class AblationDataModule(lightning.LightningDataModule, ABC):
    """Calibration and evaluation examples. Subclass it to bring data of another form.

    Args:
        name: what results call the data.
        batch_size: examples per forward pass and process.
        num_workers: processes that load batches ahead; 0 loads them in the main one.
    """

    name: str

    def __init__(self, name: str, *, batch_size: int, num_workers: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}, expected at least 1")
        self.name, self.batch_size, self.num_workers = name, batch_size, num_workers
        self.examples: dict[Purpose, Examples] = {}
        self.calibrated: set[str] | None = None

    @abstractmethod
    def load(self, purpose: Purpose) -> Examples:
        """Reads the examples for a purpose, the same ones on every rank.

        What :meth:`may_use` refuses must be left out.

        Raises:
            DataError: if there are none, or fewer than asked.
        """

    def may_use(self, content: bytes, purpose: Purpose) -> bool:
        """Whether a text or image is free for a purpose: what calibrated is not evaluated.

        The checkpoint remembers what calibrated, so that ``validate`` with other budgets or another order keeps to it.

        Args:
            content: of the text or image.
            purpose: what it is wanted for.
        """
        key = hashlib.sha256(content).hexdigest()[:16]
        if self.calibrated is None:
            self.calibrated = set()
        if purpose == "calibration":
            self.calibrated.add(key)
        return purpose == "calibration" or key not in self.calibrated

    def describe(self) -> dict[str, Any]:
        """What run.json says about the data."""
        return {
            "class": f"{type(self).__module__}.{type(self).__qualname__}",
            "name": self.name,
            "batch_size": self.batch_size,
            **{purpose: {"examples": len(e), "sha256": e.fingerprint()} for purpose, e in self.examples.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """What calibrated, by hash."""
        return {"calibrated": sorted(self.calibrated or ())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it from a checkpoint."""
        self.calibrated = set(state_dict["calibrated"])

    def setup(self, stage: str) -> None:
        """For ``fit``, loads the calibration and then the evaluation examples, so that what is amiss shows early."""
        self.examples = {}
        if stage == "fit":
            self.calibrated = None
            for purpose in get_args(Purpose):
                self._examples(purpose)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The calibration data, in the same order every epoch."""
        return self._loader("calibration")

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The evaluation data."""
        return self._loader("evaluation")

    def _examples(self, purpose: Purpose) -> Examples:
        if purpose == "evaluation" and self.calibrated is None:
            self._examples("calibration")  # without a checkpoint, `validate` leaves out what `fit` would
        if purpose not in self.examples:
            self.examples[purpose] = self.load(purpose)
        if not len(self.examples[purpose]):
            raise DataError(f"{self.name} has no {purpose} examples")
        return self.examples[purpose]

    def _loader(self, purpose: Purpose) -> DataLoader[dict[str, Any]]:
        examples, trainer = self._examples(purpose), self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        sampler = ExactSampler(len(examples), self.batch_size, rank, world_size)
        return DataLoader(
            examples,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )


class SourceData(AblationDataModule):
    """Examples from a source that `datasets` reads.

    Args:
        name: see :func:`~lightning_ablate.data.source.open_source`.
        subset: which configuration of a hub data set.
        calibration_split: the split that calibrates.
        evaluation_split: the split that is evaluated; it may be the same one, as nothing is used for both.
        streaming: reads only as far as the budgets need, without downloading the rest.
        shuffle_seed: shuffles with this seed; None keeps the order.
        batch_size: examples per forward pass and process.
        num_workers: processes that load batches ahead; 0 loads them in the main one.
    """

    def __init__(
        self,
        name: str,
        *,
        subset: str | None,
        calibration_split: str,
        evaluation_split: str,
        streaming: bool,
        shuffle_seed: int | None,
        batch_size: int,
        num_workers: int,
    ) -> None:
        super().__init__(name, batch_size=batch_size, num_workers=num_workers)
        self.splits: dict[Purpose, str] = {"calibration": calibration_split, "evaluation": evaluation_split}
        self.subset, self.streaming, self.shuffle_seed = subset, streaming, shuffle_seed

    def source(self, purpose: Purpose) -> Any:
        """The rows for a purpose, in order. Override it to read from elsewhere."""
        return open_source(
            self.name,
            subset=self.subset,
            split=self.splits[purpose],
            streaming=self.streaming,
            shuffle_seed=self.shuffle_seed,
        )

    def prepare_data(self) -> None:
        """Downloads what the hub has, once a node."""
        if not self.streaming:
            for purpose in get_args(Purpose):
                self.source(purpose)


def budgets_of(unit: str, calibration: int, evaluation: int) -> dict[Purpose, int]:
    """How much of the data each purpose takes.

    Args:
        unit: what is counted, as the options call it: ``tokens``, ``images`` or ``examples``.
        calibration: how many calibrate.
        evaluation: how many are evaluated.

    Raises:
        ConfigError: if one of them is below 1.
    """
    budgets: dict[Purpose, int] = {"calibration": calibration, "evaluation": evaluation}
    for purpose, budget in budgets.items():
        if budget < 1:
            raise ConfigError(f"{purpose}_{unit} is {budget}, expected at least 1")
    return budgets
