"""A target under an ablation, without a Trainer."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_ablate.calibration import Calibration
from lightning_ablate.errors import ConfigError, SiteError
from lightning_ablate.methods import Ablation, AblationMethod, Edit, method_of
from lightning_ablate.sites import Site, hooked
from lightning_ablate.sites.dataflow import features
from lightning_ablate.statistics import SiteStatistics


@contextmanager
def ablated(
    target: nn.Module,
    masks: Mapping[str, Tensor] | Mapping[Site, Edit],
    method: AblationMethod | str = "zero",
    calibration: Calibration | None = None,
    *,
    once: bool = False,
) -> Iterator[None]:
    """Ablates a target for whatever runs it inside: forward passes, generation, a training loop of one's own.

    Args:
        target: the model; it is left as it was, whatever happens.
        masks: by path of a site's projection (``h.3.attn.c_proj``) which of its neurons are ablated whenever it runs,
            or by name of a calibration's site: bool ``(neurons,)``; or by site an :class:`Edit` that is made already,
            as the sweep does.
        method: what takes their place, or its name.
        calibration: the statistics that the method needs (see :meth:`Calibration.load`).
        once: whether a single forward pass is expected inside.

    Raises:
        SiteError: if a path names no projection, or a mask doesn't fit it.
        StatisticsError: if the method needs statistics that aren't there.
        ConfigError: if the method depends on which examples and positions are run, which only a sweep knows.

    Example:
        >>> target = nn.Sequential(nn.Identity(), nn.Linear(2, 1, bias=False))
        >>> mask = torch.tensor([True, False])
        >>> with ablated(target, {"1": mask}), torch.no_grad():
        ...     bool(target(torch.tensor([[5.0, 0.0]])) == 0)
        True
    """
    chosen = method_of(method)
    edits: dict[Site, Edit] = {}
    for place, given in masks.items():
        if isinstance(given, Edit):
            edits[place] = given  # type: ignore[index]
        else:
            site = _site(target, str(place), given, calibration)
            edits[site] = _edit(target, site, given, chosen, calibration)
    with hooked(target, edits, once=once):
        yield


def _site(target: nn.Module, path: str, mask: Tensor, calibration: Calibration | None) -> Site:
    known = {site.name: site for site in (calibration.sites if calibration is not None else ())}
    widths = {name: features(module) for name, module in target.named_modules()}
    if path in known:
        site = known[path]
    elif (width := widths.get(path)) is not None:
        site = Site(path, width)
    else:
        raise SiteError(
            f"the target has no projection {path!r}; a site is named by the path of a linear module, and of one that "
            "runs several times, each use (#1) by a calibration that knows it"
        )
    if mask.dtype != torch.bool or mask.shape != (site.width,):
        raise SiteError(
            f"the mask of {path} is {tuple(mask.shape)} {mask.dtype}, expected ({site.width},) torch.bool, True for "
            "the neurons to ablate"
        )
    return site


def _edit(target: nn.Module, site: Site, mask: Tensor, method: AblationMethod, calibration: Calibration | None) -> Edit:
    if method.needs_batch:
        raise ConfigError(
            f"{method.name} depends on which examples and positions are run, which only a sweep knows; expected a "
            "method that goes by the activations alone"
        )
    mask = mask.to(next(target.parameters()).device)
    known = calibration is not None and site in calibration.statistics
    statistics = calibration[site] if calibration is not None and known else SiteStatistics(site.name, {})
    return Edit(mask, method.prepare(Ablation(site, mask, statistics, None)))
