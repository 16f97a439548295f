"""Refuses what is asked for and isn't there, or can't be read; each error says why, and what to do."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from lightning_ablate.errors import SiteError, few
from lightning_ablate.sites.dataflow import Trace
from lightning_ablate.sites.outputs import ROLES
from lightning_ablate.sites.paths import modules_around, shape
from lightning_ablate.sites.site import EXPERT, Site, features
from lightning_ablate.sites.words import KINDS, is_asked, side_of


def check_word(target: nn.Module, seen: Trace, read: Sequence[Site], found: Sequence[Site], word: str) -> None:
    """Raises SiteError if a trace has no site that a word asks for; ``read`` are inputs, ``found`` all sites."""
    if word in ("residual", "experts", *ROLES) or ":" in word:
        _check_output(target, found, word)
    elif word in KINDS:
        _check_kind(target, seen, read, word)
    else:
        _check_pattern(target, read, word)


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
    within = modules_around(attention)
    for name, parameter in target.get_submodule(layer).named_parameters(prefix=layer):
        unread = parameter.ndim == 3 and min(parameter.shape) > 1 and name.rpartition(".")[0] not in seen.experts
        if unread and not name.startswith(within):
            raise SiteError(
                f"the experts of {layer} are one parameter {name} {tuple(parameter.shape)}, whose input can't be read "
                "or replaced, as no expert is computed by a product of its own; leave `mlp` out"
            )
    projections = [n for n, m in target.get_submodule(layer).named_modules(prefix=layer) if features(m) is not None]
    for path in mlps:
        alike = [name for name in projections if shape(name) == shape(path)]
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


def _check_output(target: nn.Module, found: Sequence[Site], word: str) -> None:
    if any(is_asked(site, word) for site in found):
        return
    pattern, side = word.partition(":")[0], side_of(word)
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
