"""Evidence: what ablating single units does at every scored position of some examples, once the sweep is done."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lightning_ablate.attribution import Attribution, table_of, worth
from lightning_ablate.errors import AblationError, ConfigError, DataError, NonFiniteError
from lightning_ablate.metrics import Clean, Scored, checked, scores
from lightning_ablate.modules import AblationModule
from lightning_ablate.phases.reading import Reader, heads_among
from lightning_ablate.phases.sweep import SweepPhase
from lightning_ablate.phases.units import Explain, Units, check_explained, explaining, parts_of
from lightning_ablate.results.evidence import Evidence
from lightning_ablate.run import Run
from lightning_ablate.sites import Site, attended, exact_device, hooked, keep
from lightning_ablate.statistics import Moments
from lightning_ablate.statistics.base import by_example
from lightning_ablate.sweep import Sweep

_PROMOTED = 10  # classes at either end
_ROWS = 64  # so many rows of logits are summed at a time in float32; these sums are added in float64


class ExplainedSweep(SweepPhase):
    """Sweeps, then gathers the evidence of single units. The explained batches stay on the device until then.

    The units are those named, or the largest of an attribution (of its heads, and as many neurons), or of those that
    the sweep ablates alone. The attribution's methods ablate them; if it has none, those of the sweep.

    Attributes:
        evidence: the evidence, once the last batch is done.
        unread: why it doesn't tell what heads read; empty if it does.
    """

    def __init__(
        self,
        module: AblationModule,
        run: Run,
        sweep: Sweep,
        examples: Sequence[int],
        explain: Explain,
        attribution: Attribution,
        until: float | None = None,
    ) -> None:
        super().__init__(module, run, sweep, examples, until=until)
        self.explain, self.attribution = explain, attribution
        self.evidence: Evidence | None = None
        self.unread = ""
        self._held: list[tuple[Any, int]] = []
        check_explained(explain, self.sweep, attribution, self.run.calibration.sites)
        self.save: Callable[[], None] = lambda: None  # is called before evidence begins
        lost = {method.name for method in attribution.each} - set(self.run.calibration.attributed)
        if isinstance(explain.units, int) and lost:
            raise ConfigError(
                f"the checkpoint has no attribution under {min(lost)}; run `fit` with it, name the units to explain "
                "(--ablation.explain), or ablate each head alone"
            )

    def step(self, batch: Any, batch_idx: int) -> None:
        """Evaluates every condition on one batch; after the last one, gathers the evidence."""
        module = self.module
        if module.loader_index == 0:
            examples = module.examples_of(batch, batch_idx)
            wanted = (examples >= 0) & (examples < self.explain.examples)
            if bool(module.summed(wanted.any().float())):  # of any process, as a sharded target needs them all
                self._held.append((batch, batch_idx))
        super().step(batch, batch_idx)
        if module.is_last_batch:
            self.save()
            self.title, module.loader_index = "Evidence", 0
            try:
                self._gather()
            except AblationError as error:  # the sweep's results are there
                self.run.note(f"there is no evidence: {error}")
            self._held = []

    def _gather(self) -> None:
        sweep = self.sweep
        methods, units = explaining(sweep, self.attribution), Units(self._names())
        alone = Sweep(methods, (1.0,), sweep.seeds[:1] or (0,), units, sweep.sites, sweep.positions)
        recorder = _Recorder(self.module, self.run, alone, self.explain.examples)
        recorder.announce = self.announce
        failed = ""
        try:
            for held in self._held:
                recorder.step(*held)
        except AblationError as error:
            failed = str(error)
        # all processes go on, or none, as those that went on would wait for the others
        for said in filter(None, self.module.gathered(failed)):
            raise DataError(said)
        self.evidence, self.unread = recorder.evidence(), recorder.unread

    def _names(self) -> list[str]:
        """The units to explain; of a number the largest, by what they were measured or estimated to cost."""
        units = self.explain.units
        if not isinstance(units, int):
            return list(units)
        if self.attribution.methods:
            table = table_of(self.run.calibration.attributed, self.run.measured)
            table = table.assign(cost=worth(table))[table["level"] != "site"]
            means = table.groupby(["level", "site", "unit"], sort=False)["cost"].mean().reset_index()
            largest = means.sort_values("cost", ascending=False, kind="stable").groupby("level").head(units)
            return [f"{one.site} {one.level} {one.unit}" for one in largest.itertuples()]
        place = self.metrics.names.index("cross_entropy")
        costs = self.module.summed(self.each[0].sums[:, place].sum(1)).tolist()
        parts, found = parts_of(self.sweep, self.run.calibration.sites), dict[str, float]()
        for condition, cost in zip(self.conditions[1:], costs[1:], strict=True):
            name = next((n for one, n in parts.items() if (one.part, one.head) == (condition.part, condition.head)), "")
            found[name] = found.get(name, 0.0) + cost
        found.pop("", None)
        return sorted(found, key=lambda name: -found[name])[:units]


class _Recorder(SweepPhase):
    """Ablates units alone on single batches, and keeps what happens at each scored position of the first examples."""

    def __init__(self, module: AblationModule, run: Run, sweep: Sweep, limit: int) -> None:
        super().__init__(module, run, sweep)
        self.limit = limit
        chosen = {condition.part: condition for condition in self.conditions[1:]}
        masks = {name: sweep.masks(condition, run.calibration) for name, condition in chosen.items()}
        self._masks = {name: {s: mask for s, mask in own.items() if bool(mask.any())} for name, own in masks.items()}
        self._rows: list[dict[str, np.ndarray]] = []  # of each batch
        self._contexts: dict[int, dict[str, Any]] = {}
        self._told: Tensor | None = None  # (conditions, classes) float64, sums of log-probabilities
        self._reader = Reader(module, heads_among(self._masks))

    def step(self, batch: Any, batch_idx: int) -> None:
        """Runs the intact target, then each unit under each method."""
        module, names, found = self.module, ("cross_entropy", *self.module.metrics), dict[Site, Tensor]()
        with torch.no_grad():
            self._reader.repeated(batch)
            examples = self.begin(batch, batch_idx)
            reading = {site: partial(keep, found, site) for masks in self._masks.values() for site in masks}
            heads = self._reader.by_site
            with hooked(module.target, reading, once=True), attended(module.target, heads) as weights:
                scored = checked(self.evaluated(0, batch), module.metrics)
            clean, counts = Clean.of(scored), (scored.example >= 0) & (scored.example < self.limit)
            kept = counts.nonzero().squeeze(1)
            before = self._scored(0, scored, clean, kept)
            same = scored.example[kept].unsqueeze(1) == examples
            if not bool(same.any(1).all()):
                raise DataError(
                    "Scored's `example` names examples that aren't in the batch; give batches an `index`, or override "
                    "`examples_of`"
                )
            rows = same.int().argmax(1)
            position = torch.full_like(rows, -1) if scored.position is None else scored.position[kept]
            columns = {
                "example": scored.example[kept],
                "position": position,
                "place": torch.where(position < 0, -1, position + module.ahead),
                "target": scored.targets[kept],
                "clean": before[0],
                "activation": torch.stack(
                    [self._activation(name, found, batch, rows, position) for name in self._masks]
                ),
            }
            self._reader.add(batch, weights, rows, position)
            changes = before.new_empty(len(before), len(self.conditions) - 1, before.shape[1])
            for index in self._order[1:]:
                after = Scored(*self.evaluated(index, batch))
                own = changes[:, index - 1] = self._scored(index, after, clean, kept) - before
                part = self.conditions[index].part
                self._reader.keep(part, weights, rows, columns["example"], position, own[0])
                del after
        columns |= dict(zip([f"change {name}" for name in names], changes, strict=True))
        self._rows.append({name: column.cpu().numpy() for name, column in columns.items()})
        for example, shown in zip(examples.tolist(), module.shown(batch), strict=True):
            if 0 <= example < self.limit:
                self._contexts[example] = shown

    @property
    def unread(self) -> str:
        """Why attention wasn't read; empty if it was."""
        return self._reader.why

    def evidence(self) -> Evidence:
        """What all processes have kept; every process must call it."""
        module = self.module
        batches, contexts = [], dict[int, dict[str, Any]]()
        for rows, shown in module.gathered((self._rows, self._contexts)):
            batches += rows
            contexts |= shown
        total = sum(len(one["example"]) for one in batches)
        if self._told is None or not total:
            raise DataError("none of the examples to explain has a scored position (--ablation.explain_examples)")
        told = module.summed(self._told).cpu() / total
        columns = {name: np.concatenate([one[name] for one in batches], -1) for name in batches[0]}
        order = np.lexsort((columns["place"], columns["example"]))
        columns = {name: column[..., order] for name, column in columns.items()}
        if not np.isfinite(columns["change cross_entropy"]).all():
            raise NonFiniteError("a unit alone makes logits NaN or infinite; try another precision (--model.dtype)")
        shown = {example: contexts[example] for example in sorted(contexts)}
        texts = self._texts(columns, shown)
        changes = [name.removeprefix("change ") for name in columns if name.startswith("change ")]
        size, units = columns["change cross_entropy"].mean(1), list(self._masks)
        conditions = list(enumerate(self.conditions[1:]))
        largest = sorted(units, key=lambda unit: -np.mean([size[i] for i, c in conditions if c.part == unit]))
        frames, promoted = [], []
        for unit, method in product(largest, self.sweep.methods):
            index = next(i for i, c in conditions if (c.part, c.method) == (unit, method.name))
            same = {name: columns[name] for name in ("example", "position", "place", "target")}
            added = {name: columns[f"change {name}"][index] for name in changes}
            frame = pd.DataFrame(
                {**same, "text": texts, "clean": columns["clean"], "change": added.pop("cross_entropy")}
            )
            frame = frame.assign(**{f"change_{name}": values for name, values in added.items()})
            frame["activation"] = columns["activation"][units.index(unit)]
            frames.append(frame.assign(unit=unit, method=method.name))
            promoted.append(self._promoted(told[0] - told[index + 1]).assign(unit=unit, method=method.name))
        evidence = pd.concat(frames, ignore_index=True)
        evidence = evidence[["unit", "method", *(name for name in evidence if name not in ("unit", "method"))]]
        for name in ("unit", "method", "text"):
            evidence[name] = evidence[name].astype("category")
        table = pd.DataFrame(
            [{"example": e, "label": None, "tokens": None, "picture": None, **s} for e, s in shown.items()]
        )
        attention, reads = self._reader.tables(evidence)
        return Evidence(evidence, pd.concat(promoted, ignore_index=True), table, attention, reads)

    def _scored(self, index: int, scored: Scored, clean: Clean, kept: Tensor) -> Tensor:
        """Cross-entropy and own metrics of the kept positions, ``(1 + metrics, kept)`` float64; sums what is told."""
        exact = exact_device(scored.logits.device)
        own = scores(scored.logits, scored.targets, clean).cross_entropy
        if self._told is None:
            classes = scored.logits.shape[1]
            self._told = torch.zeros(len(self.conditions), classes, dtype=torch.float64, device=exact)
        right = scored.logits.gather(1, scored.targets.unsqueeze(1)).squeeze(1).to(exact).double()
        sums = sum(scored.logits[rows].float().sum(0).to(exact).double() for rows in torch.split(kept, _ROWS))
        # log p = logit - log Z, and log Z = cross-entropy + the right logit
        self._told[index] += sums - (own + right)[kept].sum()
        return torch.stack([own, *(values.to(exact).double() for values in scored.extra.values())])[:, kept]

    def _activation(self, name: str, found: dict[Site, Tensor], batch: Any, rows: Tensor, position: Tensor) -> Tensor:
        """The unit's activation at each scored position, float32: a neuron's value, or the norm of its deviation."""
        parts, masks = [], self._masks[name]
        single = sum(int(mask.sum()) for mask in masks.values()) == 1
        for site, mask in masks.items():
            values, valid = by_example(found[site], self.module.valid_at(site, batch))
            mask, own = mask.to(values.device), values[..., mask.to(values.device)].float()
            mean = self.run.calibration[site][Moments].mean.to(values.device, torch.float32)[mask]
            size = own.squeeze(2) if single else (own - mean).norm(dim=2)  # (examples, positions)
            at = self.module.position_at(site, position)
            if at is None or bool((at < 0).any()):  # the mean over the example
                parts.append(((size * valid).sum(1) / valid.sum(1))[rows])
            else:
                parts.append(size[rows, at])
        return parts[0] if len(parts) == 1 else torch.stack(parts).norm(dim=0)

    def _texts(self, columns: dict[str, np.ndarray], shown: dict[int, dict[str, Any]]) -> list[str]:
        """What is asked for at each row: the token in its text, or the name of the class."""
        classes = np.unique(columns["target"])
        names = dict(zip(classes.tolist(), self.module.class_texts(classes.tolist()), strict=True))
        texts = []
        for example, place, target in zip(columns["example"], columns["place"], columns["target"], strict=True):
            tokens = shown[example].get("tokens") or ()
            known = tokens[place] if 0 <= place < len(tokens) else ""
            texts.append(known or names[target])
        return texts

    def _promoted(self, change: Tensor) -> pd.DataFrame:
        """The classes at both ends of ``(classes,)`` changes of their mean log-probability."""
        change = change.nan_to_num()  # ruled out, by a logit of -inf
        order = change.argsort(descending=True)
        ends = order if len(order) <= 2 * _PROMOTED else torch.cat([order[:_PROMOTED], order[-_PROMOTED:]])
        classes = ends.tolist()
        columns = {"class": classes, "text": self.module.class_texts(classes), "change": change[ends].numpy()}
        return pd.DataFrame(columns)
