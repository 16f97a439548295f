"""The LightningModule that wraps a target."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, cast

import lightning
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_ablate.errors import ConfigError, DataError
from lightning_ablate.methods import others_of
from lightning_ablate.metrics import Scored
from lightning_ablate.modules.loaders import evaluation_loaders
from lightning_ablate.modules.phase import Phase
from lightning_ablate.sharding import sharded
from lightning_ablate.sites import Site


class AblationModule(lightning.LightningModule, ABC):
    """Wraps a target and says how it is evaluated. Subclass it to study another kind of model.

    A subclass must give ``build_target`` and ``evaluate``. The ``target`` is frozen and stays in eval mode.

    Metrics of one's own are named in ``metrics``, and ``evaluate`` returns their values as Scored's ``extra``.

    Args:
        name: what results call the target.
    """

    metrics: Sequence[str] = ()
    facts: ClassVar[tuple[str, ...]] = ()  # the options that run.json holds
    ahead: ClassVar[int] = 0  # places from a scored position to the token it is asked for
    target: nn.Module
    phase: Phase | None = None  # what the run does now; AblationCallback sets it
    loader_index: int = 0  # of the validation loader whose batches are run

    def __init__(self, name: str | None = None) -> None:
        super().__init__()
        self.name = name or type(self).__name__
        # the target is no part of the checkpoint
        self.strict_loading = False
        self.automatic_optimization = False
        # DDP refuses to fit a module without a trainable parameter
        self.anchor = nn.Parameter(torch.zeros(1))

    @abstractmethod
    def build_target(self) -> nn.Module:
        """Makes the model under study. Called once per process, in Lightning's ``configure_model``."""

    @abstractmethod
    def evaluate(self, batch: Any) -> Scored:
        """Runs ``self.target`` once on a batch of the data loader, which is on the device.

        Returns:
            The logits ``(n, classes)``, targets ``(n,)`` and example indices ``(n,)`` of the scored positions. A
            position with an example index below 0 doesn't count.
        """

    def valid(self, batch: Any) -> Tensor | None:
        """Which positions enter the statistics: bool, broadcastable to ``(batch, seq)``; None for all of them.

        By default all positions of the examples whose ``index`` in the batch, if it has one, is not below 0.
        """
        if isinstance(batch, Mapping) and "index" in batch:
            return (batch["index"] >= 0).unsqueeze(1)
        return None

    def valid_at(self, site: Site, batch: Any) -> Tensor | None:
        """The same for one site. Override it where the sites of a target see different positions."""
        return self.valid(batch)

    def position_at(self, site: Site, position: Tensor) -> Tensor | None:
        """The places at a site that predict at Scored's ``position``; None where it sees another sequence."""
        return position

    def shown(self, batch: Any) -> list[dict[str, Any]]:
        """What a person reads of an example: the texts of its ``tokens`` (None at padding), or a ``picture`` (PNG).

        Also the name of its class, ``label``; by default nothing.
        """
        return [{} for _ in self.examples_of(batch, 0)]

    def repeated(self, batch: Any) -> Any:
        """A batch of one random text that comes twice, by which heads show induction; None where there is none."""
        return None

    def class_texts(self, classes: Sequence[int]) -> list[str]:
        """What classes are called: by default their numbers."""
        return list(map(str, classes))

    def source(self, kind: str, seed: int, batch: Any) -> Any:
        """Another input, whose activations take the place of ablated neurons, in the form of ``batch`` on its device.

        ``example`` draws, for each example of the batch, another one of the same data. For other kinds (``characters``,
        ``ids``, ``generated``, ``pixels``, or what a method of one's own names) override this and return one input
        (batch size 1) as long as those of the batch. Draws depend on the seed alone.

        Raises:
            ConfigError: if this module has no such input, or the data can't be read by index.
            DataError: if there is a single example.
        """
        if kind != "example":
            raise ConfigError(
                f"resampling needs an input of the kind {kind!r}, which {type(self).__name__} doesn't make; leave the "
                "method out (--ablation.methods), or override `source`"
            )
        loader = self._loader
        data = getattr(loader, "dataset", None)
        if not (isinstance(batch, Mapping) and "index" in batch and isinstance(data, Sized)):
            raise ConfigError(
                "resampling from other examples needs data that can be read in any order, whose batches are mappings "
                f"with an `index`, got a {type(batch).__name__} of a {type(data).__name__}; leave the method out"
            )
        if len(data) < 2:
            raise DataError("resampling from other examples needs more than 1 of them to be evaluated")
        drawn = others_of(batch["index"].cpu(), seed, len(data)).tolist()
        examples = loader.collate_fn([cast(Any, data)[index] for index in drawn])
        if torch.as_tensor(examples["index"]).tolist() != drawn:
            raise ConfigError("resampling from other examples needs the `index` by which the data give an example")
        examples = self.on_before_batch_transfer(self.trainer.precision_plugin.convert_input(examples), 0)
        return self.trainer.strategy.batch_to_device(examples, self.device)

    def first(self, batch: Any, count: int) -> Any:
        """The first ``count`` examples of a batch as a batch, which repeats them where there are fewer.

        By default it takes these rows of every tensor, and of a mapping's lists, that has one row per example. Override
        it for batches of other forms, or return None to skip calibration's check that sites are batch first.
        """
        size = len(self.examples_of(batch, 0))
        rows = torch.arange(count, device=self.device) % size
        if isinstance(batch, Mapping):
            lists = {name: v for name, v in batch.items() if isinstance(v, list | tuple) and len(v) == size}
            batch = {**batch, **{name: [v[row] for row in rows.tolist()] for name, v in lists.items()}}
        return apply_to_collection(batch, Tensor, lambda t: t[rows] if t.ndim and len(t) == size else t)

    def probes(self, batch: Any) -> tuple[Any, Any] | None:
        """Two inputs that differ in one token or pixel.

        Calibration checks with them that positions exchange information only through the sites. The default, None,
        leaves this check out. A module that gives probes gives :meth:`hidden` as well.
        """
        return None

    def hidden(self, batch: Any) -> Sequence[Tensor]:
        """The target's last hidden states (or per-position logits) on a batch, each ``(batch, ..., features)``."""
        raise NotImplementedError(f"{type(self).__name__} gives probes, and lacks `hidden`, which they need: add it")

    def describe(self) -> dict[str, Any]:
        """The facts about the target that run.json holds."""
        parameters = list(self.target.parameters())
        return {
            "class": f"{type(self).__module__}.{type(self).__qualname__}",
            "name": self.name,
            "parameters": sum(p.numel() for p in parameters),
            "dtype": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})),
            **{name: getattr(self, name) for name in self.facts},
        }

    def save_processor(self, folder: Path) -> None:
        """Writes the target's tokenizer or image processor into the folder of a smaller target."""

    def configure_model(self) -> None:
        """Builds the target and freezes it; on sharded processes each takes its share."""
        if "target" not in self._modules:
            mesh = self.device_mesh
            if mesh is None:
                target = self.build_target()
            else:
                target = sharded(self.build_target, mesh["data_parallel"], self.trainer.strategy.root_device)
            self.target = target.requires_grad_(False).eval()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """An optimizer whose steps change nothing. Lightning counts them, and saves nothing without one."""
        return torch.optim.SGD([self.anchor], lr=0.0)

    def train(self, mode: bool = True) -> "AblationModule":
        """Changes the mode of everything but the target, which is never trained."""
        super().train(mode)
        if "target" in self._modules:
            self.target.eval()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> "AblationModule":
        """Casts and moves as any module does, but leaves an offloaded target to accelerate, and keeps vectors exact."""
        target = self._modules.get("target")
        if target is not None and any(parameter.is_meta for parameter in target.parameters()):
            return self
        with exact_vectors(target or nn.Module()):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Hands the batch to the phase."""
        self.loader_index = 0
        self._phase.step(batch, batch_idx)
        self.manual_backward(0.0 * self.anchor.sum())
        cast(Any, self.optimizers()).step()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Hands the batch to the phase, which may ask for the ``loader_index``."""
        self.loader_index = dataloader_idx
        self._phase.step(batch, batch_idx)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves the target out."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if not name.startswith("target.")}

    def examples_of(self, batch: Any, batch_idx: int) -> Tensor:
        """The indices of a batch's examples, ``(batch,)`` int64: its ``index``, or the order in which they come."""
        if isinstance(batch, Mapping) and "index" in batch:
            return torch.as_tensor(batch["index"], device=self.device)
        sizes: list[int] = []
        apply_to_collection(batch, Tensor, lambda tensor: sizes.append(len(tensor)) if tensor.ndim else None)
        size = min(sizes, default=1)
        whole = getattr(self._loader, "batch_size", None) or size  # the last batch may be smaller
        first = (batch_idx * self.trainer.world_size + self.global_rank) * whole
        return torch.arange(first, first + size, device=self.device)

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum over the processes."""
        return self.trainer.strategy.reduce(tensor.clone(), reduce_op="sum")

    def gathered(self, own: Any) -> list[Any]:
        """What each process gives, on all of them, in the order of the processes."""
        found = [own] * self.trainer.world_size
        if len(found) > 1:
            torch.distributed.all_gather_object(found, own)
        return found

    @property
    def is_last_batch(self) -> bool:
        """Whether this is the last batch of a validation, of all its loaders."""
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        loop = self.trainer.fit_loop.epoch_loop.val_loop if fitting else self.trainer.validate_loop
        return loop.batch_progress.is_last_batch

    def log_at(self, step: int, **values: float) -> None:
        """Hands values to every logger at a step of our own count."""
        for logger in self.loggers:
            logger.log_metrics(values, step=step)

    @property
    def _loader(self) -> Any:
        """The loader whose batches are run."""
        trainer = self.trainer
        return trainer.train_dataloader if trainer.training else evaluation_loaders(trainer)[self.loader_index]

    @property
    def _phase(self) -> Phase:
        if self.phase is None:
            raise ConfigError("fit and validate need an AblationCallback: Trainer(callbacks=[AblationCallback()])")
        return self.phase


@contextmanager
def exact_vectors(target: nn.Module) -> Iterator[None]:
    """Keeps RoPE's frequencies exact while the target is cast to a lower precision within the context.

    ``--trainer.precision bf16-true`` and ``.to(torch.bfloat16)`` cast all buffers; transformers, loading in bfloat16,
    keeps these, as a position times a rounded frequency is off by whole turns. They are vectors outside the state dict.
    """
    known = [m for m in target.modules() if type(m).__module__.startswith(("transformers", "timm"))]
    vectors = [(m, name, m._buffers[name]) for m in known for name in m._non_persistent_buffers_set]
    yield
    for module, name, exact in vectors:
        made = module._buffers[name]
        if exact is not None and made is not None and exact.ndim == 1 and made.dtype.itemsize < exact.dtype.itemsize:
            module._buffers[name] = exact.to(made.device)
