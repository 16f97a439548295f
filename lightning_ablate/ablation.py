"""A target under an ablation, without a Trainer."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ablate.calibration import Calibration, digest
from lightning_ablate.errors import ConfigError, SiteError, few
from lightning_ablate.methods import Ablation, AblationMethod, Batch, Edit, Source, method_of
from lightning_ablate.sites import Site, check_mask, given_for, hooked
from lightning_ablate.sites.site import device_of, features
from lightning_ablate.statistics import SiteStatistics
from lightning_ablate.statistics.base import by_example


@contextmanager
def ablated(
    target: nn.Module,
    masks: Mapping[str, Tensor],
    method: AblationMethod | str = "zero",
    calibration: Calibration | None = None,
    source: Mapping[str, Any] | None = None,
) -> Iterator[None]:
    """Ablates a target for whatever runs it inside: forward passes, generation, a training loop of one's own.

    Args:
        target: the model; it is left as it was, whatever happens.
        masks: masks ``(neurons,)`` bool by path of a site's projection (``h.3.attn.c_proj``), for every use of it; or
            by a calibration's name (``path#1``), for one use of a module that runs several times, which wins.
        method: what takes their place, or its name.
        calibration: the statistics that the method needs (see :meth:`Calibration.load`), or StatisticsError.
        source: an input that is resampled from (``resample-partner`` and its like), as keyword arguments of the target:
            as many examples as run inside, or one for all; an ``attention_mask`` tells its padding.

    Raises:
        SiteError: if a path names no projection, or a mask doesn't fit; at the end, if a projection never ran inside,
            or a backward pass outside the block would undo the ablation.
        ConfigError: if the method needs a source and got none, or goes by positions where a cache hides them.
    """
    chosen, calibration = method_of(method), calibration or Calibration()
    if (chosen.source is None) != (source is None):
        needs = "no `source`, and got one" if chosen.source is None else "a `source` to resample from, and got none"
        raise ConfigError(f"{chosen.name} needs {needs}")
    widths = {name: features(module) for name, module in target.named_modules()}
    located = {site.path for site in calibration.sites}
    known = [Site(name, width) for name, width in widths.items() if width is not None and name not in located]
    known += calibration.sites
    if strange := set(masks) - {name for site in known for name in (site.name, site.path)}:
        raise SiteError(
            f"the target has no projection {min(strange)!r}; a site is named by the path of a linear module, and each "
            "use of one that runs several times (path#1) by a calibration that knows it"
        )
    found = {site: torch.as_tensor(given) for site in known if (given := given_for(site, masks)) is not None}
    for site, mask in found.items():
        check_mask(mask, site, "ablated()")
    every = {s.name: found.get(s, torch.zeros(s.width, dtype=torch.bool)).cpu() for s in calibration.sites}
    whole = digest(every)
    batch, edits, device = Batch(torch.zeros(0)), dict[Site, Edit](), device_of(target)
    if source is not None:
        read = _read(target, found, source)
        batch.sources = defaultdict(lambda: read)  # whatever kind and seed a method asks for
    for site, mask in found.items():
        statistics = calibration[site] if site in calibration.statistics else SiteStatistics(site.name, {})
        ablation = Ablation(site, mask.to(device), statistics, None, batch, whole)
        edits[site] = Edit(ablation.mask, chosen.prepare(ablation))
    with ExitStack() as stack:
        if chosen.needs_batch:
            begin = partial(_begin, batch, chosen)
            stack.callback(target.register_forward_pre_hook(begin, with_kwargs=True).remove)
            stack.callback(target.register_forward_hook(partial(_end, batch), always_call=True).remove)
        ran = stack.enter_context(hooked(target, edits))
        yield
    if passed_by := [site.name for site in edits if ran[site.path] <= site.use]:
        raise SiteError(
            f"{few(passed_by)} never ran inside, so nothing was ablated there: run the target in the block, and not by "
            "a fused implementation, a traced copy or bare weights that pass its modules by"
        )


def _read(target: nn.Module, sites: Iterable[Site], source: Mapping[str, Any]) -> dict[Site, Source]:
    """What the sites do on an input."""
    found: dict[Site, Source] = {}
    mask = source.get("attention_mask", torch.ones(len(next(iter(source.values()))), 1))

    def keep(site: Site, activations: Tensor) -> None:
        found[site] = Source(*(one.clone() for one in by_example(activations, mask.to(activations.device).bool())))

    with torch.no_grad(), hooked(target, {site: partial(keep, site) for site in sites}, once=True):
        target(**source)
    return found


def _begin(batch: Batch, method: AblationMethod, target: nn.Module, inputs: Any, named: Mapping[str, Any]) -> None:
    """Notes how many examples run, as their order is their number; ConfigError if a cache hides their positions."""
    first = next(one for one in (*inputs, *named.values()) if isinstance(one, Tensor))
    if any(one.get_seq_length() for one in named.values() if hasattr(one, "get_seq_length")):
        raise ConfigError(f"{method.name} goes by positions, which a cache hides in generation; use_cache=False")
    batch.examples = torch.arange(len(first), device=first.device)
    for source in batch.sources["", 0].values() if method.source else ():
        held, expected = len(source.activations), len(first)
        if held not in (1, expected):
            raise ConfigError(f"`source` holds {held} examples, expected {expected}, as many as the target runs, or 1")


def _end(batch: Batch, *_: Any) -> None:
    batch.examples = torch.zeros(0)  # what runs outside of the target's own pass can't be told apart
