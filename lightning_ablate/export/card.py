"""The model card of a smaller model: what was removed, how, and what it scored."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from lightning_ablate.conditions import Condition
from lightning_ablate.files import versions
from lightning_ablate.results import Results
from lightning_ablate.results.text import interval

_METRICS = {"top1": "top-1 accuracy", "cross_entropy": "cross-entropy, nats", "kl": "KL divergence from intact, nats"}


def card(
    name: str, condition: Condition, sizes: tuple[int, int], options: Mapping[str, Any], note: str, results: Results
) -> str:
    """README.md of a smaller model.

    ``sizes`` are the numbers of parameters before and after, ``options`` those of the configuration that changed.
    """
    results, facts = _only(results.each[0], condition), results.facts
    data, method = facts.get("data", {}), condition.method
    kinds = ", ".join(dict.fromkeys(str(site["kind"]) for site in facts.get("sites", ()))) or "sites'"
    seed = "" if condition.seed is None else f" --seed {condition.seed}"
    return f"""---
{ModelCardData(base_model=name, tags=["pruned"]).to_yaml()}
---

# {Path(name).name}, smaller

{name} without {100 * results.table["ablated"].iloc[-1]:.3g}% of its {kinds} neurons: {sizes[1]:,} of {sizes[0]:,}
parameters are left ({", ".join(f"{key} {value}" for key, value in options.items())}). `{method}` of lightning_ablate
takes the place of the neurons, folded into the weights that stay. {note}

Neurons were chosen by `{facts.get("neurons", {})}`, seed {condition.seed}. Calibration data: {data.get("name", "data")}
({data.get("calibration", {}).get("examples", "?")} examples).
Scores on {int(results.baseline["n"]):,} positions, mean [{interval(results)}]:

{_scores(results)}

Made from the run by

```
python -m lightning_ablate.export RUN OUT --method {method} --fraction {condition.fraction:g}{seed}
```

{", ".join(f"{package} {version}" for package, version in versions().items())}
"""


def _only(results: Results, condition: Condition) -> Results:
    """The baseline and one condition."""
    table, seeds = results.table, results.table["seed"]
    same = (table["method"] == condition.method) & (table["fraction"] == condition.fraction)
    same &= seeds.isna() if condition.seed is None else (seeds == condition.seed).fillna(False).astype(bool)
    rows, examples = [0, *table.index[same]], results.examples
    if examples is not None:
        examples = examples[examples["condition"].isin(rows)]
        examples = examples.assign(condition=examples["condition"].map(rows.index))
    return Results(table.loc[rows], examples, results.facts)


def _scores(results: Results) -> str:
    """A table of the intact and the ablated model."""
    lines, summary = ["| | intact | ablated |", "| --- | --- | --- |"], results.summary()
    for metric, label in {**_METRICS, **{name: name for name in results.own}}.items():
        ends = zip(summary[metric], summary[f"{metric}_low"], summary[f"{metric}_high"], strict=True)
        lines.append(f"| {label} | {' | '.join(f'{mean:.4f} [{low:.4f}, {high:.4f}]' for mean, low, high in ends)} |")
    return "\n".join(lines)
