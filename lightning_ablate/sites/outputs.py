"""Sites on the output side: of whole modules, of blocks (the residual stream), and of queries, keys and values."""

from collections import Counter
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_ablate.sites.basis import Part
from lightning_ablate.sites.dataflow import MOVES, PRODUCTS, PROJECTIONS, SUMS, Trace, Tracer, tensors_of
from lightning_ablate.sites.hooks import first_of
from lightning_ablate.sites.site import Site, features, series_of

ROLES = ("query", "key", "value")
Place = tuple[float, float]
"""When a site runs: the number of the read that it is, or between two of them; and the number of what is returned."""
_RUN = 2**32  # labels of one projection's run


class Role(NamedTuple):
    """The part of a projection's output that is a query, key or value."""

    part: tuple[int, ...]  # features, head by head
    heads: int | None  # if no two of them share a feature, and all are equally wide


class RoleTracer(Tracer):
    """Also sees which features of which projections attention takes as queries, keys and values.

    Each feature of a projection's output gets a label, which follows it to the product of queries and keys, or to that
    of attention weights and values. On the way it may be moved, scaled, normalised, and turned by its position.
    """

    def __init__(self) -> None:
        super().__init__()
        self.roles: dict[tuple[str, int], Role] = {}  # by the number of the projection's run, from 1
        self._features: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()  # int64 labels; -1 for any other

    def leaving(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """A module ends; the features that a projection gives get their labels."""
        super().leaving(module, inputs, output)
        if features(module) is not None and (made := first_of(output)) is not None:
            labels = torch.arange(made.shape[-1], device=made.device) + len(self.reads) * _RUN
            self._features[made] = labels.expand(made.shape)

    def __torch_function__(  # noqa: D105
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, given = getattr(func, "__name__", ""), tensors_of([args, kwargs])
        known = [tensor for tensor in given if tensor in self._features]
        weights = [tensor for tensor in given if tensor in self.weights]
        output = super().__torch_function__(func, types, args, kwargs)
        if not known or name in PROJECTIONS or name == "softmax":
            return output
        if name == "scaled_dot_product_attention":
            for role, tensor in zip(ROLES, given, strict=False):
                self._take(role, tensor, -1)
        elif name in PRODUCTS and not isinstance(args[0], str):
            if weights:
                self._take("value", known[-1], -1)
            elif len(known) > 1:
                self._take("query", known[-2], -1)
                self._take("key", known[-1], -2)
        elif name in MOVES:
            args, kwargs = tree_map_only(Tensor, self._marks_of, (args, dict(kwargs or {})))
            with suppress(NotImplementedError):  # of a move of floating numbers alone
                self._keep(tensors_of(output), tensors_of(func(*args, **kwargs)))
        elif name not in SUMS or not self._is_residual(given):
            same = {self._features[tensor].shape: self._features[tensor] for tensor in reversed(known)}
            made = [tensor for tensor in tensors_of(output) if tensor.shape in same]
            self._keep(made, [same[tensor.shape] for tensor in made])
        return output

    def _keep(self, made: Sequence[Tensor], labels: Sequence[Tensor]) -> None:
        for tensor, own in zip(made, labels, strict=True):
            if tensor.is_floating_point() and tensor.shape == own.shape:
                self._features[tensor] = own

    def _marks_of(self, tensor: Tensor) -> Tensor:
        if (labels := self._features.get(tensor)) is not None:
            return labels
        return torch.full_like(tensor, -1, dtype=torch.int64) if tensor.is_floating_point() else tensor

    def _is_residual(self, given: Sequence[Tensor]) -> bool:
        """Whether a sum adds what a projection made to a stream, or to what another one made."""
        others = [t for t in given if t not in self._features and not isinstance(t, nn.Parameter) and t.ndim]
        runs = {int(labels.flatten()[0]) // _RUN for t in given if (labels := self._features.get(t)) is not None}
        return bool(others) or len(runs) > 1

    def _take(self, role: str, tensor: Tensor, axis: int) -> None:
        labels = self._features.get(tensor)
        if labels is None:
            return
        rows = labels.movedim(axis, -1).flatten(0, -2)  # most are equal: those of a head at all positions
        told = torch.stack([rows.amin(1), rows.amax(1), rows.sum(1)], 1)
        kinds, of = torch.unique(told, dim=0, return_inverse=True)
        one = torch.zeros(len(kinds), dtype=torch.int64, device=of.device)
        rows = rows[one.scatter(0, of, torch.arange(len(of), device=of.device))].sort(1).values
        for run in sorted({*(rows[rows >= 0] // _RUN).tolist()}):
            sets = sorted({tuple(own) for row in rows if (own := (row[row // _RUN == run] % _RUN).tolist())})
            part = [feature for own in sets for feature in own]
            apart = len(set(part)) == len(part) and len({*map(len, sets)}) == 1
            found = tuple(part) if apart else tuple(sorted(set(part)))
            self.roles.setdefault((role, run), Role(found, len(sets) if apart else None))


def outputs(target: nn.Module, seen: Trace, tracer: Tracer, found: Sequence[Site]) -> list[tuple[Place, Site]]:
    """All sites that are outputs, and their places among the reads of the trace.

    A module's output is a site if its last dimension is as wide as a projection is at one end: others hold channels or
    positions there. ``found`` are the inputs, a site for each read of the trace.
    """
    projections = [module for module in target.modules() if features(module) is not None]
    widths = {size for one in projections for size in (features(one), getattr(one, "out_features", None))}
    widths |= {size for one in projections for size in getattr(getattr(one, "weight", None), "shape", ())}
    around = {site.layer.partition("#")[0] for site in found if site.kind != "other"} - {""}
    series = {series_of(layer) for layer in around} - {None}
    layers = around | {name for name, _ in target.named_modules() if series_of(name) in series}
    uses, used = Counter(one.path for one in seen.returned), Counter[str]()
    made = list[tuple[Place, Site]]()

    def add(place: Place, path: str, side: str, use: int, of: int, **more: Any) -> None:
        layer = next((one for one in sorted(layers, key=len, reverse=True) if f"{path}.".startswith(f"{one}.")), "")
        kind = side if side in ROLES else "residual" if path in layers else "other"
        suffix = f"#{use}" if of > 1 else ""
        name = f"{path}:{side}{suffix}"
        made.append((place, Site(name, kind=kind, layer=layer and f"{layer}{suffix}", uses=of, **more)))

    places = dict[tuple[str, int], Place]()  # of each use of a module
    for number, (path, width, after) in enumerate(seen.returned):
        place = places[path, used[path]] = after - 0.5, float(number)
        if path and width in widths:
            add(place, path, "output", used[path], uses[path], width=width)
        used[path] += 1
    for (role, run), (part, heads) in tracer.roles.items() if isinstance(tracer, RoleTracer) else ():
        path, runs = seen.reads[run - 1].path, [read.path for read in seen.reads]
        use = runs[: run - 1].count(path)
        add(places[path, use], path, role, use, runs.count(path), width=len(part), heads=heads, basis=Part(part))
    return made
