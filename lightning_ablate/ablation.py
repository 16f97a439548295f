"""A target under an ablation, without a Trainer."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_ablate.calibration import Calibration
from lightning_ablate.errors import ConfigError, SiteError
from lightning_ablate.methods import Ablation, AblationMethod, Edit, method_of
from lightning_ablate.sites import Site, check_mask, hooked
from lightning_ablate.sites.dataflow import features
from lightning_ablate.statistics import SiteStatistics


@contextmanager
def ablated(
    target: nn.Module,
    masks: Mapping[str, Tensor],
    method: AblationMethod | str = "zero",
    calibration: Calibration | None = None,
) -> Iterator[None]:
    """Ablates a target for whatever runs it inside: forward passes, generation, a training loop of one's own.

    Args:
        target: the model; it is left as it was, whatever happens.
        masks: by path of a site's projection (``h.3.attn.c_proj``) which of its neurons are ablated whenever it runs,
            or by name of a calibration's site: bool ``(neurons,)``.
        method: what takes their place, or its name.
        calibration: the statistics that the method needs (see :meth:`Calibration.load`), or StatisticsError.

    Raises:
        SiteError: if a path names no projection, or a mask doesn't fit it.
        ConfigError: if the method depends on which examples and positions are run, which only a sweep knows.
    """
    chosen, calibration = method_of(method), calibration or Calibration()
    edits: dict[Site, Edit] = {}
    if chosen.needs_batch:
        raise ConfigError(
            f"{chosen.name} depends on which examples and positions are run, which only a sweep knows; expected a "
            "method that goes by the activations alone"
        )
    widths = {name: features(module) for name, module in target.named_modules()}
    known = {name: Site(name, width) for name, width in widths.items() if width is not None}
    known |= {site.name: site for site in calibration.sites}
    for path, given in masks.items():
        if path not in known:
            raise SiteError(
                f"the target has no projection {path!r}; a site is named by the path of a linear module, and of one "
                "that runs several times, each use (#1) by a calibration that knows it"
            )
        site, mask = known[path], torch.as_tensor(given)
        check_mask(mask, site, "ablated()")
        mask = mask.to(next(target.parameters()).device)
        statistics = calibration[site] if site in calibration.statistics else SiteStatistics(path, {})
        edits[site] = Edit(mask, chosen.prepare(Ablation(site, mask, statistics, None)))
    with hooked(target, edits):
        yield
