"""The Lightning callback that runs the phases: calibration, learning, sweep."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import lightning
import pandas as pd
from lightning.pytorch.trainer.states import TrainerFn

from lightning_ablate import phases
from lightning_ablate import trainer as trainers
from lightning_ablate.attribution import Attributing, table_of
from lightning_ablate.calibration import Calibration, check_target, digest, fingerprint, saved_state
from lightning_ablate.choices import Choice, choice_of
from lightning_ablate.conditions import Condition, check_conditions, distinct_conditions, listed
from lightning_ablate.errors import ConfigError
from lightning_ablate.export import chosen, export
from lightning_ablate.methods import AblationMethod, LearnedMethod, method_of
from lightning_ablate.modules import AblationModule
from lightning_ablate.modules.base import evaluation_loaders
from lightning_ablate.progress import say
from lightning_ablate.report import named_scores, report_attribution, report_neurons, report_results, tabulated
from lightning_ablate.results import Results
from lightning_ablate.statistics import ActivationStatistic, Moments, with_needs
from lightning_ablate.trainer import CHECKPOINT

PAPER_FRACTIONS, PAPER_SEEDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0), (42, 123, 456)


class AblationCallback(lightning.Callback):
    """Runs the phases of an evaluation: calibration and learning in the epochs of ``fit``, the sweep in validation.

    The number of epochs follows from the methods (one, two where they need a histogram, more where they learn), so the
    Trainer's ``max_epochs`` and ``check_val_every_n_epoch`` are set here. ``fit`` leaves the checkpoint
    ``ablation.ckpt`` in the run's folder before it sweeps; ``validate`` with it sweeps again.

    Args:
        methods: what replaces a neuron: names (``zero``, ``mean``, ``peak``, ``mode``, ``half-sample-mode``,
            ``median``, ``positional-mean``, ``noise``, ``conditional-mean``, ``conditional-mean-per-head``,
            ``conditional-sequential``, ``conditional-tuned``, ``optimal``, ``conditional-optimal``,
            ``resample-same-position``, ``resample-any-position``, ``resample-characters``, ``resample-ids``,
            ``resample-generated``, ``resample-pixels``, ``resample-partner``), instances, or class paths of subclasses
            of AblationMethod.
        fractions: shares of each site's units that are asked for, 0 to 1; results say what share of neurons went.
        seeds: of the choice of neurons, and of what a method draws.
        sites: ``attention`` (the default: of every layer), ``self-attention``, ``cross-attention``, ``mlp``, and
            shell-style patterns of module paths (``*.0.attn.c_proj``).
        neurons: which of them go, and in which portions: ``Random`` (the default), ``Ranked``, ``EachHead``,
            ``EachLayer``, ``Only``, or a class path of a subclass of Choice.
        dirpath: the folder for the run's files; None takes the logger's. If a run with the same configuration died
            there, this one goes on from where it was.
        save_every: seconds from one save of an unfinished sweep to the next.
        attribute: in ``fit``, under which methods the effect of every neuron, head and site alone is estimated, see
            :class:`~lightning_ablate.phases.AttributionPhase`.
        verify: how many of the largest estimates, and as many others, are measured, of neurons and of heads.
        draws: backward passes for the second order of an attribution.
        attribution_examples: how many calibration examples are attributed; None takes all.
        attribute_metric: the module's own metric whose loss is attributed; None takes what the cross-entropy gains.
        figures: the forms in which figures are saved: ``png``, ``pdf``, ``svg``.

    Attributes:
        results: the table of all conditions, once the sweep has ended.
        run: what the run has found out, and how far it has come; its ``calibration`` holds the statistics.
        folder: where the run's files go, once it has begun; None in a ``fast_dev_run``.
    """

    def __init__(
        self,
        methods: Sequence[AblationMethod | str] | str = ("zero", "mean", "peak"),
        fractions: Sequence[float] | float = PAPER_FRACTIONS,
        seeds: Sequence[int] | int = PAPER_SEEDS,
        sites: Sequence[str] | str = "attention",
        neurons: Choice | None = None,
        dirpath: str | Path | None = None,
        save_every: float = 60.0,
        attribute: Sequence[AblationMethod | str] | str = (),
        verify: int = 0,
        draws: int = 8,
        attribution_examples: int | None = None,
        attribute_metric: str | None = None,
        figures: Sequence[Literal["png", "pdf", "svg"]] = ("png",),
    ) -> None:
        self.methods = [method_of(method) for method in listed(methods)]
        self.fractions, self.seeds, self.sites = listed(fractions), listed(seeds), listed(sites)
        self.neurons, self.dirpath = choice_of(neurons), dirpath
        self.save_every, self.figures = save_every, listed(figures)
        attributed = tuple(method_of(method, "--ablation.attribute") for method in listed(attribute))
        seed = next(iter(self.seeds), 0)
        self.attributing = Attributing(attributed, draws, verify, attribution_examples, seed, attribute_metric)
        check_conditions(self.methods, self.fractions, self.seeds, self.sites)
        self.results: Results | None = None
        self.folder: Path | None = None
        self._loaded: dict[str, Any] = {}  # the state in a checkpoint
        self._earlier: dict[str, Any] = {}  # that of the phase in which an earlier run died
        self._unfinished: phases.Unfinished | None = None
        self._epochs, self._told = list[phases.Epoch](), ""

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Refuses, before anything is loaded, what doesn't fit; and takes the folder."""
        if not isinstance(pl_module, AblationModule):
            raise ConfigError(f"AblationCallback needs an AblationModule, got a {type(pl_module).__name__}")
        trainers.check_trainer(trainer)
        self.folder = trainers.folder_of(trainer, self.dirpath)
        if stage == TrainerFn.FITTING:
            learned = [method.name for method in self.methods if isinstance(method, LearnedMethod)]
            self.attributing.check(self.neurons, learned, pl_module.metrics)
            trainers.run_epochs(trainer, None)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: AblationModule) -> None:  # type: ignore[override]
        """Begins, now that the target is on its device and the data are there; sets the number of epochs."""
        for stopping in trainer.early_stopping_callbacks:  # which look before the sweep has given their metrics
            stopping.strict = False
        size = trainers.calibration_size(trainer)
        trainers.warn_if_shared(trainer)
        self._begin(trainer, pl_module)
        options = self._kinds, self.methods, self.neurons, self.attributing, self._conditions
        self._epochs = phases.schedule(*options, **size)
        trainers.run_epochs(trainer, max(1, len(self._epochs) - self.run.epochs))

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: AblationModule) -> None:  # type: ignore[override]
        """Gives the module the phase of this epoch."""
        if self.run.epochs == len(self._epochs):
            pl_module.phase = phases.Done(pl_module)
            return
        epoch = self._epochs[self.run.epochs]
        if epoch.number == 0 or pl_module.phase is None:
            pl_module.phase = self._taken_up(epoch.make(pl_module, self.run))
        pl_module.phase.begin_epoch(epoch.number)

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: AblationModule, *_: Any) -> None:  # type: ignore[override]
        """Says what the run amounts to, at its first batch; and ends the epoch behind the last one."""
        phase, run, seen = pl_module.phase, self.run, trainer.fit_loop.batch_idx + 1
        if isinstance(phase, phases.CalibrationPhase) and seen == 1 and not run.epochs:
            batches = float(trainer.num_training_batches), float(sum(trainer.num_val_batches))
            say(trainer, phases.plan(self._epochs, self._conditions(), self.methods, phase, batches))
        if not trainer.is_last_batch or phase is None or isinstance(phase, phases.Done):
            return
        phase.end_epoch()
        last = self._epochs[run.epochs].number == phase.epochs - 1
        if last and isinstance(phase, phases.CalibrationPhase):
            run.partial += trainers.cut_short("calibration", [seen], [trainer.train_dataloader])
            report_neurons(trainer, run.calibration, pl_module.name, self.folder, self.figures)
            run.calibration.reduce()
        elif isinstance(phase, phases.VerificationPhase if self.attributing.verify else phases.AttributionPhase):
            report_attribution(trainer, self.attribution, self.folder, self.figures)
        run.epochs += 1
        if self._unfinished is not None:
            self._unfinished.save({**run.state_dict(), "phase": {} if last else phase.state_dict()})

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: AblationModule) -> None:  # type: ignore[override]
        """Leaves the checkpoint, or takes the calibration from one, and begins the sweep."""
        if trainer.state.fn != TrainerFn.FITTING:
            self._begin(trainer, pl_module)
        elif self.folder is not None and not self._earlier:
            trainer.save_checkpoint(self.folder / CHECKPOINT, weights_only=False)
        examples = [trainers.example_count(trainer, loader) for loader in evaluation_loaders(trainer)]
        options = self.run.calibration, self.methods, self._conditions(), self.neurons
        pl_module.phase = self._taken_up(phases.SweepPhase(pl_module, *options, examples))

    def on_validation_batch_end(self, trainer: lightning.Trainer, pl_module: AblationModule, *_: Any) -> None:  # type: ignore[override]
        """Saves the progress now and then."""
        if self._unfinished and trainer.strategy.broadcast(self._unfinished.due or trainer.received_sigterm):
            self._unfinished.save({"phase": cast(phases.SweepPhase, pl_module.phase).state_dict()})

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: AblationModule) -> None:  # type: ignore[override]
        """Computes the results on every rank, and writes them on the first."""
        phase = cast(phases.SweepPhase, pl_module.phase)
        phase.end_epoch()
        facts = trainers.run_facts(trainer, pl_module, self, self.run.target) | self.run.facts(phase.classes)
        facts["partial"] += trainers.cut_short("evaluation", trainer.num_val_batches, evaluation_loaders(trainer))
        scored = dict(zip(trainers.data_names(trainer), phase.each, strict=True))
        data = [getattr(loader, "dataset", None) for loader in evaluation_loaders(trainer)]
        clusters = [getattr(one, "clusters", None) for one in data]
        self.results = tabulated(phase.ablated, scored, clusters, pl_module.name, facts)
        pl_module.log_dict(named_scores(self.results), add_dataloader_idx=False, sync_dist=True)
        if trainer.is_global_zero:
            attribution = self.attribution if trainer.state.fn == TrainerFn.FITTING else None
            self._told = report_results(trainer, self.results, attribution, self.folder, self.figures)
            if self._unfinished:
                self._unfinished.close()

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Raises ConfigError if limits, or missing data, kept ``fit`` from its sweep."""
        if self.results is None:
            raise ConfigError(
                "fit ended before the sweep: is a --trainer.limit_... or max_time in the way, or no data?"
            )

    def teardown(self, trainer: lightning.Trainer, pl_module: AblationModule, stage: str) -> None:  # type: ignore[override]
        """Shows the table behind everything else, and lets the phase go, which holds tensors on the device."""
        if self._told:
            trainer.print(self._told + "\n", end="")  # whole lines, or Lightning's bar fails in a notebook
        self._told, pl_module.phase = "", None

    def on_exception(self, trainer: lightning.Trainer, pl_module: AblationModule, exception: BaseException) -> None:  # type: ignore[override]
        """Lets the phase and the folder go, as Lightning doesn't tear down then; says how to go on."""
        pl_module.phase = None
        if self._unfinished is not None and self._unfinished.leave() and isinstance(exception, KeyboardInterrupt):
            say(trainer, f"stopped; the same command with --ablation.dirpath {self.folder} goes on")

    def state_dict(self) -> dict[str, Any]:
        """What calibration and learning have found out so far."""
        return self.run.state_dict() if hasattr(self, "run") else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it from a checkpoint; whether it fits is checked where it is used."""
        self._loaded = state_dict

    def _begin(self, trainer: lightning.Trainer, module: AblationModule) -> None:
        """Takes up what a checkpoint holds, and what an earlier run in this folder has done."""
        fitting = trainer.state.fn == TrainerFn.FITTING
        saved = {} if fitting else self._loaded or self.state_dict()  # of a checkpoint, or this callback's own `fit`
        earlier: dict[str, Any] = {}
        self._loaded, self._earlier, self._unfinished, self.results, module.phase = {}, {}, None, None, None
        run = phases.Run(fingerprint(module.target), Calibration(self.sites))
        if self.folder is not None:
            self._unfinished = phases.Unfinished(self.folder, trainer.is_global_zero, self.save_every)
            facts = trainers.run_facts(trainer, module, self, run.target) | {"calibration": digest(saved)}
            if earlier := trainers.from_first(trainer, partial(self._unfinished.claim, facts)):
                self._earlier = earlier["phase"]
                if fitting:
                    there = partial(saved_state, self.folder / CHECKPOINT)
                    saved = earlier if "calibration" in earlier else trainers.from_first(trainer, there)
        if earlier or not fitting:
            run.load_state_dict(saved, module.target, kinds=self._kinds, which=self.sites)
        if earlier:
            done = f"{run.epochs} epochs of calibration and learning and {sum(self._earlier.get('done', ()))} batches"
            say(trainer, f"going on with the run in {self.folder}: {done} of the sweep are done")
        self.run = run

    def _taken_up(self, phase: phases.Phase) -> phases.Phase:
        """The phase, as far as an earlier run has come in it."""
        if self._earlier:
            phase.load_state_dict(self._earlier)
            self._earlier = {}
        return phase

    @property
    def attribution(self) -> pd.DataFrame:
        """What every unit is worth, see :func:`~lightning_ablate.attribution.table_of`; empty without attribution."""
        table = table_of(self.run.calibration.attributed, self.run.measured)
        metric = self.attributing.metric
        table.attrs["of"] = "nats" if metric is None else f"loss of {metric}"
        return table

    def export(
        self,
        module: AblationModule,
        folder: Path | str,
        method: str,
        fraction: float | None = None,
        seed: int | None = None,
        trainer: lightning.Trainer | None = None,
        data: Any = None,
    ) -> Path:
        """Writes a condition of the run as a smaller model, see :func:`lightning_ablate.export.export`.

        ``fraction`` None takes the only one, ``seed`` None the first. Where the model computes something else than the
        run evaluated, it is evaluated on ``data``, a data module or loaders, as ``trainer`` does; None takes those of
        the module. TargetError if the run is of another target.
        """
        if self.results is None:
            raise ConfigError("there is no run to export yet: `fit` first")
        module.configure_model()
        check_target(vars(self.run), fingerprint(module.target))
        condition = chosen(self._conditions()[1:], method, fraction, seed)
        own = next(one for one in self.methods if one.name == method)

        def scored(other: AblationMethod) -> Results:
            seeds = self.seeds if condition.seed is None else condition.seed
            again = AblationCallback(other, condition.fraction, seeds, self.sites, self.neurons, figures=())  # type: ignore[arg-type]
            again.run = self.run
            return trainers.evaluated(again, module, trainer or module.trainer, data)

        return export(module, self.run.calibration, self.neurons, own, condition, folder, self.results, scored)

    @property
    def _kinds(self) -> list[type[ActivationStatistic]]:
        """What is gathered; Moments always, as they describe the neurons and tell which activations aren't finite."""
        methods = [*self.methods, *self.attributing.methods]
        kinds = (kind for method in methods for kind in method.statistics)
        return with_needs([Moments, *self.neurons.statistics, *kinds])

    def _conditions(self) -> list[Condition]:
        sites, fractions = self.run.calibration.sites, sorted(map(float, self.fractions))
        return distinct_conditions(self.methods, self.neurons.selections(sites, fractions, self.seeds), self.seeds)
