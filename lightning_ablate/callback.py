"""The Lightning callback that calibrates and sweeps."""

import sys
from collections.abc import Callable, Sequence, Sized
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import lightning
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch.profiler import profile, schedule
from torch.utils.data.distributed import DistributedSampler

from lightning_ablate import files, neurons, report
from lightning_ablate.calibration import Calibration
from lightning_ablate.comparisons import Comparison, Interval, compare, intervals
from lightning_ablate.comparisons import table as differences
from lightning_ablate.data.base import ExactSampler
from lightning_ablate.errors import ConfigError, DataError, StatisticsError, TargetError, loading
from lightning_ablate.journal import SWEEP, Journal, Place, is_unfinished
from lightning_ablate.learning import Course, Learning
from lightning_ablate.masks import NeuronChoice, RandomNeurons, Selection
from lightning_ablate.methods import AblationMethod, LearnedMethod, method_named
from lightning_ablate.modules import AblationModule
from lightning_ablate.neurons import Neurons
from lightning_ablate.plan import Plan
from lightning_ablate.results import Results
from lightning_ablate.sharding import check_strategy
from lightning_ablate.sites import fingerprint
from lightning_ablate.statistics import ActivationStatistic, LatticeHistogram, Moments
from lightning_ablate.sweep import Condition, Sweep, check_conditions, distinct_conditions

_PROFILED = 8  # conditions
_BACKWARD = 3  # what a pass back and forth costs, in forward passes
PAPER_FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
PAPER_SEEDS = (42, 123, 456)
CHECKPOINT, TRACE = "ablation.ckpt", "trace.json"
# gathered whatever the methods need: they describe the neurons, and name the site of a non-finite activation
ALWAYS: tuple[type[ActivationStatistic], ...] = (Moments, LatticeHistogram)


class AblationCallback(lightning.Callback):
    """Gathers statistics in the calibration epochs of ``fit``, and sweeps all conditions in the validation epoch.

    The number of epochs follows from the methods (one; two with ``peak``; more behind these for values that are
    learned), so the Trainer's ``max_epochs`` and ``check_val_every_n_epoch`` are set here. ``fit`` leaves the
    checkpoint ``ablation.ckpt`` in the run's folder before it sweeps; ``validate`` with it sweeps again.

    Args:
        methods: what replaces a neuron: names (``zero``, ``mean``, ``peak``, ``one-pass-peak``, ``mode``,
            ``half-sample-mode``, ``median``, ``positional-mean``, ``noise``, ``conditional``, ``conditional-per-head``,
            ``optimal``, ``conditional-optimal``, ``resample-same-position``, ``resample-any-position``,
            ``resample-characters``, ``resample-ids``, ``resample-generated``, ``resample-pixels``), instances, or class
            paths of subclasses of :class:`~lightning_ablate.methods.AblationMethod`.
        fractions: shares of each site's neurons, 0 to 1.
        seeds: of the choice of neurons, and of what a method draws.
        sites: ``attention`` (the default: of every layer), ``self-attention``, ``cross-attention``, ``mlp``, and
            shell-style patterns of module paths (``*.0.attn.c_proj``).
        choice: which neurons go, and in which portions; None takes single neurons at random.
        folder: where the run's files go; None takes the logger's folder. If a run with the same configuration died
            there, this one goes on from where it was.
        note_every: seconds from one note of the progress to the next.
        profile: writes a trace of the first conditions (torch.profiler) into the run's folder, ``trace.json``, which
            Perfetto and TensorBoard open.
        fold: folds what constant and conditional methods put in place into temporary weights of the projections
            behind the sites, so that their conditions cost no more than the bare target; figures move by rounding.
        compile: compiles the target (torch.compile) for the sweep; worth it where that is long, on a GPU above all.
        plan_only: ends after the first batch, with a line on what the whole run would amount to, and no results.

    Attributes:
        results: the figures, once the sweep has ended.
        comparisons: every two methods compared, with intervals, where the data tell how many examples they hold.
        plan: what the run amounts to, once the first batch has shown it.
        folder: where the run's files go, once it has begun; None in a ``fast_dev_run``.
    """

    def __init__(
        self,
        methods: Sequence[AblationMethod | str] = ("zero", "mean", "peak"),
        fractions: Sequence[float] = PAPER_FRACTIONS,
        seeds: Sequence[int] = PAPER_SEEDS,
        sites: Sequence[str] | str = "attention",
        choice: NeuronChoice | None = None,
        folder: str | Path | None = None,
        note_every: float = 60.0,
        profile: bool = False,
        fold: bool = False,
        compile: bool = False,
        plan_only: bool = False,
    ) -> None:
        self.methods = [method_named(method) if isinstance(method, str) else method for method in methods]
        self.fractions, self.seeds = tuple(fractions), tuple(seeds)
        self.sites = (sites,) if isinstance(sites, str) else tuple(sites)
        self.choice = choice or RandomNeurons()
        check_conditions(self.methods, self.fractions, self.seeds)
        self.results: Results | None = None
        self.comparisons: list[Comparison] = []
        self.plan: Plan | None = None
        self.folder: Path | None = None
        if fold and compile:
            raise ConfigError("fold and compile are both on, expected one of them: what is compiled keeps its weights")
        self.profile, self.fold, self.compile, self.plan_only = profile, fold, compile, plan_only
        self._around = ExitStack()
        self._wanted, self._note_every = folder, note_every
        self._journal: Journal | None = None
        self._place: Place | None = None
        self._noted: dict[str, Any] = {}
        self._target = self._shown = ""
        self._saved: dict[str, Any] = {}
        self._courses: list[tuple[LearnedMethod, Course, int]] = []
        self._before: tuple[Any, int] = [], 1
        self._held_out: dict[str, tuple[float, float] | None] = {}
        self._partial: list[str] = []
        self._paths: list[Path] = []

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Sets the number of epochs, before anything is loaded.

        Raises:
            ConfigError: if the module or the Trainer's limits don't fit.
        """
        if not isinstance(pl_module, AblationModule):
            raise ConfigError(f"AblationCallback needs an AblationModule, got a {type(pl_module).__name__}")
        check_strategy(trainer.strategy)
        trainer.num_sanity_val_steps = 0
        given = None if _fast(trainer) or self.plan_only else self._wanted or trainer.log_dir
        folder = None
        if given is not None and trainer.is_global_zero:
            folder = Path(given) if is_unfinished(Path(given)) else report.fresh_folder(Path(given))
        self.folder = trainer.strategy.broadcast(folder)
        if stage == TrainerFn.FITTING:
            _plan_epochs(trainer, self._epochs + len(self._learned))
            if self.plan_only:
                trainer.check_val_every_n_epoch = sys.maxsize

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: AblationModule) -> None:  # type: ignore[override]
        """Begins with the target, which is on its device by now; the first batch shows its sites."""
        self._begin(trainer, pl_module)
        self._go_on(trainer, pl_module)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Refuses a loader that repeats examples."""
        _check_counts_once(trainer, trainer.train_dataloader)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: AblationModule) -> None:  # type: ignore[override]
        """Makes the statistics of this epoch, or what is learned in it, unless an earlier run did."""
        epoch, calibration = trainer.current_epoch, _calibration(pl_module)
        pl_module.done = self._done(epoch)
        if self._place is not None and epoch < self._place.part:
            return
        if epoch < self._epochs:
            calibration.start(epoch, anew=not pl_module.done)
            return
        method, course, number = self._courses[epoch - self._epochs]
        if pl_module.learning is None:
            pl_module.learning = Learning(method, calibration, self.choice)
            self._before = trainer.optimizers, trainer.accumulate_grad_batches
            # whose gradient is always there: a GradScaler wants one in every step
            pl_module.learning.optimizer.add_param_group({"params": [pl_module.anchor]})
            trainer.optimizers = [pl_module.learning.optimizer]
            trainer.accumulate_grad_batches = course.accumulated
        pl_module.learning.start(number, course)
        if "learning" in self._noted:
            pl_module.learning.load_state_dict(self._noted.pop("learning"))

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: AblationModule, *_: Any) -> None:  # type: ignore[override]
        """Refuses a choice that the sites don't allow, at the first batch, which showed them; notes the progress."""
        calibration, batch = _calibration(pl_module), trainer.fit_loop.batch_idx
        if batch == 0 and calibration.sites:
            selections = self._selections(calibration)
            if self.plan is None and not pl_module.done:
                self._say_plan(trainer, pl_module, distinct_conditions(self.methods, selections, self.seeds))
        stepped = trainer.is_last_batch or (batch + 1) % trainer.accumulate_grad_batches == 0
        if batch >= pl_module.done and stepped:
            place, learning = Place(trainer.current_epoch, batch + 1), pl_module.learning
            state = {} if learning is None else {"learning": learning.state_dict(), "held_out": self._held_out}
            self._note(trainer, pl_module, place, lambda: {"statistics": calibration.state_dict(), **state})

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: AblationModule) -> None:  # type: ignore[override]
        """Merges the ranks; the last epoch's are merged by the validation epoch, which runs before this."""
        self._finish(trainer, pl_module)
        if trainer.current_epoch == self._epochs - 1 and self._learned:
            batches = trainer.fit_loop.batch_idx + 1
            self._courses = self._learning(trainer, batches)
            _plan_epochs(trainer, self._epochs + len(self._courses))

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: AblationModule) -> None:  # type: ignore[override]
        """Completes the statistics, or takes them from the checkpoint, and prepares the sweep.

        Raises:
            TargetError: if the checkpoint is of another target, or damaged.
            StatisticsError: if a method's statistics are missing.
        """
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self._note_partial("calibration", trainer.fit_loop.batch_idx + 1, trainer.train_dataloader)
        if fitting and not self._sweeps_on:
            self._finish(trainer, pl_module)
            statistics = _calibration(pl_module).state_dict()
            about = {"target": self._target, "name": pl_module.name, "held_out": self._held_out}
            self._saved = {**about, "statistics": statistics}
            if self.folder is not None:
                trainer.save_checkpoint(self.folder / CHECKPOINT, weights_only=False)
                if trainer.is_global_zero:
                    files.seal(self.folder / CHECKPOINT)
                self._write_neurons(trainer, pl_module)
        elif not fitting:
            if trainer.ckpt_path:
                files.check(Path(trainer.ckpt_path), TargetError)
            self._begin(trainer, pl_module)
            self._restore(_calibration(pl_module))
            self._go_on(trainer, pl_module)
        _check_counts_once(trainer, trainer.val_dataloaders)
        calibration = _calibration(pl_module)
        conditions = distinct_conditions(self.methods, self._selections(calibration), self.seeds)
        planned = conditions[:1] if self.plan_only else conditions
        pl_module.sweep = Sweep(calibration, self.methods, planned, self.choice, _examples(trainer), self.fold)
        pl_module.sweep.prepare()
        if self.compile:
            self._around.enter_context(pl_module.sweep.compiled())
        if self.profile and self.folder is not None and trainer.is_global_zero:
            pl_module.sweep.passed = self._around.enter_context(_profiler(self.folder / TRACE)).step
        pl_module.done = self._done(SWEEP)
        if self._sweeps_on:
            pl_module.sweep.load_state_dict(self._noted["sweep"])
            self._noted = {}

    def on_validation_batch_end(  # type: ignore[override]
        self, trainer: lightning.Trainer, pl_module: AblationModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Notes the progress."""
        sweep = pl_module.sweep
        if sweep is None:
            return
        if self.plan is None and batch_idx == 0 and not pl_module.done:
            selections = self._selections(_calibration(pl_module))
            self._say_plan(trainer, pl_module, distinct_conditions(self.methods, selections, self.seeds))
        if batch_idx >= pl_module.done:
            self._note(trainer, pl_module, Place(SWEEP, batch_idx + 1), lambda: {"sweep": sweep.state_dict()})

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: AblationModule) -> None:  # type: ignore[override]
        """Computes the results on every rank, and writes them on the first."""
        self._around.close()
        if pl_module.sweep is None or self.plan_only:
            return
        figures = pl_module.sweep.figures()
        if not int(figures["n"][0]):
            raise DataError("the evaluation data have no scored position; is everything padding, or too short?")
        self.comparisons, known = [], list[Interval]()
        if (by_example := pl_module.sweep.by_example()) is not None:
            positions, sums = by_example
            arrays = {name: values.numpy() for name, values in sums.items()}
            self.comparisons = compare(pl_module.sweep.conditions, positions.numpy(), arrays)
            known = intervals(pl_module.sweep.conditions, positions.numpy(), arrays)
        self._note_partial("evaluation", trainer.num_val_batches[0], trainer.val_dataloaders)
        self.results = Results.of(
            pl_module.sweep.conditions,
            figures,
            model=pl_module.name,
            data=_data_name(trainer),
            classes=pl_module.sweep.classes,
            partial=self._partial,
            intervals=known,
        )
        self._write(trainer, pl_module, self.results)
        if self._journal is not None and trainer.is_global_zero:
            self._journal.close()

    def on_exception(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: Any) -> None:
        """Leaves no hook behind, and the Trainer as it was."""
        self._around.close()
        if isinstance(pl_module, AblationModule) and pl_module.learning is not None:
            trainer.optimizers, trainer.accumulate_grad_batches = self._before
            pl_module.learning = None

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Says so if there was no sweep.

        Raises:
            ConfigError: if limits, or missing data, kept ``fit`` from it.
        """
        if self.results is None and not self.plan_only:
            raise ConfigError(
                "fit ended before the sweep, so there are no results: is a limit on batches or time in the way, is "
                "there no evaluation data, or was it given the checkpoint of a finished run?"
            )

    def state_dict(self) -> dict[str, Any]:
        """What the methods need, and what it was gathered on."""
        return self._saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it from a checkpoint; whether it fits is checked before it is used."""
        self._saved = state_dict

    def teardown(self, trainer: lightning.Trainer, pl_module: AblationModule, stage: str) -> None:  # type: ignore[override]
        """Shows the table behind everything else, and lets the sweep go, which holds tensors on the device."""
        if self._shown:
            print(self._shown, flush=True)
        self._shown = ""
        pl_module.sweep = pl_module.learning = None

    def _finish(self, trainer: lightning.Trainer, module: AblationModule) -> None:
        """Merges what the ranks gathered or learned in an epoch."""
        learning = module.learning
        if learning is None:
            _calibration(module).finish()
            return
        learning.finish_epoch(module.summed)
        name, found = learning.method.name, learning.held_out
        if found is not None:
            held_out = dict(zip((f"learning/{name} held out, mean", f"learning/{name} held out"), found, strict=True))
            for logger in trainer.loggers:
                logger.log_metrics(held_out, step=learning.taken)
        if learning.epoch < learning.course.epochs - 1:
            return
        if found is not None and found[1] > found[0]:
            rank_zero_warn(
                f"{name}: what was learned is worse than the mean on examples held out, {found[1]:.4f} nats against "
                f"{found[0]:.4f}; give it more steps, more calibration data or a lower lr"
            )
        learning.finish()
        self._held_out[name] = found
        module.learning = None
        trainer.optimizers, trainer.accumulate_grad_batches = self._before

    @property
    def _learned(self) -> list[LearnedMethod]:
        return [method for method in self.methods if isinstance(method, LearnedMethod)]

    def _learning(self, trainer: lightning.Trainer, batches: int) -> list[tuple[LearnedMethod, Course, int]]:
        """Of each epoch behind the calibration the method that learns, how, and the epoch's number for it."""
        batch_size = getattr(trainer.train_dataloader, "batch_size", None) or 1
        found = []
        for method in self._learned:
            course = Course.of(
                steps=1 if _fast(trainer) else method.steps,
                examples=method.examples,
                batch_size=batch_size * trainer.world_size,
                batches=batches,
                accumulated=trainer.accumulate_grad_batches,
            )
            found += [(method, course, number) for number in range(course.epochs)]
        return found

    def _selections(self, calibration: Calibration) -> list[Selection]:
        return self.choice.selections(calibration.sites, sorted(map(float, self.fractions)), self.seeds)

    def _kinds(self) -> list[type[ActivationStatistic]]:
        return [*ALWAYS, *self.choice.statistics, *(kind for method in self.methods for kind in method.statistics)]

    @property
    def _epochs(self) -> int:
        """How many epochs the calibration takes."""
        return max(kind.epoch() + 1 for kind in self._kinds())

    def _say_plan(self, trainer: lightning.Trainer, module: AblationModule, conditions: Sequence[Condition]) -> None:
        """Says what the run amounts to, and ends it if that was all that was asked."""
        calibrating = trainer.state.fn == TrainerFn.FITTING
        if calibrating:
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
        kinds = {method.name: method.unrelated for method in self.methods if method.unrelated}
        kinds |= {method.name: "donors" for method in self.methods if method.donors}
        resampled = {(kinds[c.method], c.seed) for c in conditions if c.method in kinds}
        passes = sum(trainer.num_val_batches) * (len(conditions) + len(resampled))
        if calibrating:
            batches = trainer.num_training_batches
            learning = len(self._learning(trainer, int(batches))) if batches < float("inf") else 0
            passes += (self._epochs + _BACKWARD * learning) * batches
        positions, examples = module.scored
        data = getattr(trainer.val_dataloaders, "dataset", None)
        self.plan = Plan(
            conditions=len(conditions),
            passes=int(passes) if passes < float("inf") else None,
            positions=round(positions / max(1, examples) * len(data)) if isinstance(data, Sized) else None,
            statistics=_calibration(module).bytes,
            seconds=module.seconds,
        )
        trainer.print(self.plan)
        if self.plan_only:
            trainer.fit_loop.epoch_loop.max_steps = 1
            module.done = sys.maxsize

    def _begin(self, trainer: lightning.Trainer, module: AblationModule) -> None:
        self.results, self.plan, self._partial, self._held_out = None, None, [], {}
        module.pieces, module.learning = 1, None
        module.configure_model()
        self._target = fingerprint(module.target)
        module.calibration = Calibration(module.target, self._kinds(), self.sites, module.device)

    def _go_on(self, trainer: lightning.Trainer, module: AblationModule) -> None:
        """Takes up what an earlier run in this folder noted.

        Raises:
            ConfigError: if that run had another configuration.
        """
        self._journal, self._place, self._noted = None, None, {}
        if self.folder is None:
            return
        self._journal = Journal(self.folder, trainer.global_rank, trainer.world_size, self._note_every)
        problem = ""
        if trainer.is_global_zero:
            problem = self._journal.check(self._plan(trainer, module))
            self._place = None if problem else self._journal.latest()
        problem, self._place = trainer.strategy.broadcast((problem, self._place))
        if problem:
            raise ConfigError(problem)
        if self._place is None:
            return
        self._noted = self._journal.read(self._place)
        module.pieces = self._noted.pop("pieces")
        calibration = _calibration(module)
        if self._place.part < SWEEP:
            calibration.load_state_dict(self._noted.pop("statistics"))
            self._held_out = self._noted.pop("held_out", {})
        elif trainer.state.fn == TrainerFn.FITTING:
            self._saved = files.load(self.folder / CHECKPOINT, StatisticsError)["callbacks"][self.state_key]
            self._restore(calibration)
            self._paths = [self.folder / name for name in neurons.FILES]

    @property
    def _sweeps_on(self) -> bool:
        """Whether the calibration was complete in an earlier run."""
        return self._place is not None and self._place.part == SWEEP

    def _done(self, part: int) -> int:
        """The batches of a part that an earlier run has done."""
        if self._place is None or part > self._place.part:
            return 0
        return self._place.batches if part == self._place.part else sys.maxsize

    def _note(
        self, trainer: lightning.Trainer, module: AblationModule, place: Place, state: Callable[[], dict[str, Any]]
    ) -> None:
        if self._journal is None:
            return
        due = self._journal.due or trainer.received_sigterm
        if trainer.world_size > 1:  # all of them, or none
            due = trainer.strategy.broadcast(due)
        if due:
            self._journal.note(place, {"pieces": module.pieces, **state()})

    def _plan(self, trainer: lightning.Trainer, module: AblationModule) -> dict[str, Any]:
        """What a run must have in common with an earlier one to go on with it."""
        return {
            "command": str(trainer.state.fn),
            "target": {**module.describe(), "sha256": self._target},
            "data": _data_facts(trainer),
            "batch_size": getattr(getattr(trainer, "datamodule", None), "batch_size", None),
            "methods": [[method.name, {**vars(method)}] for method in self.methods],
            "fractions": self.fractions,
            "seeds": self.seeds,
            "sites": self.sites,
            "choice": {"class": type(self.choice).__name__, **vars(self.choice)},
            "precision": str(trainer.precision),
            "processes": trainer.world_size,
            "fold": self.fold,
            "compile": self.compile,
            "accumulate": trainer.accumulate_grad_batches,
            "limits": [trainer.limit_train_batches, trainer.limit_val_batches],
        }

    def _restore(self, calibration: Calibration) -> None:
        if not self._saved:
            raise StatisticsError(
                "validate needs the statistics of a calibration: name the checkpoint that `fit` left "
                "(--ckpt_path), or run `fit`"
            )
        with loading("what calibrated", TargetError):
            if self._saved["target"] != self._target:
                raise TargetError(
                    f"the checkpoint is of another target: {self._saved['name']!r:.60} with the weights "
                    f"{self._saved['target']!s:.12}, here are {self._target[:12]}; run `fit` on this one"
                )
            calibration.load_state_dict(self._saved["statistics"])
            self._held_out = self._saved["held_out"]

    def _note_partial(self, what: str, seen: float, loader: Any) -> None:
        try:
            whole = len(loader)
        except TypeError:  # a loader without a length
            return
        if seen < whole:
            self._partial.append(f"{what} was cut to {seen} of {whole} batches")

    @rank_zero_only
    def _write_neurons(self, trainer: lightning.Trainer, module: AblationModule) -> None:
        found = Neurons.of(_calibration(module))
        about = {"model": module.name, "target": self._target, "data": _data_name(trainer)}
        self._paths = neurons.save(found, cast(Path, self.folder), about)
        for logger in _tensorboards(trainer):
            neurons.tensorboard(found, logger.experiment)

    @rank_zero_only
    def _write(self, trainer: lightning.Trainer, module: AblationModule, results: Results) -> None:
        paths, notes = [], []
        if self.folder is not None:
            paths = report.save(results, self.folder, self._facts(trainer, module), self.comparisons)
            if trainer.state.fn == TrainerFn.FITTING:
                paths += [*self._paths, self.folder / CHECKPOINT]
            if self.profile:
                paths.append(self.folder / TRACE)
            for logger in _tensorboards(trainer):
                paths += report.tensorboard(results, self.folder)
                logger.experiment.add_figure(report.figure_name(results), report.figure(results))
                notes = ["", f"TensorBoard: tensorboard --logdir {logger.root_dir}"]
        tables = filter(None, (results.table(), differences(self.comparisons)))
        self._shown = "\n".join(["", "\n\n".join(tables), "", *map(str, paths), *notes])

    def _facts(self, trainer: lightning.Trainer, module: AblationModule) -> dict[str, Any]:
        calibration = _calibration(module)
        return {
            "target": {**module.describe(), "sha256": self._target},
            "data": _data_facts(trainer),
            "methods": [method.name for method in self.methods],
            "fractions": self.fractions,
            "seeds": self.seeds,
            "choice": {"class": type(self.choice).__name__, **vars(self.choice)},
            "sites": [asdict(site) for site in calibration.sites],
            "precision": str(trainer.precision),
            "accelerator": type(trainer.accelerator).__name__,
            "processes": trainer.world_size,
            "pieces_of_a_batch": module.pieces,
            "folded": self.fold,
            "compiled": self.compile,
            "held_out": self._held_out,
        }


def _calibration(module: AblationModule) -> Calibration:
    if module.calibration is None:
        raise StatisticsError("the calibration has not begun: the target's sites are found when `fit` starts")
    return module.calibration


def _plan_epochs(trainer: lightning.Trainer, epochs: int) -> None:
    if trainer.max_steps != -1 and not _fast(trainer):
        raise ConfigError(f"max_steps is {trainer.max_steps}; shorten the calibration with limit_train_batches instead")
    if type(trainer.val_check_interval) is int or trainer.val_check_interval not in (None, 1.0):
        raise ConfigError(
            f"val_check_interval is {trainer.val_check_interval!r}, expected 1.0: calibration comes first"
        )
    trainer.fit_loop.epoch_loop.max_steps = -1
    trainer.fit_loop.max_epochs = epochs
    trainer.check_val_every_n_epoch = epochs


def _profiler(path: Path) -> profile:
    """Records the conditions behind the first, which warms up, and writes the trace."""
    path.parent.mkdir(parents=True, exist_ok=True)
    steps = schedule(wait=0, warmup=1, active=_PROFILED, repeat=1)
    return profile(schedule=steps, on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)))


def _tensorboards(trainer: lightning.Trainer) -> list[TensorBoardLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _fast(trainer: lightning.Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False))


def _check_counts_once(trainer: lightning.Trainer, loader: Any) -> None:
    sampler = getattr(loader, "sampler", None)
    if trainer.world_size == 1 or not isinstance(sampler, DistributedSampler) or isinstance(sampler, ExactSampler):
        return
    examples = len(cast(Sized, sampler.dataset))
    if sampler.total_size != examples:
        raise ConfigError(
            f"{examples} examples don't divide by {trainer.world_size} processes, so Lightning's sampler would repeat "
            "some; use a lightning_ablate.data.AblationDataModule, or drop the remainder"
        )


def _examples(trainer: lightning.Trainer) -> int:
    """How many examples are evaluated, by their indices; 0 where the loader doesn't tell."""
    data = getattr(trainer.val_dataloaders, "dataset", None)
    return len(data) if isinstance(data, Sized) else 0


def _data_name(trainer: lightning.Trainer) -> str:
    data = getattr(trainer, "datamodule", None)
    return "data" if data is None else getattr(data, "name", None) or type(data).__name__


def _data_facts(trainer: lightning.Trainer) -> dict[str, Any]:
    describe = getattr(getattr(trainer, "datamodule", None), "describe", None)
    return describe() if describe is not None else {"name": _data_name(trainer)}
