"""A target under an ablation, without a Trainer."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_ablate.calibration import Calibration
from lightning_ablate.errors import ConfigError, SiteError, few
from lightning_ablate.methods import Ablation, AblationMethod, Edit, method_of
from lightning_ablate.sites import Site, check_mask, given_for, hooked
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
            or by name of a calibration's site (``path#1``, the second use of a module that runs several times), which
            goes before the path: bool ``(neurons,)``.
        method: what takes their place, or its name.
        calibration: the statistics that the method needs (see :meth:`Calibration.load`), or StatisticsError.

    Raises:
        SiteError: if a path names no projection, or a mask doesn't fit it; at the end, if a projection never ran
            inside, or gradient checkpointing will recompute it behind the block.
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
    located = {site.path for site in calibration.sites}
    known = [Site(name, width) for name, width in widths.items() if width is not None and name not in located]
    known += calibration.sites
    if strange := set(masks) - {name for site in known for name in (site.name, site.path)}:
        raise SiteError(
            f"the target has no projection {min(strange)!r}; a site is named by the path of a linear module, and each "
            "use of one that runs several times (path#1) by a calibration that knows it"
        )
    for site in known:
        if (given := given_for(site, masks)) is None:
            continue
        mask = torch.as_tensor(given)
        check_mask(mask, site, "ablated()")
        mask = mask.to(next(target.parameters()).device)
        statistics = calibration[site] if site in calibration.statistics else SiteStatistics(site.name, {})
        edits[site] = Edit(mask, chosen.prepare(Ablation(site, mask, statistics, None)))
    with hooked(target, edits) as ran:
        yield
    if passed_by := [site.name for site in edits if ran[site.path] <= site.use]:
        raise SiteError(
            f"{few(passed_by)} never ran inside, so nothing was ablated there: run the target in the block, and not by "
            "a fused implementation, a traced copy or bare weights that pass its modules by"
        )
