"""The Lightning callback that runs the phases: calibration, attribution, learning, sweep."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import lightning
import pandas as pd
from lightning.pytorch.trainer.states import TrainerFn

from lightning_ablate import phases
from lightning_ablate import trainer as trainers
from lightning_ablate.attribution import Attribution, table_of
from lightning_ablate.calibration import Calibration
from lightning_ablate.choices import Choice, Random
from lightning_ablate.conditions import listed
from lightning_ablate.errors import ConfigError
from lightning_ablate.export import export
from lightning_ablate.methods import AblationMethod, method_of
from lightning_ablate.modules import AblationModule
from lightning_ablate.modules.phase import Phase
from lightning_ablate.positions import ALL
from lightning_ablate.progress import say
from lightning_ablate.report import log_scores, report_attribution, report_neurons, report_results, tabulated
from lightning_ablate.results import Results
from lightning_ablate.run import Run, Store, checkpoint_of, plain
from lightning_ablate.seeds import digest
from lightning_ablate.sites import Basis
from lightning_ablate.sweep import Sweep


class AblationCallback(lightning.Callback):
    """Runs the phases of an evaluation: calibration, attribution and learning in ``fit``, the sweep in validation.

    It sets ``max_epochs`` and ``check_val_every_n_epoch`` of the Trainer: one epoch, two where a method needs a
    histogram, more where methods learn. ``fit`` leaves ablation.ckpt in the run's folder; ``validate`` sweeps with it.

    Args:
        methods: what replaces a neuron: names such as ``zero``, ``mean`` and ``peak`` (all are in
            lightning_ablate/methods/README.md), instances, or class paths of subclasses of AblationMethod; none for an
            attribution without a sweep.
        fractions: shares of each site's units to ablate, 0 to 1, rounded to whole units.
        seeds: of the choice of neurons, and of what a method draws.
        sites: ``attention`` (the default), ``self-attention``, ``cross-attention``, ``mlp``; ``residual``, ``query``,
            ``key``, ``value``, ``experts``; and shell-style patterns of module paths (``*.0.attn.c_proj``,
            ``*.mlp:output``).
        neurons: which units are ablated together: ``Random`` (the default), ``Ranked``, ``EachHead``, ``EachLayer``,
            ``EachExpert``, ``Only``, or a subclass of Choice.
        positions: where they are ablated: ``all``, ``first``, ``last``, places among the tokens that aren't padding
            ([0, -1]), or the name of a boolean entry ``(batch, seq)`` of the batch.
        calibrate_at: ``positions`` gathers the statistics at these alone.
        strict: whether a target is refused in which anything beside attention mixes positions; else the table says it.
        bases: word of ``sites`` → what units its sites have in place of neurons: ``Directions`` of a file, ``Features``
            of a sparse autoencoder, or another Basis.
        attribution: options of the estimated effect of every neuron, head and site alone, which ``fit`` makes.
        explain: how many of the largest units to explain (of an attribution so many heads and so many neurons), or the
            names of units, such as ``PATH head 0``.
        explain_examples: how many evaluation examples, the first ones, they are explained on.
        until: nats; the sweep ends once the interval of each condition's added cross-entropy is narrower. Intervals are
            then confidence sequences, which hold although one looks on the way. None evaluates all data.
        dirpath: the folder for the run's files; None takes the logger's. A run that died there goes on.
        save_every: seconds from one save of a sweep to the next, also within a batch; 0 saves after each batch.
        figures: the forms in which figures are saved: ``png``, ``pdf``, ``svg``.

    Attributes:
        sweep: the methods, fractions, seeds, units and sites that are compared.
        results: the table of all conditions, once the sweep has ended.
        run: what the run has found and how far it has come; its ``calibration`` holds the statistics.
        folder: where the run's files are written, once it has begun; None in a ``fast_dev_run``.
    """

    def __init__(
        self,
        methods: Sequence[AblationMethod | str] | str = ("zero", "mean", "peak"),
        fractions: Sequence[float] | float = (0.1, 0.5, 0.9),
        seeds: Sequence[int] | int = (42,),
        sites: Sequence[str] | str = "attention",
        neurons: Choice | None = None,
        positions: Sequence[int] | str = ALL,
        calibrate_at: Literal["all", "positions"] = "all",
        strict: bool = False,
        bases: dict[str, Basis] | None = None,
        attribution: Attribution | None = None,
        explain: int | Sequence[str] | str = 0,
        explain_examples: int = 64,
        until: float | None = None,
        dirpath: str | Path | None = None,
        save_every: float = 60.0,
        figures: Sequence[Literal["png", "pdf", "svg"]] = ("png",),
    ) -> None:
        made = tuple(method_of(method) for method in listed(methods))
        choice = Random() if neurons is None else neurons
        where = positions if isinstance(positions, str) else tuple(positions)
        self.sweep = Sweep(
            made, listed(fractions), listed(seeds), choice, listed(sites), where, calibrate_at, strict, bases or {}
        )
        self.attribution = Attribution() if attribution is None else attribution
        if not isinstance(self.attribution, Attribution):
            raise ConfigError(f"attribution is {attribution!r:.80}, expected Attribution(methods=[...])")
        self.explain = phases.Explain(explain if isinstance(explain, int) else listed(explain), explain_examples)
        if not made and not self.attribution.methods and not isinstance(self.explain.units, tuple):
            raise ConfigError(
                "methods is empty, expected at least one (--ablation.methods '[mean]'), an attribution "
                "(--ablation.attribution.methods '[mean]'), or names of units (--ablation.explain '[PATH head 0]')"
            )
        if until is not None and not until > 0:
            raise ConfigError(f"until is {until}, expected nats above 0, or none (--ablation.until)")
        self.until = until
        self.dirpath, self.save_every, self.figures = dirpath, save_every, listed(figures)
        self.results: Results | None = None
        self.run, self.folder = Run(), cast(Path | None, None)
        self._store: Store | None = None  # of the first process
        self._facts: dict[str, Any] = {}  # of the run, see run_facts
        self._epochs, self._told = list[phases.Epoch](), ""

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Refuses what doesn't fit before anything is loaded, and names the folder."""
        if not isinstance(pl_module, AblationModule):
            raise ConfigError(f"AblationCallback needs an AblationModule, got a {type(pl_module).__name__}")
        trainers.check_trainer(trainer)
        self.folder = trainers.folder_of(trainer, self.dirpath)
        if stage == TrainerFn.FITTING:
            phases.check_attribution(self.attribution, self.sweep, pl_module.metrics)
            trainers.set_epochs(trainer, None)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: AblationModule) -> None:  # type: ignore[override]
        """Begins, now that the target is on its device and the data are there; sets the number of epochs."""
        amount = trainers.calibration_amount(trainer)
        self._begin(trainer, pl_module)
        self._epochs = phases.schedule(self.sweep, self.attribution, amount)
        trainers.set_epochs(trainer, max(1, len(self._epochs) - self.run.epochs))

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: AblationModule) -> None:  # type: ignore[override]
        """Gives the module the phase of this epoch; sweeps at once if an earlier process made all of them."""
        if self.run.epochs == len(self._epochs):
            trainers.validate_at_once(trainer)
        epoch = self._epochs[self.run.epochs]
        if epoch.number == 0 or pl_module.phase is None:
            pl_module.phase = self.run.resume(epoch.make(pl_module, self.run))
        pl_module.phase.begin_epoch(epoch.number)

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: AblationModule, *_: Any) -> None:  # type: ignore[override]
        """Says at the first batch what the run amounts to; ends the epoch after its last one."""
        phase, run, seen = cast(Phase, pl_module.phase), self.run, trainer.fit_loop.batch_idx + 1
        if isinstance(phase, phases.CalibrationPhase) and seen == 1 and not run.epochs:
            given, batches = (self.sweep, self.attribution), trainers.batches_of(trainer, self.explain.examples)
            units = phases.check_explained(self.explain, *given, run.calibration.sites) if self.explain.units else 0
            say(trainer, phases.plan(self._epochs, *given, phase, batches, units))
        if not trainer.is_last_batch:
            return
        phase.end_epoch()
        last = self._epochs[run.epochs].number == phase.epochs - 1
        if last and isinstance(phase, phases.CalibrationPhase):
            run.partial += trainers.cut_short("calibration", [seen], [trainer.train_dataloader])
            report_neurons(trainer, run.calibration, pl_module.name, self.folder, self.figures)
            run.calibration.reduce()
        elif isinstance(phase, phases.VerificationPhase if self.attribution.verify else phases.AttributionPhase):
            report_attribution(trainer, self.attributions, self.folder, self.figures)
        run.epochs += 1
        self._save(trainer, {} if last else phase.state_dict())

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: AblationModule) -> None:  # type: ignore[override]
        """Begins the sweep, with the calibration of this ``fit`` or of a checkpoint."""
        if trainer.state.fn != TrainerFn.FITTING:
            self._begin(trainer, pl_module)
        examples = [trainers.example_count(trainer, loader) for loader in trainers.evaluation_loaders(trainer)]
        given = pl_module, self.run, self.sweep, examples
        phase = phases.SweepPhase(*given, until=self.until)
        if self.explain.units:
            phase = phases.ExplainedSweep(*given, self.explain, self.attribution, self.until)
            phase.save = lambda: self._save(trainer, phase.state_dict())
        if self.save_every:  # 0 saves after every batch, not after every condition
            phase.pause = partial(self._save_if_due, trainer, phase)
        pl_module.phase = self.run.resume(phase)

    def on_validation_batch_end(self, trainer: lightning.Trainer, pl_module: AblationModule, *_: Any) -> None:  # type: ignore[override]
        """Saves the progress now and then."""
        self._save_if_due(trainer, cast(phases.SweepPhase, pl_module.phase), now=trainer.received_sigterm)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: AblationModule) -> None:  # type: ignore[override]
        """Computes the results on every process, and writes them on the first."""
        phase = cast(phases.SweepPhase, pl_module.phase)
        phase.end_epoch()
        self.results = tabulated(trainer, phase, self._facts | self.run.facts(self.sweep.methods, phase.classes))
        log_scores(trainer, self.results)
        if trainer.is_global_zero:
            fitting = trainer.state.fn == TrainerFn.FITTING
            self._told = report_results(trainer, self.results, self.attributions, self.folder, self.figures)
            if fitting:
                self._save(trainer, {}, finished=True)
            if self._store is not None:
                self._store.close(keep=fitting)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Raises ConfigError if limits, or missing data, kept ``fit`` from its sweep."""
        if self.results is None:
            raise ConfigError("fit ended before the sweep: is --trainer.limit_... or max_time in the way, or no data?")

    def teardown(self, trainer: lightning.Trainer, pl_module: AblationModule, stage: str) -> None:  # type: ignore[override]
        """Shows the table after everything else, and lets the phase go, which holds tensors on the device."""
        if self._told:
            trainer.print(self._told + "\n", end="")  # whole lines, or Lightning's bar fails in a notebook
        self._told, pl_module.phase = "", None

    def on_exception(self, trainer: lightning.Trainer, pl_module: AblationModule, exception: BaseException) -> None:  # type: ignore[override]
        """Lets the phase and the folder go, as Lightning doesn't tear down then; says how to go on."""
        pl_module.phase = None
        if self._store is not None and self._store.leave() and isinstance(exception, KeyboardInterrupt):
            say(trainer, f"stopped; the same command with --ablation.dirpath {self.folder} goes on")

    def state_dict(self) -> dict[str, Any]:
        """What the run has found so far."""
        return self.run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it from a checkpoint; whether it fits is checked where the target is known."""
        self.run = Run(saved=state_dict)

    @property
    def attributions(self) -> pd.DataFrame:
        """What every unit is worth, see :func:`~lightning_ablate.attribution.table_of`; empty without attribution."""
        table = table_of(self.run.calibration.attributed, self.run.measured)
        table.attrs["of"] = f"loss of {self.attribution.metric}" if self.attribution.metric else "nats"
        return table

    def export(self, module: AblationModule, folder: Path | str, method: str, *condition: Any, **options: Any) -> Path:
        """Writes a condition of the run as a smaller model; its options are those of :func:`~.export.export`."""
        return export(self, module, folder, method, *condition, **options)

    def _begin(self, trainer: lightning.Trainer, module: AblationModule) -> None:
        """Begins a run, or takes up the one that a checkpoint or an earlier process has left."""
        fitting = trainer.state.fn == TrainerFn.FITTING
        given = {} if fitting else self.run.state_dict()  # of a checkpoint, or of this callback's own `fit`
        self.results, module.phase, self._store, earlier = None, None, None, dict[str, Any]()
        options = {**vars(self.sweep), "attribution": self.attribution, "explain": self.explain}
        options |= {} if self.until is None else {"until": self.until}
        self._facts = trainers.run_facts(trainer, module, options) | {"calibration": digest(given)}
        known = self._facts["target"]["sha256"]
        if self.folder is not None:
            store = Store(self.folder, self.save_every)
            self._store = store if trainer.is_global_zero else None
            earlier = trainers.from_first(trainer, partial(store.claim, self._facts))
        if fitting and not earlier:
            self.run = Run(known, Calibration(self.sweep.sites, at=self.sweep.gathered, bases=self.sweep.bases))
            return
        kinds = phases.kinds_of(self.sweep, self.attribution)
        asked = {"which": self.sweep.sites, "at": self.sweep.gathered, "bases": self.sweep.bases}
        self.run = Run.from_state_dict(earlier or given, module.target, known, kinds=kinds, **asked)
        if earlier:
            self.run.phase = earlier["phase"]
            done = f"{self.run.epochs} epochs of `fit` and {sum(self.run.phase.get('done', ()))} batches of the sweep"
            say(trainer, f"going on with the run in {self.folder}: {done} are done")

    def _save_if_due(self, trainer: lightning.Trainer, phase: phases.SweepPhase, now: bool = False) -> None:
        due = now or (self._store is not None and self._store.due)
        if self.folder is not None and trainer.strategy.broadcast(due):
            self._save(trainer, phase.state_dict())

    def _save(self, trainer: lightning.Trainer, phase: dict[str, Any], finished: bool = False) -> None:
        if self._store is not None:
            more = {"facts": plain(self._facts), "phase": phase, "finished": finished}
            self._store.save(lambda: checkpoint_of(trainer, self, self.state_dict() | more))
