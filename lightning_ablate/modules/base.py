"""The LightningModule that wraps a target."""

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Sized
from functools import partial
from typing import Any, cast

import lightning
import torch
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_ablate.calibration import Calibration
from lightning_ablate.errors import ConfigError, DataError
from lightning_ablate.learning import Learning
from lightning_ablate.methods.resample import donors_of
from lightning_ablate.metrics import Clean, Scored
from lightning_ablate.sharding import sharded
from lightning_ablate.sites import KINDS, Site, check_mixing, find_sites
from lightning_ablate.sweep import Sweep


class AblationModule(lightning.LightningModule, ABC):
    """Wraps a target and says how it is evaluated. Subclass it to study another kind of model.

    ``build_target`` and ``evaluate`` are all a subclass must give. The target is frozen and stays in eval mode;
    :class:`~lightning_ablate.AblationCallback` provides ``calibration``, ``learning`` and ``sweep``.

    Args:
        name: what results call the target.

    Attributes:
        target: the model under study, once it is built.
        learning: the values that are being learned.
        done: batches at the beginning of this epoch that an earlier run has done.
        pieces: in how many pieces a batch is run, because a whole one is too much for the memory.
        seconds: that the last forward pass took which was timed, of the first batch of an epoch.
        scored: positions and examples that this pass scored.
    """

    target: nn.Module
    calibration: Calibration | None = None
    learning: Learning | None = None
    sweep: Sweep | None = None
    done: int = 0
    pieces: int = 1
    seconds: float = 0.0
    scored: tuple[int, int] = (0, 0)

    def __init__(self, name: str | None = None) -> None:
        super().__init__()
        self.name = name or type(self).__name__
        # The target is no part of the checkpoint. DDP refuses to fit a module without a trainable parameter, and
        # Lightning counts the steps of an optimiser: this is a parameter whose gradient is always 0.
        self.strict_loading = False
        self.anchor = nn.Parameter(torch.zeros(1))

    @abstractmethod
    def build_target(self) -> nn.Module:
        """Makes the model under study. Called once per process, in Lightning's ``configure_model``."""

    @abstractmethod
    def evaluate(self, batch: Any) -> Scored:
        """Runs ``self.target`` on a batch, once.

        Args:
            batch: what the data loader gives, on the device.

        Returns:
            The logits ``(n, classes)``, targets ``(n,)`` and example indices ``(n,)`` of the scored positions; a
            position with an example index below 0 doesn't count.
        """

    def valid(self, batch: Any) -> Tensor | None:
        """Which positions enter the statistics: bool, broadcastable to ``(batch, seq)``; None for all of them.

        By default those of the examples that don't only fill a batch, where the batch says so by an ``index`` below 0.
        """
        if isinstance(batch, Mapping) and "index" in batch:
            return (batch["index"] >= 0).unsqueeze(1)
        return None

    def valid_at(self, site: Site, batch: Any) -> Tensor | None:
        """The same for one site, where a target's sites don't all see the same positions."""
        return self.valid(batch)

    def unrelated(self, kind: str, seed: int, batch: Any) -> Any:
        """One unrelated input in the form of ``batch``, with its sequence length and a batch size of 1.

        Args:
            kind: ``"characters"``, ``"ids"``, ``"generated"`` or ``"pixels"``.
            seed: of everything that is drawn.
            batch: whose form it takes, on the device.

        Raises:
            ConfigError: if this module has no such input.
        """
        raise ConfigError(
            f"the method resample-{kind} needs an unrelated input of the kind {kind!r}, which "
            f"{type(self).__name__} doesn't make; leave the method out, or override `unrelated`"
        )

    def donors(self, seed: int, batch: Any) -> Any:
        """A batch with another example of the evaluation data in the place of each, drawn from the seed.

        Args:
            seed: of the draw.
            batch: whose examples, on the device.

        Raises:
            ConfigError: if the data can't be read in any order, or don't say which example is which.
            DataError: if there is a single example.
        """
        loader: Any = self.trainer.val_dataloaders
        data = getattr(loader, "dataset", None)
        if not (isinstance(batch, Mapping) and "index" in batch and isinstance(data, Sized)):
            raise ConfigError(
                "resampling from other examples needs data that can be read in any order, whose batches are mappings "
                f"with an `index`, got a {type(batch).__name__} of a {type(data).__name__}; leave the method out"
            )
        if len(data) < 2:
            raise DataError("resampling from other examples needs more than 1 of them to be evaluated")
        drawn = donors_of(batch["index"].cpu(), seed, len(data)).tolist()
        examples = loader.collate_fn([cast(Any, data)[index] for index in drawn])
        if torch.as_tensor(examples["index"]).tolist() != drawn:
            raise ConfigError("resampling from other examples needs an `index` that is the example's place in the data")
        examples = self.on_before_batch_transfer(self.trainer.precision_plugin.convert_input(examples), 0)
        return self.trainer.strategy.batch_to_device(examples, self.device)

    def probes(self, batch: Any) -> tuple[Any, Any] | None:
        """Two inputs of one example that differ in one token or pixel, for the check that sites hold all mixing.

        None, the default, leaves the check out; a module that gives probes gives :meth:`hidden` as well.

        Args:
            batch: whose first example they are made from, on the device.
        """
        return None

    def hidden(self, batch: Any) -> Sequence[Tensor]:
        """The target's last hidden states (or per-position logits) on a batch, each ``(batch, ..., features)``."""
        raise NotImplementedError(f"{type(self).__name__} gives probes, but not what becomes of them: add `hidden`")

    def split(self, batch: Any, pieces: int) -> Sequence[Any]:
        """Cuts a batch into at most so many pieces, for when a whole one is too much for the memory.

        By default every tensor in it is cut along its first dimension, which must be the same for all of them.
        """
        sizes = _sizes(batch)
        if len(sizes) != 1:
            raise ConfigError(
                f"out of memory, and a batch whose tensors have the first dimensions {sorted(sizes)} can't be cut; "
                "lower the batch size, or override `split`"
            )
        count = min(pieces, sizes.pop())

        def piece(tensor: Tensor, number: int) -> Tensor:
            return tensor.tensor_split(count)[number]

        return [apply_to_collection(batch, Tensor, piece, number) for number in range(count)]

    def describe(self) -> dict[str, Any]:
        """What run.json says about the target."""
        parameters = list(self.target.parameters())
        return {
            "class": f"{type(self).__module__}.{type(self).__qualname__}",
            "name": self.name,
            "parameters": sum(p.numel() for p in parameters),
            "dtype": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})),
        }

    def configure_model(self) -> None:
        """Builds the target and freezes it; on sharded processes each takes its share."""
        if "target" not in self._modules:
            mesh = self.device_mesh
            if mesh is None:
                target = self.build_target()
            else:
                target = sharded(self.build_target, mesh["data_parallel"], self.trainer.strategy.root_device)
            self.target = target.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "AblationModule":
        """Changes the mode of everything but the target, which is never trained."""
        super().train(mode)
        if "target" in self._modules:
            self.target.eval()
        return self

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Gathers statistics from one batch; the loss is 0. Or learns from it, when all of them are gathered."""
        if self.calibration is None:
            raise ConfigError("fit needs an AblationCallback: Trainer(callbacks=[AblationCallback()])")
        nothing = 0.0 * self.anchor.sum()
        if batch_idx < self.done:
            return nothing
        if self.learning is not None:
            return nothing + self._learn(self.learning, batch, batch_idx)
        calibration = self.calibration

        def calibrate(piece: Any, read: set[Any]) -> None:
            if not calibration.sites:
                self._find_sites(calibration, piece)
            began = time.perf_counter()
            with calibration.collecting(lambda site: self.valid_at(site, piece), read):
                scored = self.evaluate(piece)
            if batch_idx == self.done:
                self._time(began, scored.example)

        with torch.no_grad():
            self._in_pieces(batch, calibrate)
        return nothing

    def _learn(self, learning: Learning, batch: Any, batch_idx: int) -> Tensor:
        held_out = learning.course.is_held_out(batch_idx)
        add = learning.check if held_out else learning.learn

        def run(piece: Any, done: set[Any]) -> None:
            add(lambda: self.evaluate(piece), self._indices(piece, batch_idx))

        self._in_pieces(batch, run)
        return self.anchor.new_zeros(()) if held_out else learning.surrogate()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes gradients of the values that are learned those of all processes, and logs their loss."""
        if self.learning is None:
            return
        loss = self.learning.before_step(self.summed, self.trainer.fit_loop.batch_idx)
        if loss is not None:
            for logger in self.loggers:
                logger.log_metrics({f"learning/{self.learning.method.name}": loss}, step=self.learning.taken)

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum over the processes."""
        return self.trainer.strategy.reduce(tensor.clone(), reduce_op="sum")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Evaluates every condition on one batch."""
        if self.sweep is None:
            raise ConfigError("validate needs an AblationCallback: Trainer(callbacks=[AblationCallback()])")
        if batch_idx < self.done:
            return
        sweep = self.sweep
        for kind, seed in sweep.unrelated:
            unrelated = self.unrelated(kind, seed, batch)  # outside, as it may run the target to generate it
            with sweep.reading(kind, seed):
                self.evaluate(unrelated)

        def evaluate(piece: Any, scored_before: set[int]) -> None:
            sweep.batch.examples = torch.tensor(self._indices(piece, batch_idx), device=self.device)
            for seed in sweep.donors:
                donors = self.donors(seed, piece)
                with sweep.reading_donors(seed, partial(self._valid_of, donors)):
                    self.evaluate(donors)
            clean, began = None, time.perf_counter()
            for index, condition in enumerate(sweep.conditions):
                if clean is not None and index in scored_before:
                    continue
                with sweep.applied(condition):
                    scored = self.evaluate(piece)
                if clean is None:
                    clean = Clean.of(_checked(scored))
                if index not in scored_before:
                    sweep.score(index, scored, clean)
                    scored_before.add(index)
                example = scored.example
                del scored  # or the next pass would hold the logits of two conditions
            sweep.check_finite()
            if batch_idx == self.done:
                self._time(began, example, len(sweep.conditions))

        self._in_pieces(batch, evaluate)

    def _in_pieces(self, batch: Any, run: Callable[[Any, set[Any]], None]) -> None:
        """Runs a batch, in pieces of half the size from where the memory is not enough for one.

        Args:
            batch: the batch.
            run: runs a piece, and notes what of it is done in the set it is given, so as not to do this again when it
                gets the halves of the piece.
        """
        todo: list[tuple[Any, set[Any]]] = [(batch, set())]
        if self.pieces > 1:
            todo = [(piece, set()) for piece in self.split(batch, self.pieces)]
        while todo:
            piece, done = todo[0]
            try:
                run(piece, done)
            except RuntimeError as error:
                if not (isinstance(error, torch.OutOfMemoryError) or is_oom_error(error)):
                    raise
                problem = error.with_traceback(None)  # which holds what filled the memory
            else:
                del todo[0]
                continue
            garbage_collection_cuda()
            todo = self._halved(todo, problem)

    def _halved(self, todo: Sequence[tuple[Any, set[Any]]], problem: RuntimeError) -> list[tuple[Any, set[Any]]]:
        halves = [(half, set(done)) for piece, done in todo for half in self.split(piece, 2)]
        if self.device_mesh is not None:
            raise ConfigError(
                f"out of memory on a sharded target, whose processes must run the same passes ({problem}); lower the "
                "batch size (--data.batch_size)"
            ) from problem
        if len(self.split(todo[0][0], 2)) < 2:
            raise ConfigError(
                f"out of memory with a single example ({problem}); use shorter examples, a lower precision, or a "
                "larger or several devices (--trainer.strategy sharded)"
            ) from problem
        self.pieces *= 2
        warnings.warn(
            f"out of memory: every batch is run in {self.pieces} pieces from here on, which can move figures in the "
            f"seventh digit ({problem})",
            stacklevel=2,
        )
        return halves

    def _valid_of(self, batch: Any, site: Site) -> Tensor | None:
        return self.valid_at(site, batch)

    def _indices(self, batch: Any, batch_idx: int) -> list[int]:
        """The examples of a batch by their indices where it tells them, else in the order in which they come."""
        if isinstance(batch, Mapping) and "index" in batch:
            return [int(index) for index in batch["index"].tolist()]
        size = min(_sizes(batch), default=1)
        first = (batch_idx * self.trainer.world_size + self.global_rank) * size
        return list(range(first, first + size))

    def _time(self, began: float, example: Tensor, passes: int = 1) -> None:
        self.seconds = (time.perf_counter() - began) / passes
        examples = example[example >= 0]
        self.scored = len(examples), len(torch.unique(examples))

    def _find_sites(self, calibration: Calibration, batch: Any) -> None:
        calibration.find(lambda: self.evaluate(batch))
        probes = self.probes(batch)
        if probes is not None and any("attention" in word for word in calibration.which if word in KINDS):
            attention = find_sites(self.target, lambda: self.evaluate(batch))  # all of it, whatever was chosen
            check_mixing(self.target, attention, lambda number: self.hidden(probes[number]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD, whose steps change nothing; values are learned by their method's optimiser."""
        return torch.optim.SGD([self.anchor], lr=0.0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves the target out."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if not name.startswith("target.")}


def _checked(scored: Scored) -> Scored:
    """Raises DataError unless there are logits ``(n, classes)``, and targets among the classes, for n positions."""
    logits, targets, example = scored
    if logits.ndim != 2 or targets.shape != logits.shape[:1] or example.shape != logits.shape[:1]:
        shapes = [tuple(tensor.shape) for tensor in scored]
        raise DataError(f"`evaluate` gave the shapes {shapes}, expected (n, classes), (n,) and (n,)")
    if len(targets) and not bool(((targets >= 0) & (targets < logits.shape[1])).all()):
        raise DataError(
            f"the labels run from {int(targets.min())} to {int(targets.max())}, expected targets from 0 to "
            f"{logits.shape[1] - 1}, the target's classes; do data and target belong together?"
        )
    return scored


def _sizes(batch: Any) -> set[int]:
    """The first dimensions of the tensors in a batch."""
    sizes: set[int] = set()
    apply_to_collection(batch, Tensor, lambda tensor: sizes.add(len(tensor)) if tensor.ndim else None)
    return sizes
