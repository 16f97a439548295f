"""The words and patterns by which sites are asked for."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from lightning_ablate.sites.experts import experts_of
from lightning_ablate.sites.outputs import ROLES
from lightning_ablate.sites.site import EXPERT, Site, features

KINDS = {
    "attention": ("self-attention", "cross-attention"),
    "self-attention": ("self-attention",),
    "cross-attention": ("cross-attention",),
    "mlp": ("mlp", "expert"),
    "experts": ("expert",),
    **{word: (word,) for word in ("residual", *ROLES)},
}


def side_of(word: str) -> str:
    """The side of the sites that a word asks for."""
    if word in KINDS:
        return word if word in ROLES else {"residual": "output", "experts": f"{EXPERT}*"}.get(word, "input")
    return word.partition(":")[2] if ":" in word else "input"


def is_asked(site: Site, word: str) -> bool:
    """Whether this site is one of those that a word of ``which`` asks for, see :func:`find_sites`."""
    if word in KINDS:
        return site.kind in KINDS[word]
    return fnmatchcase(site.side, side_of(word)) and fnmatchcase(site.path, word.partition(":")[0])


def is_covered(target: nn.Module, word: str, sites: Sequence[Site], which: Sequence[str]) -> bool:
    """Whether ``sites``, which were found in the target for ``which``, are all that a word asks for."""
    if word in which:
        return True
    if word in KINDS:
        return set(KINDS[word]) <= {kind for known in which for kind in KINDS.get(known, ())}
    pattern, side = word.partition(":")[0], side_of(word)
    known = {site.path for site in sites if fnmatchcase(site.side, side)}
    asked = {n for n, module in target.named_modules() if fnmatchcase(n, pattern)}
    if side.startswith(EXPERT):
        asked = {name for name in asked if experts_of(target.get_submodule(name)) is not None}
    if side == "input":
        asked = {name for name in asked if features(target.get_submodule(name)) is not None}
    return bool(asked) and asked <= known
