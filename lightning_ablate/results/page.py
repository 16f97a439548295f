"""report.html: a run on one page, which opens from the disk and asks nothing of a network."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from lightning_ablate.files import write_whole
from lightning_ablate.results import charts, panels, text
from lightning_ablate.results.evidence import HARM, HELP
from lightning_ablate.results.results import Results
from lightning_ablate.results.styles import styles
from lightning_ablate.results.table import Scores

LARGEST = 6_000_000  # bytes of a page; plotly.js takes 4.8 million of them
_CAPS = ((10, 2000), (5, 1000), (2, 500), (1, 100))  # contexts of a unit and method, rows of a list; the first that fit
_JSON = {"separators": (",", ":"), "ensure_ascii": False, "allow_nan": False}
_Json = dict[str, Any]


def write(
    folder: Path, results: Results, units: pd.DataFrame | None = None, neurons: pd.DataFrame | None = None
) -> Path:
    """Writes report.html of a run, at most ``LARGEST`` bytes; returns its path.

    Args:
        folder: the folder of the run.
        results: its results, with the evidence that was gathered.
        units: see :func:`~lightning_ablate.attribution.table_of`; None or empty without attribution.
        neurons: the table in neurons.parquet; None if there is none.
    """
    evidence = results.gathered
    worth = panels.worth(results.each[0], units, evidence)
    colours = _colours([*results.methods, *worth["method"]])

    def content(contexts: int, rows: int) -> _Json:
        return panels.content(worth, evidence, neurons, colours, contexts, rows)

    return _written(folder / "report.html", results.each, colours, results.facts, content)


def joined(targets: Sequence[Results], folder: Path) -> Path:
    """Writes report.html of several runs, their methods and curves; returns its path."""
    each = [one for target in targets for one in target.each]
    facts = {f"{number}. {text.title(one)}": one.facts for number, one in enumerate(each, 1)}
    colours = _colours(method for one in each for method in one.methods)
    return _written(folder / "report.html", each, colours, facts)


def _written(
    path: Path,
    targets: Sequence[Scores],
    colours: Mapping[str, str],
    facts: Mapping[str, Any],
    content: Callable[[int, int], _Json] | None = None,
) -> Path:
    """Fills the template, with as many contexts and rows of ``content`` as fit."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    made = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    made.policies["json.dumps_kwargs"] = _JSON
    tables = [{"methods": _methods(one), "curves": charts.curves(one, colours)} for one in targets]
    data: _Json = {"harm": HARM, "help": HELP, "colours": colours, "targets": tables}
    data["attention"] = facts.get("attention")
    given: _Json = {"heads": list(map(_head, targets)), "interval": text.interval(targets[0])}
    given |= {
        "chance": text.CHANCE,
        "words": facts.get("words"),
        "facts": json.dumps(facts, indent=2, ensure_ascii=False, default=str),
    }
    given |= {"plotly": Markup(get_plotlyjs())}  # ours to trust, like the template
    for contexts, rows in _CAPS:
        units = content(contexts, rows) if content else {}
        page = made.get_template("page.html").render(data=_plain(data | units), units=units, contexts=contexts, **given)
        if len(page.encode()) <= LARGEST:
            break
    write_whole(path, page)
    return path


def _head(one: Scores) -> _Json:
    title = text.title(one)
    first, *notes = text.head(one).removeprefix(f"{title}: ").splitlines()
    return {"title": title, "first": first, "notes": notes, "swept": bool(one.methods)}


def _methods(one: Scores) -> _Json:
    """The table of methods: how each metric changes, then its values at up to three shares, or the largest part."""
    ranked = one.ranking().groupby("method", sort=False).head(1)
    columns: dict[str, Sequence[Any]] = {"method": ranked["method"].tolist()}
    where = "" if one.parts or ranked.empty else f", mean over 0 to {100 * ranked['to'].iloc[0]:.3g}%"
    if one.parts:
        columns["largest part"] = (ranked["part"] + (" head " + ranked["head"].astype("string")).fillna("")).tolist()
    for metric, (label, scale) in charts.metrics(one).items():
        columns[f"change of {label}{where}"] = panels.cells(ranked, metric, scale)
    summary = one.summary().iloc[1:]
    for share in [] if one.parts else text.shares(summary):
        own = summary[summary["ablated"] == share].set_index("method").reindex(columns["method"])
        for metric, (label, scale) in charts.metrics(one).items():
            columns[f"{label} at {100 * share:.3g}%"] = panels.cells(own, metric, scale)
    return panels.table(columns)


def _colours(methods: Iterable[str]) -> dict[str, str]:
    return {method: style["color"] for method, style in styles(list(dict.fromkeys(methods))).items()}


def _plain(value: Any) -> Any:
    """The value as JSON takes it: numbers with five significant digits, null where they aren't finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | np.ndarray | pd.Series):
        return list(map(_plain, value))
    if isinstance(value, str | int) or value is None:
        return value
    number = math.nan if value is pd.NA else float(f"{float(value):.5g}")
    return None if not math.isfinite(number) else int(number) if number.is_integer() else number
