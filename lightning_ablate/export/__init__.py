"""Writes a condition of a run as a smaller model that transformers or timm load by themselves."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning
from torch import nn

from lightning_ablate.ablation import edits_of
from lightning_ablate.calibration import check_target
from lightning_ablate.conditions import Condition
from lightning_ablate.errors import ConfigError, few
from lightning_ablate.export.card import card
from lightning_ablate.export.form import Form
from lightning_ablate.export.shrink import BiasError, shrunk
from lightning_ablate.identity import fingerprint
from lightning_ablate.methods import AblationMethod
from lightning_ablate.modules import AblationModule
from lightning_ablate.positions import ALL
from lightning_ablate.trainer import evaluated


def export(
    callback: Any,
    module: AblationModule,
    folder: Path | str,
    method: str,
    fraction: float | None = None,
    seed: int | None = None,
    trainer: lightning.Trainer | None = None,
    data: Any = None,
) -> Path:
    """Writes a smaller model that computes what the target does under a condition, whole or not at all.

    The folder holds what ``from_pretrained`` or ``timm.create_model("local-dir:...")`` need, and a model card with the
    scores of the condition. If the architecture has no bias to hold a constant, the method is fitted without an
    intercept where it can be, and the condition is evaluated again.

    Args:
        callback: the :class:`~lightning_ablate.AblationCallback` of the run.
        module: holds the target of the run.
        folder: a new folder.
        method: as results call it.
        fraction: the fraction that was asked for; None takes the only one.
        seed: of the choice of units; None takes the first.
        trainer: evaluates again, on its device and in its precision; None takes the module's.
        data: a data module or loaders for that; None takes those of the trainer.

    Raises:
        ConfigError: if the run has no results or no such condition, or goes by positions; if the folder is there
            already.
        TargetError: if the run is of another target.
        SiteError: if the architecture can't be narrower by just these neurons, see :func:`shrunk`.
    """
    folder, results, note, run = Path(folder), callback.results, "", callback.run
    if results is None:
        raise ConfigError("there is no run to export yet: `fit` first")
    if callback.sweep.positions != ALL:
        raise ConfigError(
            f"the run ablates neurons at the positions {callback.sweep.positions} alone, which no smaller model does; "
            "expected a run with --ablation.positions all"
        )
    if folder.exists():
        raise ConfigError(f"{str(folder)!r} is there already, expected the name of a new folder")
    module.configure_model()
    check_target(vars(run), fingerprint(module.target))
    condition = chosen(callback.sweep.conditions(run.calibration.sites)[1:], method, fraction, seed)
    masks = callback.sweep.masks(condition, run.calibration)

    def smaller(method: AblationMethod) -> tuple[Form, nn.Module]:
        return shrunk(module.target, edits_of(method, masks, run.calibration, module.device, condition.seed))

    try:
        form, model = smaller(callback.sweep.method(method))
    except BiasError:
        other = callback.sweep.method(method).without_intercept()
        if other is None:
            raise
        form, model = smaller(other)
        seeds = callback.sweep.seeds if condition.seed is None else (condition.seed,)
        again = copy.copy(callback)
        again.sweep = replace(callback.sweep, methods=(other,), fractions=(condition.fraction,), seeds=seeds)
        again.figures = ()
        results = evaluated(again, module, trainer or module.trainer, data)
        note = f"It was fitted without an intercept (`centred: false`), as {form.name} has no bias to hold one."
    before, after = (sum(parameter.numel() for parameter in one.parameters()) for one in (module.target, model))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as unfinished:
        part = Path(unfinished, folder.name)
        form.save(model, part)
        module.save_processor(part)
        words = card(module.name, condition, (before, after), form.options, note, results)
        (part / "README.md").write_text(words, encoding="utf-8")
        part.rename(folder)
    return folder


def chosen(conditions: Sequence[Condition], method: str, fraction: float | None, seed: int | None) -> Condition:
    """The one condition of all sites that is meant; ConfigError if there is none, or several.

    ``fraction`` None takes the only one, ``seed`` None the first.
    """
    own = [c for c in conditions if c.method == method and fraction in (None, c.fraction)]
    found = [c for c in own if seed is None or c.seed in (seed, None)]
    if len({(c.fraction, c.part, c.head) for c in found}) != 1:
        many = "more than one" if found else "no"
        raise ConfigError(
            f"the run has {many} {method} at fraction {fraction}, seed {seed}, of all sites; expected one of "
            f"{few(map(str, conditions))}"
        )
    return found[0]
