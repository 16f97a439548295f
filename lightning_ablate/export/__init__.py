"""Writes a condition of a run as a smaller model that transformers or timm load by themselves."""

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from lightning_ablate.calibration import Calibration
from lightning_ablate.choices import Choice
from lightning_ablate.conditions import BASELINE, Condition
from lightning_ablate.errors import ConfigError, few
from lightning_ablate.export.card import card
from lightning_ablate.export.shrink import BiasError, shrunk
from lightning_ablate.methods import AblationMethod, Edit
from lightning_ablate.modules import AblationModule
from lightning_ablate.phases import SweepPhase
from lightning_ablate.results import Results
from lightning_ablate.sites import Site


def export(
    module: AblationModule,
    calibration: Calibration,
    choice: Choice,
    method: AblationMethod,
    condition: Condition,
    folder: Path | str,
    results: Results,
    scored: Callable[[AblationMethod], Results],
) -> Path:
    """Writes a smaller model that computes what the target does under a condition, whole or not at all.

    The folder holds what ``from_pretrained`` or ``timm.create_model("local-dir:...")`` need, and a model card with the
    scores in ``results``. If the architecture has no bias to hold a constant, the method is fitted without an intercept
    where it can be; ``scored`` then evaluates the condition again under that method.

    Raises:
        ConfigError: if the folder is there already.
        SiteError: if the architecture can't be narrower by just these neurons, see :func:`shrunk`.
    """
    folder, note = Path(folder), ""
    if folder.exists():
        raise ConfigError(f"{str(folder)!r} is there already, expected the name of a new folder")
    module.configure_model()

    def edits(method: AblationMethod) -> dict[Site, Edit]:
        return SweepPhase(module, calibration, [method], [BASELINE], choice).edits_of(condition)

    try:
        form, model = shrunk(module.target, edits(method))
    except BiasError:
        other = method.without_intercept()
        if other is None:
            raise
        form, model = shrunk(module.target, edits(other))
        results = scored(other)
        note = f"It was fitted without an intercept (`centred: false`), as {form.name} has no bias to hold one."
    before, after = (sum(parameter.numel() for parameter in one.parameters()) for one in (module.target, model))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as unfinished:
        part = Path(unfinished, folder.name)
        form.save(model, part)
        module.save_beside(part)
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
