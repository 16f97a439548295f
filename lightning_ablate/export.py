"""A condition of a run as a smaller model that transformers or timm load by themselves, with a card of what it is."""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning_ablate.ablation import edits_of
from lightning_ablate.calibration import Calibration
from lightning_ablate.conditions import Condition
from lightning_ablate.errors import ConfigError, few
from lightning_ablate.methods import AblationMethod, ConditionalMean, ConditionalMeanPerHead, Edit
from lightning_ablate.modules import AblationModule
from lightning_ablate.results import Results
from lightning_ablate.results.folder import versions
from lightning_ablate.results.text import interval
from lightning_ablate.sites import Site
from lightning_ablate.smaller import BiasError, shrunk
from lightning_ablate.sweep import Sweep

_METRICS = {"top1": "top-1 accuracy", "cross_entropy": "cross-entropy, nats", "kl": "KL divergence from intact, nats"}


def export(
    module: AblationModule,
    calibration: Calibration,
    sweep: Sweep,
    condition: Condition,
    folder: Path | str,
    results: Results,
    scored: Callable[[AblationMethod], Results],
) -> Path:
    """Writes a smaller model that computes what the target does under a condition, whole or not at all.

    A conditional mean is fitted without an intercept where the architecture has no bias to take one, and ``scored``
    then evaluates the condition anew under that method. The folder holds what ``from_pretrained`` or
    ``timm.create_model("local-dir:...")`` need, and a README.md with what was removed and what it scored.

    Raises:
        ConfigError: if the folder is there already.
        SiteError: if the architecture can't be narrower by just these neurons, see :func:`shrunk`.
    """
    folder, note, method = Path(folder), "", sweep.method(condition.method)
    if folder.exists():
        raise ConfigError(f"{str(folder)!r} is there already, expected the name of a new folder")
    module.configure_model()

    def edits(method: AblationMethod) -> dict[Site, Edit]:
        return edits_of(method, sweep.masks(condition, calibration), calibration, module.device, condition.seed)

    try:
        form, model = shrunk(module.target, edits(method))
    except BiasError:
        if type(method) not in (ConditionalMean, ConditionalMeanPerHead):
            raise
        uncentred = copy.copy(method)
        uncentred.centred = False  # type: ignore[attr-defined]
        form, model = shrunk(module.target, edits(uncentred))
        results = scored(uncentred)
        note = f"Fitted without an intercept (`centred: false`), as {form.name} has no bias to take one."
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as unfinished:
        part = Path(unfinished, folder.name)
        form.save(model, part)
        module.save_beside(part)
        sizes = [sum(p.numel() for p in one.parameters()) for one in (module.target, model)]
        words = _card(module.name, condition, sizes, form.options, note, _alone(results, condition))
        (part / "README.md").write_text(words, encoding="utf-8")
        part.rename(folder)
    return folder


def chosen(conditions: Sequence[Condition], method: str, fraction: float | None, seed: int | None) -> Condition:
    """The one condition that is asked for; ConfigError if there is none, or more than one, or of a single part."""
    own = [c for c in conditions if c.method == method and fraction in (None, c.fraction)]
    found = [c for c in own if seed is None or c.seed in (seed, None)]
    if len({(c.fraction, c.part, c.head) for c in found}) != 1:
        many = "more than one" if found else "no"
        raise ConfigError(
            f"the run has {many} {method} at fraction {fraction}, seed {seed}, of all sites; expected one of "
            f"{few(map(str, conditions))}"
        )
    return found[0]


def _alone(results: Results, condition: Condition) -> Results:
    """The baseline and the one condition, on the first data set."""
    one = results.each[0]
    same = (one.table["method"] == condition.method) & (one.table["fraction"] == condition.fraction)
    seeds = one.table["seed"]
    same &= seeds.isna() if condition.seed is None else (seeds == condition.seed).fillna(False).astype(bool)
    rows, examples = [0, *one.table.index[same]], one.examples
    if examples is not None:
        kept = examples[examples["condition"].isin(rows)]
        examples = kept.assign(condition=kept["condition"].map(rows.index))
    return Results(one.table.loc[rows], examples, one.facts)


def _card(
    name: str, condition: Condition, sizes: list[int], options: Mapping[str, Any], note: str, results: Results
) -> str:
    """README.md of the folder."""
    before, after = sizes
    data, chosen = results.facts.get("data", {}), results.facts.get("neurons", {})
    kinds = ", ".join(dict.fromkeys(str(site["kind"]) for site in results.facts.get("sites", ()))) or "sites"
    seed = "" if condition.seed is None else f" --seed {condition.seed}"
    words = f"RUN OUT --method {condition.method} --fraction {condition.fraction:g}{seed}"
    lines = ["---", f"base_model: {name}", "tags: [pruned]", "---", "", f"# {Path(name).name}, smaller", ""]
    lines += [
        f"{name} without {100 * results.table['ablated'].iloc[-1]:.3g}% of the {kinds} neurons, `{condition.method}` "
        f"of lightning_ablate in their place, folded into the weights that stay: {after:,} of {before:,} parameters "
        f"({', '.join(f'{key} {value}' for key, value in options.items())}). {note}".rstrip(),
        "",
        f"Neurons were chosen by `{chosen}`, seed {condition.seed}; calibrated on {data.get('name', 'data')} "
        f"({data.get('calibration', {}).get('examples', '?')} examples). What the ablated model scored on "
        f"{int(results.baseline['n']):,} positions, mean [{interval(results)}]:",
        "",
        _scores(results),
    ]
    lines += ["", "Made from the run by", "", "```", f"python -m lightning_ablate.export {words}", "```", ""]
    lines += [", ".join(f"{package} {version}" for package, version in versions().items()), ""]
    return "\n".join(lines)


def _scores(results: Results) -> str:
    """A table of the intact and the ablated model."""
    rows, summary = ["| | intact | ablated |", "| --- | --- | --- |"], results.summary()
    for metric, label in {**_METRICS, **{name: name for name in results.own}}.items():
        cells = [
            f"{row[metric]:.4f} [{row[f'{metric}_low']:.4f}, {row[f'{metric}_high']:.4f}]"
            for _, row in summary.iterrows()
        ]
        rows.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    from lightning_ablate.__main__ import running
    from lightning_ablate.cli import export_run

    running(export_run)
