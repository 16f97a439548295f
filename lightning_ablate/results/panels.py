"""What the page tells of single units: what they are worth, and a panel of each one's evidence."""

import base64
import io
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from lightning_ablate.attribution import FOUND_AT
from lightning_ablate.results import charts
from lightning_ablate.results.bootstrap import intervals
from lightning_ablate.results.evidence import Evidence
from lightning_ablate.results.frames import BASELINE
from lightning_ablate.results.table import Scores, q_name

_KEYS, _CELL = ["method", "site", "level", "index"], ["value", "low", "high"]
# how a worth is known, beside measured, estimated and verified
_EVIDENCE, _OWN, _ALL = "in the evidence", "change of ", "measured with attribution"
_MARKS = ("mean", "peak", "median", "sd")  # of a neuron's activations
_PIXELS = 96  # of a picture's longer side
_Json = dict[str, Any]


def worth(scores: Scores, attribution: pd.DataFrame | None, evidence: Evidence | None) -> pd.DataFrame:
    """What units are worth alone: one row per ``unit``, ``method`` and ``how`` it is known.

    Columns: method, site, level (neuron, head or part), index, how (``measured`` in the sweep, ``estimated`` and
    ``verified`` by attribution, with the metric if it isn't the cross-entropy, or ``measured with attribution`` where
    it measured all heads, ``in the evidence`` over its positions, ``change of METRIC``), value, low and high (the ends
    of its 95% interval), found (whether it was found to differ from 0, see ``FOUND_AT``), unit (its name).
    """
    found = [pd.DataFrame(columns=[*_KEYS, "how", *_CELL, "found"]).astype(dict.fromkeys(_CELL, float))]
    if scores.parts:
        damage = scores.compare(other=BASELINE).rename(columns={"part": "site", "head": "index"})
        damage["level"] = np.where(damage["index"].isna(), "part", "head")
        for metric in ("cross_entropy", *scores.own):
            how = _OWN + metric if metric in scores.own else "measured"
            found.append(_known(damage, how, cells(damage, metric), damage[q_name(metric)]))
    of = "nats" if attribution is None else attribution.attrs.get("of", "nats")
    for how, name, error in (("estimated", "estimate", "se"), ("verified", "verified", "verified_se")):
        if attribution is not None and name in attribution:
            own = attribution.dropna(subset=name).rename(columns={"unit": "index"}).replace({"level": {"site": "part"}})
            every = own["picked"] == "all" if "picked" in own else pd.Series(False, own.index)
            said = np.where(every & (name == "verified"), _ALL, how) + ("" if of == "nats" else f", {of}")
            q = own["q"].where(every == (name == "verified")) if "q" in own else None  # of measurements of all, if made
            found.append(_known(own, said, own[[name]].to_numpy() + np.outer(own[error], [0, -1.96, 1.96]), q))
    if evidence is not None:
        found.append(_mean_changes(evidence, scores))
    table = pd.concat([frame for frame in found if len(frame)] or found, ignore_index=True)
    return table.assign(unit=_named(table))


def content(
    worths: pd.DataFrame,
    evidence: Evidence | None,
    neurons: pd.DataFrame | None,
    colours: Mapping[str, str],
    contexts: int,
    rows: int,
) -> _Json:
    """All that the page's script knows of units, with so many contexts of a unit and method, and rows of a list."""
    marks = pd.DataFrame() if neurons is None else _marks(neurons)
    explained = [] if evidence is None else evidence.units
    of_neurons = worths["level"] == "neuron"
    maps, others = dict[str, charts.Chart](), worths[~of_neurons]
    mapped = others[~others["how"].str.startswith(("verified", _EVIDENCE))]
    for (method, how), own in mapped.groupby(["method", "how"], sort=False):
        maps[f"{method}, {how}"] = charts.unit_map(own, explained, how.startswith(_OWN))
    found: _Json = {"maps": maps, "units": _list(others, explained, rows, pd.DataFrame())}
    found["neurons"] = _list(worths[of_neurons], explained, rows, marks)
    panels = {name: _panel(evidence, name, contexts, marks, colours) for name in explained} if evidence else {}
    return {**found, "panels": panels, "examples": _examples(evidence, panels.values()) if evidence else {}}


def cells(frame: pd.DataFrame, metric: str, scale: float = 1) -> list[list[float]]:
    """A metric of each row: its value and the ends of its interval."""
    return (scale * frame[[metric, f"{metric}_low", f"{metric}_high"]].to_numpy(dtype=np.float64)).tolist()


def table(columns: Mapping[str, Sequence[Any]]) -> _Json:
    """The columns as the heads and rows of a table."""
    return {"columns": list(columns), "rows": list(map(list, zip(*columns.values(), strict=True)))}


def _known(frame: pd.DataFrame, how: Any, values: Any, q: pd.Series | None = None) -> pd.DataFrame:
    known = dict(zip(_CELL, np.asarray(values, dtype=np.float64).T, strict=True))
    return frame[_KEYS].assign(how=how, **known, found=False if q is None else q <= FOUND_AT)


def _named(frame: pd.DataFrame) -> pd.Series:
    """``SITE``, ``SITE head 0`` or ``SITE neuron 0``."""
    numbers = pd.to_numeric(frame["index"]).astype("Int64").astype("string")
    inner = (" " + frame["level"].astype("string") + " " + numbers).mask(frame["level"] == "part", "")
    return frame["site"].astype("string").str.cat(inner).astype(object)


def _mean_changes(evidence: Evidence, scores: Scores) -> pd.DataFrame:
    """The mean change over the positions of the evidence, with its interval over clusters."""
    keys, known = ["unit", "method", "example"], scores.known[0]
    by_example = evidence.evidence.groupby(keys, sort=False, observed=True)["change"].agg(["sum", "size"]).unstack()
    sums, n = by_example["sum"].to_numpy(), by_example["size"].iloc[0].to_numpy()
    clusters = {} if known is None else dict(zip(known.example, known.cluster, strict=True))
    ends = intervals(sums, n, np.array([clusters.get(example, example) for example in by_example["sum"].columns]))
    frame = by_example.index.to_frame(index=False).astype("string")
    frame[["site", "level", "index"]] = frame["unit"].str.extract(r"^(.*?)(?: (head|neuron) (\d+))?$")
    frame["level"] = frame["level"].fillna("part")
    return _known(frame.astype(object), _EVIDENCE, np.column_stack([sums.sum(1) / n.sum(), *ends]))


def _marks(neurons: pd.DataFrame) -> pd.DataFrame:
    """Where the activations of each neuron lie, by its name; the least normal neurons first."""
    distance = neurons["skewness"] ** 2 / 6 + neurons["excess_kurtosis"] ** 2 / 24
    own = neurons.loc[distance.sort_values(ascending=False, kind="stable").index].rename(columns={"neuron": "index"})
    return own.set_index(_named(own.assign(level="neuron")))[[name for name in _MARKS if name in own]]


def _list(worths: pd.DataFrame, explained: Sequence[str], rows: int, marks: pd.DataFrame) -> _Json:
    """The ``rows`` units that are worth most, the largest first, and those with evidence."""
    most = worths[worths["how"].str.startswith(("measured", "estimated"))].groupby("unit")["value"].max()
    largest = most.sort_values(ascending=False, kind="stable").index
    every = list(dict.fromkeys([*largest, *worths["unit"], *marks.index]))
    kept = {*every[:rows], *explained}
    names, columns = [name for name in every if name in kept], dict[str, Sequence[Any]]()
    for (method, how), own in worths[worths["unit"].isin(names)].groupby(["method", "how"], sort=False):
        known = dict(zip(own["unit"], own[[*_CELL, "found"]].to_numpy(dtype=object).tolist(), strict=True))
        columns[f"{method}, {how}"] = [known.get(name) for name in names]
    columns |= {name: marks[name].reindex(names).tolist() for name in marks}
    return {**table({"unit": names, **columns}), "count": len(every)}


def _panel(evidence: Evidence, name: str, contexts: int, marks: pd.DataFrame, colours: Mapping[str, str]) -> _Json:
    """The evidence of one unit."""
    unit, found, keys = evidence.of(name), dict[str, _Json](), ["example", "position"]
    wide = unit.table.pivot_table(index=keys, columns="method", values="change", observed=True)[evidence.methods]
    for method in evidence.methods:
        own = unit.table[unit.table["method"] == method]
        rows = own.nlargest(contexts, "change").to_dict("records")
        shown = [
            {key: row[key] for key in ("example", "change", "clean", "activation")} | {"pieces": unit.around(row, own)}
            for row in rows
        ]
        promoted = unit.promoted(10, method)[["text", "change"]].to_numpy().tolist()
        changes = wide.loc[[(row["example"], row["position"]) for row in rows]]
        dots = charts.disagreement(changes, [str(row["text"]) for row in rows], colours)
        found[method] = {"contexts": shown, "promoted": promoted, "dots": dots}
    texts = own.set_index(keys)["text"].astype(str).to_dict()
    compared = [_compared(wide[[one, other]], texts) for one, other in combinations(evidence.methods, 2)]
    places = {"zero": 0.0, **marks.drop(columns="sd").loc[name].dropna()} if name in marks.index else {}
    distribution = charts.distribution(own["activation"].dropna(), places)
    return {"methods": found, "compared": compared, "distribution": distribution, **_reads(evidence, name, contexts)}


def _compared(changes: pd.DataFrame, texts: Mapping[Any, str]) -> str:
    """How two replacements disagree, in a sentence."""
    (one, first), (other, second) = changes.items()
    most = (first - second).abs().idxmax()
    with warnings.catch_warnings(action="ignore"):  # changes that are all 0 have no correlation
        correlation = first.corr(second)
    return (
        f"{one} and {other}: correlation {correlation:.2f} over {len(changes):,} positions; they differ most at "
        f"“{texts[most]}”, {first[most]:+.3g} and {second[most]:+.3g} nats."
    )


def _reads(evidence: Evidence, name: str, contexts: int) -> _Json:
    """What a head reads: its scores, and its attention at some positions; empty where that isn't known."""
    scores, attention = (table[table["unit"] == name] for table in (evidence.reads, evidence.attention))
    seen = []
    for row in attention.head(contexts).to_dict("records"):
        tokens = evidence.contexts.at[row["example"], "tokens"]
        names = list(map(str, range(len(row["weights"])))) if tokens is None or not len(tokens) else tokens
        pieces = list(zip(names, row["weights"], strict=False))
        seen.append({"example": row["example"], "at": row["position"], "pieces": pieces})
    known = scores.drop(columns="unit").to_dict("records")
    return {"attention": seen, "reads": known[0] if known else {}} if seen else {}


def _examples(evidence: Evidence, panels: Iterable[_Json]) -> dict[int, _Json]:
    """Of each example that the panels show its label and its picture."""
    used = {row["example"] for panel in panels for one in panel["methods"].values() for row in one["contexts"]}
    own = evidence.contexts.loc[sorted(used)]
    pictures = [_thumbnail(picture) if isinstance(picture, bytes) else None for picture in own["picture"]]
    pairs = zip(own["label"], pictures, strict=True)
    return dict(zip(own.index, [{"label": label, "picture": picture} for label, picture in pairs], strict=True))


def _thumbnail(picture: bytes) -> str:
    """A small copy of a picture as a data: URI."""
    image, file = Image.open(io.BytesIO(picture)).convert("RGB"), io.BytesIO()
    image.thumbnail((_PIXELS, _PIXELS))
    image.save(file, "WEBP", quality=75, lossless=max(image.size) <= 32)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
