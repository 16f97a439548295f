"""What the data modules share: two sets of examples, each counted exactly once on any number of ranks."""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal, Self, TypeVar, get_args

import lightning
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader

from lightning_ablate.data.examples import ExactSampler, Examples
from lightning_ablate.data.labels import class_index, names_of
from lightning_ablate.data.source import given_rows, open_source, shuffled, split_of
from lightning_ablate.errors import ConfigError, DataError

Purpose = Literal["calibration", "evaluation"]
T = TypeVar("T")


class AblationDataModule(lightning.LightningDataModule, ABC):
    """Calibration and evaluation examples. Subclass it to bring data of another form.

    Args:
        name: what results call the data.
        batch_size: examples per forward pass and process.
        num_workers: processes that load batches ahead; 0 loads them in the main one.
        evaluation: other data whose evaluation examples are evaluated as well, each for itself.
    """

    name: str
    evaluation: Sequence["AblationDataModule"] = ()

    def __init__(
        self, name: str, *, batch_size: int, num_workers: int = 0, evaluation: Sequence["AblationDataModule"] = ()
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}, expected at least 1 (--data.batch_size)")
        self.name, self.batch_size, self.num_workers = name, batch_size, num_workers
        self.evaluation = list(evaluation)
        self.examples: dict[Purpose, Examples] = {}
        self.calibrated: set[str] | None = None

    @abstractmethod
    def load(self, purpose: Purpose) -> Examples:
        """Reads the examples for a purpose, the same on every rank, without what :meth:`may_use` refuses.

        Fewer than asked are a DataError.
        """

    def may_use(self, content: bytes, purpose: Purpose) -> bool:
        """Whether a text or image is free for a purpose: what calibrated, as the checkpoint knows, is not evaluated."""
        key = hashlib.sha256(content).hexdigest()[:16]
        self.calibrated = set() if self.calibrated is None else self.calibrated
        if purpose == "calibration":
            self.calibrated.add(key)
        return purpose == "calibration" or key not in self.calibrated

    def describe(self) -> dict[str, Any]:
        """What run.json says about the data."""
        others = [one.describe() for one in self.evaluation]
        return {
            "class": f"{type(self).__module__}.{type(self).__qualname__}",
            "name": self.name,
            "batch_size": self.batch_size,
            **({"evaluation_of_others": others} if others else {}),
            **{
                purpose: {"examples": len(e), "clusters": len({*e.clusters}), "sha256": e.fingerprint()}
                for purpose, e in self.examples.items()
            },
        }

    def state_dict(self) -> dict[str, Any]:
        """What calibrated, by hash."""
        return {"calibrated": sorted(self.calibrated or ())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it from a checkpoint."""
        self.calibrated = set(state_dict["calibrated"])

    def prepare_data(self) -> None:
        """Downloads what there is to download, once a node."""
        self.download(get_args(Purpose))
        for one in self.evaluation:
            one.download(["evaluation"])

    def download(self, purposes: Sequence[Purpose]) -> None:
        """What these purposes need, by default nothing."""

    def setup(self, stage: str) -> None:
        """For ``fit``, loads the calibration and then the evaluation examples, so that what is amiss shows early."""
        for one in (self, *self.evaluation):
            one.examples = {}
        if stage == "fit":
            self.calibrated = None
            for purpose in get_args(Purpose):
                self._examples(purpose)
            for one in self._others():
                one._examples("evaluation")

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The calibration data, in the same order every epoch."""
        return self._loader("calibration")

    def val_dataloader(self) -> DataLoader[dict[str, Any]] | list[DataLoader[dict[str, Any]]]:
        """The evaluation data; a list where there are others as well."""
        own = self._loader("evaluation")
        others = [one._loader("evaluation") for one in self._others()]
        return [own, *others] if others else own

    def _others(self) -> Sequence["AblationDataModule"]:
        """The other data that are evaluated, told of the trainer and of what calibrated."""
        for one in self.evaluation:
            one.trainer, one.calibrated = self.trainer, self.calibrated
        return self.evaluation

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
        workers: dict[str, Any] = {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0}
        return DataLoader(examples, batch_size=self.batch_size, sampler=sampler, **workers)


class SourceData(AblationDataModule):
    """Examples from a source that `datasets` reads.

    Args:
        name: a hub name, a local folder, or files or a glob of parquet, json, jsonl, csv or txt.
        unit: what the budgets count, as the options call it: ``tokens``, ``images`` or ``examples``.
        budgets: how much calibrates, and how much is evaluated.
        subset: which configuration of a hub data set.
        calibration_split: the split that calibrates.
        evaluation_split: the split that is evaluated; it may be the same one, as nothing is used for both. None takes
            ``validation`` where there is one.
        streaming: reads only as far as the budgets need, without downloading the rest.
        shuffle_seed: shuffles with this seed, as many sources are sorted by class; None keeps the order.
        cluster_column: the column that names what rows belong together (an author, a subject, a video); examples that
            share it are drawn together for intervals. None takes each row for itself.
        batch_size: examples per forward pass and process.
        num_workers: processes that load batches ahead; 0 loads them in the main one.
        evaluation: other data whose evaluation examples are evaluated as well, each for itself.
    """

    def __init__(
        self,
        name: str,
        unit: str,
        budgets: tuple[int, int],
        *,
        subset: str | None = None,
        calibration_split: str = "train",
        evaluation_split: str | None = None,
        streaming: bool = False,
        shuffle_seed: int | None = 0,
        cluster_column: str | None = None,
        batch_size: int = 16,
        num_workers: int = 0,
        evaluation: Sequence[AblationDataModule] = (),
    ) -> None:
        super().__init__(name, batch_size=batch_size, num_workers=num_workers, evaluation=evaluation)
        self.splits: dict[Purpose, str | None] = {"calibration": calibration_split, "evaluation": evaluation_split}
        self.path, self.subset, self.streaming, self.shuffle_seed = name, subset, streaming, shuffle_seed
        self.unit, self.reached = unit, dict[Purpose, int]()
        self.given: Any = None
        self.cluster_column = cluster_column
        self.cluster_columns = () if cluster_column is None else (cluster_column,)
        self.budgets: dict[Purpose, int] = dict(zip(get_args(Purpose), budgets, strict=True))
        for purpose, budget in self.budgets.items():
            if budget < 1:
                raise ConfigError(f"{purpose}_{unit} is {budget}, expected at least 1 (--data.{purpose}_{unit})")

    @classmethod
    def of(cls, rows: Any, *, name: str = "given", **options: Any) -> Self:
        """The data module of rows that are there already.

        ``rows`` are a data set of `datasets` or a dict of its splits, a DataFrame, or texts or mappings in a list, an
        array, a Series or a generator. ``name`` is what results call the data; ``options`` are those of the class.
        """
        made = cls(name, **options)
        made.given = given_rows(rows, name)
        return made

    def source(self, purpose: Purpose) -> Any:
        """The rows for a purpose, in order. Override it to read from elsewhere."""
        split = self.splits[purpose] or "validation"
        try:
            if self.given is None:
                opened = open_source(self.path, subset=self.subset, split=split, streaming=self.streaming)
            else:
                opened = split_of(self.given, split, self.name)
            return shuffled(opened, self.shuffle_seed)
        except DataError as error:
            if self.splits[purpose] or not re.search("Unknown split|Bad split", str(error)):
                raise
            self.splits[purpose] = self.splits["calibration"]
            rank_zero_info(f"{self.name} has no split 'validation': what calibration leaves is evaluated")
            return self.source(purpose)

    def cluster(self, row: Mapping[str, Any], number: int) -> Hashable:
        """What a row belongs to: the value of its ``cluster_column``, or else itself, by its number."""
        value = None if self.cluster_column is None else row[self.cluster_column]
        return number if value is None else repr(value)

    def class_index(self, source: Any, column: str) -> Callable[[Any], int]:
        """Maps labels of a column to the target's classes, see :func:`~lightning_ablate.data.labels.class_index`."""
        own = names_of(getattr((getattr(source, "features", None) or {}).get(column), "names", None))
        module = getattr(self.trainer, "lightning_module", None)
        return class_index(self.name, column, own, getattr(module, "class_names", None))

    def taken(self, purpose: Purpose, candidates: Iterable[tuple[T, int]]) -> list[T]:
        """Of candidates and their sizes, in units, as many as reach the budget; DataError if they end before."""
        found, self.reached[purpose] = [], 0
        for candidate, size in candidates:
            found.append(candidate)
            self.reached[purpose] += size
            if self.reached[purpose] >= self.budgets[purpose]:
                return found
        raise DataError(
            f"{self.name} gives {self.reached[purpose]:,} {purpose} {self.unit}, expected {self.budgets[purpose]:,}; "
            f"bring more or lower --data.{purpose}_{self.unit}"
        )

    def text(self, row: dict[str, Any], column: str) -> str:
        """The text of a column."""
        if not isinstance(row[column], str):
            raise DataError(f"{self.name} holds {row[column]!r} in {column!r}, expected text")
        return row[column]

    def download(self, purposes: Sequence[Purpose]) -> None:
        """What the hub has."""
        if not self.streaming:
            for purpose in purposes:
                self.source(purpose)

    def describe(self) -> dict[str, Any]:
        """Adds the budgets asked and reached."""
        reached = {p: {"asked": self.budgets[p], "reached": self.reached.get(p)} for p in self.examples}
        found = {f"{purpose}_{self.unit}": found for purpose, found in reached.items()}
        return super().describe() | {"cluster_column": self.cluster_column} | found
