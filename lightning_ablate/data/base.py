"""What all data modules share: calibration and evaluation examples, loaders that give each exactly once."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import lightning
from torch.utils.data import DataLoader

from lightning_ablate.data.examples import ExactSampler, Examples
from lightning_ablate.errors import ConfigError, DataError

Purpose = Literal["calibration", "evaluation"]


@dataclass(kw_only=True, eq=False, repr=False)
class AblationDataModule(lightning.LightningDataModule, ABC):
    """Calibration and evaluation examples. Subclass it to bring data of another form.

    Args:
        name: what results call the data.
        batch_size: examples per forward pass and process.
        num_workers: processes that load batches ahead; 0 loads them in the main one.
        evaluation: other data whose evaluation examples are evaluated as well, each for itself.
    """

    name: str = field(kw_only=False)
    batch_size: int = 16
    num_workers: int = 0
    evaluation: Sequence["AblationDataModule"] = ()

    facts: ClassVar[tuple[str, ...]] = ()  # the options that run.json holds

    def __post_init__(self) -> None:
        """Refuses batches below 1 example."""
        super().__init__()
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}, expected at least 1 (--data.batch_size)")
        self.examples: dict[Purpose, Examples] = {}
        self.calibrated: set[str] | None = None  # hashes of the texts or images that calibrate

    @abstractmethod
    def load(self, purpose: Purpose) -> Examples:
        """Reads the examples for a purpose, the same on every rank, without those that :meth:`may_use` refuses.

        Raises:
            DataError: if there are fewer than asked.
        """

    def may_use(self, content: bytes, purpose: Purpose) -> bool:
        """Whether a text or image may serve a purpose. It may not be evaluated if it has calibrated."""
        key = hashlib.sha256(content).hexdigest()[:16]
        self.calibrated = set() if self.calibrated is None else self.calibrated
        if purpose == "calibration":
            self.calibrated.add(key)
        return purpose == "calibration" or key not in self.calibrated

    @property
    def module(self) -> Any:
        """The LightningModule of the Trainer, or None."""
        return getattr(self.trainer, "lightning_module", None)

    def describe(self) -> dict[str, Any]:
        """The facts about the data that run.json holds."""
        others = [one.describe() for one in self.evaluation]
        return {
            "class": f"{type(self).__module__}.{type(self).__qualname__}",
            "name": self.name,
            "batch_size": self.batch_size,
            **{name: getattr(self, name) for name in self.facts},
            **({"evaluation_of_others": others} if others else {}),
            **{
                purpose: {"examples": len(e), "clusters": len({*e.clusters}), "sha256": e.fingerprint()}
                for purpose, e in self.examples.items()
            },
        }

    def state_dict(self) -> dict[str, Any]:
        """The hashes of what calibrated."""
        return {"calibrated": sorted(self.calibrated or ())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes these hashes from a checkpoint."""
        self.calibrated = set(state_dict["calibrated"])

    def setup(self, stage: str) -> None:
        """For ``fit``, loads all examples, so that mistakes in the data show before the run begins."""
        for one in (self, *self.evaluation):
            one.examples = {}
        if stage == "fit":
            self.calibrated = None
            self.train_dataloader()
            self.val_dataloader()

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The calibration data, in the same order every epoch."""
        return self._loader("calibration")

    def val_dataloader(self) -> DataLoader[dict[str, Any]] | list[DataLoader[dict[str, Any]]]:
        """The evaluation data; with ``evaluation`` a list, which begins with the own ones."""
        own = self._loader("evaluation")
        for one in self.evaluation:
            one.trainer, one.calibrated = self.trainer, self.calibrated
        others = [one._loader("evaluation") for one in self.evaluation]
        return [own, *others] if others else own

    def _examples(self, purpose: Purpose) -> Examples:
        if purpose == "evaluation" and self.calibrated is None:
            self._examples("calibration")  # so `validate` without a checkpoint evaluates what `fit` would
        if purpose not in self.examples:
            self.examples[purpose] = self.load(purpose)
        if not len(self.examples[purpose]):
            raise DataError(f"{self.name} has no {purpose} examples")
        return self.examples[purpose]

    def _loader(self, purpose: Purpose) -> DataLoader[dict[str, Any]]:
        examples, trainer = self._examples(purpose), self.trainer
        rank, world_size = getattr(trainer, "global_rank", 0), getattr(trainer, "world_size", 1)
        sampler = ExactSampler(len(examples), self.batch_size, rank, world_size)
        workers: dict[str, Any] = {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0}
        return DataLoader(examples, batch_size=self.batch_size, sampler=sampler, **workers)
