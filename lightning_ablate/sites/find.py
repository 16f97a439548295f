"""Finds the sites of a target by one forward pass, whatever its architecture."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ablate.errors import SiteError, few
from lightning_ablate.sites.dataflow import Trace, Tracer, trace
from lightning_ablate.sites.experts import experts_of
from lightning_ablate.sites.outputs import ROLES, Place, RoleTracer, outputs
from lightning_ablate.sites.site import EXPERT, Site, features

KINDS = {
    "attention": ("self-attention", "cross-attention"),
    "self-attention": ("self-attention",),
    "cross-attention": ("cross-attention",),
    "mlp": ("mlp", "expert"),
    "experts": ("expert",),
    **{word: (word,) for word in ("residual", *ROLES)},
}
_DIGITS = re.compile(r"(?:^|(?<=[._]))\d+")
_NUMBERED = re.compile(r"(^|_)\d+$")
_CROSS_PATH = re.compile(r"(^|[._])(cross|encoder_att|encdecatt)", re.IGNORECASE)


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
    sides = {_side(word) for word in which}
    tracer = RoleTracer() if sides & {*ROLES} else Tracer()
    with torch.no_grad():
        seen = trace(target, run, tracer)
    if seen.runs > 1:
        raise SiteError(f"the target ran {seen.runs} times for one batch, expected once: `evaluate` must run it once")
    sites = _sites(target, seen)
    read = _in_order(sites, _experts(seen))
    found = _in_order(sites, [*_experts(seen), *outputs(target, seen, tracer, sites)]) if sides != {"input"} else read
    for word in which:
        if word in ("residual", "experts", *ROLES) or ":" in word:
            _check_output(target, found, word)
        elif word in KINDS:
            _check_kind(target, seen, read, word)
        else:
            _check_pattern(target, read, word)
    return Sites(site for site in found if any(is_asked(site, word) for word in which))


def is_asked(site: Site, word: str) -> bool:
    """Whether this site is one of those that a word of ``which`` asks for, see :func:`find_sites`."""
    if word in KINDS:
        return site.kind in KINDS[word]
    return fnmatchcase(site.side, _side(word)) and fnmatchcase(site.path, word.partition(":")[0])


def is_covered(target: nn.Module, word: str, sites: Sequence[Site], which: Sequence[str]) -> bool:
    """Whether ``sites``, which were found in the target for ``which``, are all that a word asks for."""
    if word in which:
        return True
    if word in KINDS:
        return set(KINDS[word]) <= {kind for known in which for kind in KINDS.get(known, ())}
    pattern, side = word.partition(":")[0], _side(word)
    known = {site.path for site in sites if fnmatchcase(site.side, side)}
    asked = {n for n, module in target.named_modules() if fnmatchcase(n, pattern)}
    if side.startswith(EXPERT):
        asked = {name for name in asked if experts_of(target.get_submodule(name)) is not None}
    if side == "input":
        asked = {name for name in asked if features(target.get_submodule(name)) is not None}
    return bool(asked) and asked <= known


def _sites(target: nn.Module, seen: Trace) -> list[Site]:
    uses, used = Counter(read.path for read in seen.reads), Counter[str]()
    attention = [read.path for read in seen.reads if read.made_by == "attention"]
    # an MLP within an attention module (a bias table, a low-rank query) is not the layer's MLP
    within = _modules_around(attention)
    mlps = [read.path for read in seen.reads if read.made_by == "mlp" and not read.path.startswith(within)]
    layers = {path: _layer(path, mlps) for path in attention}
    for mlp in mlps:  # MLPs of layers with attention
        if around := [layers[path] for path in attention if layers[path] and mlp.startswith(layers[path] + ".")]:
            layers[mlp] = around[0]
    shapes = {_DIGITS.sub("*", path) for path in layers if path in mlps}
    if not attention:  # MLPs that several layers have
        shapes = {shape for shape, count in Counter(_DIGITS.sub("*", mlp) for mlp in mlps).items() if count > 1}
    # MLPs with the same path, but for numbers, in layers without attention
    layers |= {mlp: _layer(mlp, mlps) for mlp in mlps if mlp not in layers and _DIGITS.sub("*", mlp) in shapes}
    sites = []
    for path, width, _, _, heads in seen.reads:
        suffix = f"#{used[path]}" if uses[path] > 1 else ""
        used[path] += 1
        kind = "mlp" if path in layers else "other"
        if path in attention:
            kind = "cross-attention" if _is_cross(target, path) else "self-attention"
        layer = layers.get(path)
        sites.append(Site(path + suffix, width, heads, kind, f"{layer}{suffix}" if layer else "", uses[path]))
    return sites


def _experts(seen: Trace) -> list[tuple[Place, Site]]:
    """A site for each expert of each run of their modules."""
    uses, used, found = Counter(one.path for one in seen.returned), Counter[str](), list[tuple[Place, Site]]()
    for number, (path, _, after) in enumerate(seen.returned):
        count, width = seen.experts.get(path, (0, 0))
        suffix, layer = f"#{used[path]}" if uses[path] > 1 else "", _layer(path, ())
        used[path] += 1
        names = [f"{path}:{EXPERT}{expert}{suffix}" for expert in range(count)]
        more: dict[str, Any] = {"layer": layer and f"{layer}{suffix}", "uses": uses[path]}
        found += [((after - 0.5, number - 0.5), Site(name, width, None, "expert", **more)) for name in names]
    return found


def _in_order(read: Sequence[Site], others: Sequence[tuple[Place, Site]]) -> list[Site]:
    """Sites of the reads of a trace, in their order, and others in their places."""
    made = [*(((float(place), 0.0), site) for place, site in enumerate(read)), *others]
    return [site for _, site in sorted(made, key=lambda one: one[0])]


def _modules_around(attention: Sequence[str]) -> tuple[str, ...]:
    """The prefixes of the attention modules that hold these projections; a layer that holds one itself is left out."""
    modules = {path.rpartition(".")[0] for path in attention}
    return tuple(module + "." for module in modules if not _NUMBERED.search(module.rpartition(".")[2]))


def _layer(path: str, mlps: Sequence[str]) -> str:
    """The closest numbered module around a projection that has an MLP as well; else the closest numbered one."""
    parts = path.split(".")
    numbered = [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1) if _NUMBERED.search(parts[end - 1])]
    return next((name for name in numbered if any(mlp.startswith(name + ".") for mlp in mlps)), [*numbered, ""][0])


def _is_cross(target: nn.Module, path: str) -> bool:
    parts = path.split(".")
    around = [target.get_submodule(".".join(parts[:end])) for end in range(len(parts) + 1)]
    if parts[-2:-1] == ["multihead_attn"] and hasattr(around[-3], "self_attn"):  # as torch.nn.TransformerDecoderLayer
        return True
    return bool(_CROSS_PATH.search(path)) or any("CrossAtt" in type(module).__name__ for module in around)


def _check_kind(target: nn.Module, seen: Trace, found: Sequence[Site], word: str) -> None:
    if word == "mlp":
        _check_mlps(target, seen, found)
    elif seen.lost:
        raise SiteError(
            f"no projection module reads what attention makes in {seen.lost[0] or 'the target itself'} "
            f"({len(seen.lost)} such places): it goes through a fused implementation, bare weights, a keyword or a "
            f"sum; name the sites by a pattern (--ablation.sites); the projections that ran are {_candidates(found)}"
        )
    elif seen.shared:
        readers = ", ".join([site.name for site in found if is_asked(site, "attention")][:12])
        raise SiteError(
            f"what attention makes in {seen.shared[0] or 'the target itself'} is read by several projections, among "
            f"{readers}, or isn't attention (a softmax over experts); name the sites by a pattern (--ablation.sites)"
        )
    elif not any(is_asked(site, "attention") for site in found):
        raise SiteError(
            "found no attention in the target: neither scaled_dot_product_attention nor a softmax and a product ran "
            "(with a fused kernel, choose --model.attn_implementation sdpa or eager); otherwise name the sites by a "
            f"pattern (--ablation.sites); the projections that ran are {_candidates(found)}"
        )
    if not any(is_asked(site, word) for site in found):
        kinds = ", ".join(sorted({site.kind for site in found} - {"other"}))
        raise SiteError(f"the target has no site of the kind {word!r} (--ablation.sites), it has {kinds}")


def _check_mlps(target: nn.Module, seen: Trace, found: Sequence[Site]) -> None:
    positions = {read.path: read.positions for read in seen.reads}
    for layer in dict.fromkeys(site.layer.partition("#")[0] for site in found if is_asked(site, "attention")):
        sites = [site for site in found if site.layer.partition("#")[0] == layer]
        attention = [site.path for site in sites if is_asked(site, "attention")]
        mlps = [site.path for site in sites if site.kind == "mlp"]
        _check_experts(target, layer, attention, mlps, positions, seen)
        if not mlps and not any(site.kind == "expert" for site in sites):
            raise SiteError(
                f"found no MLP down projection in {layer or 'the target'}; name it by a pattern (--ablation.sites); "
                f"the projections that ran are {_candidates(found)}"
            )


def _check_experts(
    target: nn.Module,
    layer: str,
    attention: Sequence[str],
    mlps: Sequence[str],
    positions: Mapping[str, int],
    seen: Trace,
) -> None:
    within = _modules_around(attention)
    for name, parameter in target.get_submodule(layer).named_parameters(prefix=layer):
        unread = parameter.ndim == 3 and min(parameter.shape) > 1 and name.rpartition(".")[0] not in seen.experts
        if unread and not name.startswith(within):
            raise SiteError(
                f"the experts of {layer} are one parameter {name} {tuple(parameter.shape)}, whose input can't be read "
                "or replaced, as no expert is computed by a product of its own; leave `mlp` out"
            )
    projections = [n for n, m in target.get_submodule(layer).named_modules(prefix=layer) if features(m) is not None]
    for path in mlps:
        alike = [name for name in projections if _DIGITS.sub("*", name) == _DIGITS.sub("*", path)]
        if len(alike) > 1 and min(positions.get(other, 0) for other in alike) < max(positions[a] for a in attention):
            reads = ", ".join(f"{other} {positions.get(other, 0)}" for other in alike)
            raise SiteError(
                f"not every position is read by {path} ({reads} positions): they are experts; leave `mlp` out"
            )


def _check_pattern(target: nn.Module, found: Sequence[Site], pattern: str) -> None:
    if any(is_asked(site, pattern) for site in found):
        return
    others = [name for name, _ in target.named_modules() if fnmatchcase(name, pattern)]
    if not others:
        alike = get_close_matches(pattern, [*KINDS, *(site.path for site in found)], 1)
        meant = f", did you mean {alike[0]}?" if alike else ";"
        raise SiteError(
            f"the site pattern {pattern!r} (--ablation.sites) matches no module{meant} The projections that ran are "
            f"{_candidates(found)}"
        )
    module = target.get_submodule(others[0])
    reason = "which is no projection, but a site is (--ablation.sites)"
    if features(module) is not None:
        reason = "which didn't run by itself: a fused implementation goes past it"
    raise SiteError(f"the site {others[0]!r} is a {type(module).__name__}, {reason}")


def _side(word: str) -> str:
    """The side of the sites that a word asks for."""
    if word in KINDS:
        return word if word in ROLES else {"residual": "output", "experts": f"{EXPERT}*"}.get(word, "input")
    return word.partition(":")[2] if ":" in word else "input"


def _check_output(target: nn.Module, found: Sequence[Site], word: str) -> None:
    if any(is_asked(site, word) for site in found):
        return
    pattern, side = word.partition(":")[0], _side(word)
    known = [site.name for site in found if fnmatchcase(site.side, side)]
    if side not in ("output", *ROLES) and not side.startswith(EXPERT):
        reason = f"a side is output, {', '.join(ROLES)}, {EXPERT}0, {EXPERT}1 ..., or none for an input"
    elif side.startswith(EXPERT):
        reason = "no experts ran that share a module and are computed one by one"
    elif side in ROLES and not known:
        reason = (
            f"no projection module gives attention its {side}: it goes through a fused implementation or bare weights, "
            "or is written into a tensor piece by piece"
        )
    elif word not in KINDS and not any(fnmatchcase(name, pattern) for name, _ in target.named_modules()):
        reason = "it matches no module"
    else:
        reason = "no module of these ran and returned features alone, or in the first place of a tuple"
    others = f"; it has {few(known)}" if known else ""
    raise SiteError(f"the target has no site {word!r} (--ablation.sites): {reason}{others}")


def _candidates(found: Sequence[Site]) -> str:
    return few(f"{site.name} ({site.width})" for site in found)
