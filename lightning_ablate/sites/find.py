"""Finds the sites of a target by one forward pass, whatever its architecture."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ablate.errors import SiteError
from lightning_ablate.sites.dataflow import Trace, Tracer, trace
from lightning_ablate.sites.missing import check_word
from lightning_ablate.sites.outputs import ROLES, Place, RoleTracer, outputs
from lightning_ablate.sites.paths import is_cross, layer_of, modules_around, shape
from lightning_ablate.sites.site import EXPERT, Site
from lightning_ablate.sites.words import is_asked, side_of


class Sites(list[Site]):
    """Sites, which print as a table: a line each."""

    def __repr__(self) -> str:
        """Names, kinds, and how many neurons and heads they have."""
        rows = [("site", "kind", "neurons", "heads")]
        rows += [(site.name, site.kind, str(site.width), str(site.heads or "-")) for site in self]
        name, kind = (max(len(row[place]) for row in rows) for place in (0, 1))
        return "\n".join(f"{row[0]:{name}}  {row[1]:{kind}}  {row[2]:>7}  {row[3]:>5}" for row in rows)


def find_sites(
    target: nn.Module,
    example: Tensor | Mapping[str, Any] | Callable[[], object],
    which: Sequence[str] | str = ("attention",),
) -> Sites:
    """The sites of a target, in the order in which they run; they print as a table.

    One forward pass of any architecture shows which projections read what attention or an MLP made, see
    :func:`~lightning_ablate.sites.dataflow.trace`.

    Args:
        target: the model.
        example: any input: a tensor, keyword arguments of the target, or a function that runs the target.
        which: ``attention``, ``self-attention``, ``cross-attention`` and ``mlp`` are inputs of projections; ``experts``
            are those of mixtures, a site for each, which ``mlp`` holds too; ``residual`` is what each layer returns;
            ``query``, ``key`` and ``value`` are what projections give to attention. Shell-style patterns of paths stand
            for projections of any kind (``*.0.attn.c_proj``), and with a side behind them for what modules return
            (``*.mlp:output``, ``*.attn.c_attn:query``) or an expert (``*.0.mlp.experts:expert3``).

    Raises:
        SiteError: if the target has none of these, or if they can't be found in what runs.

    Example:
        >>> find_sites(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), torch.rand(1, 3, 4), "*2")
        site  kind   neurons  heads
        2     other        8      -
    """
    which = [which] if isinstance(which, str) else which
    given = partial(target, **example) if isinstance(example, Mapping) else partial(target, example)
    run = example if callable(example) else given
    sides = {side_of(word) for word in which}
    tracer = RoleTracer() if sides & {*ROLES} else Tracer()
    with torch.no_grad():
        seen = trace(target, run, tracer)
    if seen.runs > 1:
        raise SiteError(f"the target ran {seen.runs} times for one batch, expected once: `evaluate` must run it once")
    sites = _sites(target, seen)
    read = _in_order(sites, _experts(seen))
    found = _in_order(sites, [*_experts(seen), *outputs(target, seen, tracer, sites)]) if sides != {"input"} else read
    for word in which:
        check_word(target, seen, read, found, word)
    return Sites(site for site in found if any(is_asked(site, word) for word in which))


def _sites(target: nn.Module, seen: Trace) -> list[Site]:
    uses, used = Counter(read.path for read in seen.reads), Counter[str]()
    attention = [read.path for read in seen.reads if read.made_by == "attention"]
    # an MLP within an attention module (a bias table, a low-rank query) is not the layer's MLP
    within = modules_around(attention)
    mlps = [read.path for read in seen.reads if read.made_by == "mlp" and not read.path.startswith(within)]
    layers = {path: layer_of(path, mlps) for path in attention}
    for mlp in mlps:  # MLPs of layers with attention
        if around := [layers[path] for path in attention if layers[path] and mlp.startswith(layers[path] + ".")]:
            layers[mlp] = around[0]
    shapes = {shape(path) for path in layers if path in mlps}
    if not attention:  # MLPs that several layers have
        shapes = {one for one, count in Counter(map(shape, mlps)).items() if count > 1}
    # MLPs with the same path, but for numbers, in layers without attention
    layers |= {mlp: layer_of(mlp, mlps) for mlp in mlps if mlp not in layers and shape(mlp) in shapes}
    sites = []
    for path, width, _, _, heads in seen.reads:
        suffix = f"#{used[path]}" if uses[path] > 1 else ""
        used[path] += 1
        kind = "mlp" if path in layers else "other"
        if path in attention:
            kind = "cross-attention" if is_cross(target, path) else "self-attention"
        layer = layers.get(path)
        sites.append(Site(path + suffix, width, heads, kind, f"{layer}{suffix}" if layer else "", uses[path]))
    return sites


def _experts(seen: Trace) -> list[tuple[Place, Site]]:
    """A site for each expert of each run of their modules."""
    uses, used, found = Counter(one.path for one in seen.returned), Counter[str](), list[tuple[Place, Site]]()
    for number, (path, _, after) in enumerate(seen.returned):
        count, width = seen.experts.get(path, (0, 0))
        suffix, layer = f"#{used[path]}" if uses[path] > 1 else "", layer_of(path, ())
        used[path] += 1
        names = [f"{path}:{EXPERT}{expert}{suffix}" for expert in range(count)]
        more: dict[str, Any] = {"layer": layer and f"{layer}{suffix}", "uses": uses[path]}
        found += [((after - 0.5, number - 0.5), Site(name, width, None, "expert", **more)) for name in names]
    return found


def _in_order(read: Sequence[Site], others: Sequence[tuple[Place, Site]]) -> list[Site]:
    """Sites of the reads of a trace, in their order, and others in their places."""
    made = [*(((float(place), 0.0), site) for place, site in enumerate(read)), *others]
    return [site for _, site in sorted(made, key=lambda one: one[0])]
