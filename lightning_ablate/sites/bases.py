"""Which sites have which basis, and how a checkpoint tells them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from lightning_ablate.errors import SiteError, StatisticsError, few
from lightning_ablate.sites.basis import Basis, Part
from lightning_ablate.sites.site import Site
from lightning_ablate.sites.words import is_asked


def in_basis(sites: Iterable[Site], bases: Mapping[str, Basis]) -> list[Site]:
    """The sites, each in the basis whose word asks for it; one that is in it already is left as it is.

    SiteError if a basis fits no site, or not one that it should.
    """
    sites, found = list(sites), list[Site]()
    if lost := [word for word in bases if sites and not any(is_asked(site, word) for site in sites)]:
        raise SiteError(
            f"no site is {lost[0]!r} (--ablation.bases), expected some of {few(site.name for site in sites)} "
            "(--ablation.sites)"
        )
    for site in sites:
        basis = _given(site, bases)
        if basis is None or basis is site.basis:
            found.append(site)
        elif site.basis is not None or basis.features not in (None, site.width):
            raise SiteError(
                f"the {basis.unit}s read activations of {basis.features} features, expected the whole of {site.name}, "
                f"which has {site.width} (--ablation.bases)"
            )
        else:
            found.append(replace(site, width=basis.width, heads=None, basis=basis))
    return found


def saved_site(site: Site) -> dict[str, Any]:
    """The fields of a site, with its basis as a digest, or as the numbers of a part."""
    saved = {one.name: getattr(site, one.name) for one in fields(site)}
    if site.basis is not None:
        saved["basis"] = list(site.basis.numbers) if isinstance(site.basis, Part) else site.basis.digest
    return saved


def site_of(saved: Mapping[str, Any], bases: Mapping[str, Basis], which: Sequence[str]) -> Site:
    """The site of :func:`saved_site`; without its basis if no word of ``which`` asks for it.

    StatisticsError unless one of ``bases`` is its own, if it has a digest.
    """
    basis, site = saved.get("basis"), Site(**{**saved, "basis": None})
    if isinstance(basis, list):
        return replace(site, basis=Part(tuple(basis)))
    if not any(is_asked(site, word) for word in which):
        return site
    given = _given(site, bases)
    if basis != (None if given is None else given.digest):
        raise StatisticsError(
            f"the checkpoint's statistics of {site.name} are in {'no' if basis is None else 'another'} basis, expected "
            f"{'none' if given is None else f'the {given.unit}s that are given'}; give that of the run "
            "(--ablation.bases, or `bases`), or run `fit` again"
        )
    return replace(site, basis=given)


def _given(site: Site, bases: Mapping[str, Basis]) -> Basis | None:
    return next((basis for word, basis in bases.items() if is_asked(site, word)), None)
