"""A target under an ablation: the edits of its sites, and `ablated`, which needs no Trainer."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ablate.calibration import Calibration
from lightning_ablate.choices import Only
from lightning_ablate.errors import ConfigError, SiteError, StatisticsError, few
from lightning_ablate.methods import Ablation, AblationMethod, Batch, Edit, Replacement, Source, method_of
from lightning_ablate.seeds import digest
from lightning_ablate.sites import Site, check_mask, given_for, hooked
from lightning_ablate.sites.experts import experts_of
from lightning_ablate.sites.site import EXPERT, device_of, features
from lightning_ablate.statistics import SiteStatistics
from lightning_ablate.statistics.base import by_example


@contextmanager
def ablated(
    target: nn.Module,
    masks: Mapping[str, Tensor] | None = None,
    method: AblationMethod | str = "zero",
    calibration: Calibration | None = None,
    source: Mapping[str, Any] | None = None,
    *,
    heads: Mapping[str, Sequence[int]] | None = None,
    neurons: Mapping[str, Sequence[int]] | None = None,
    positions: Tensor | None = None,
    beyond: bool = False,
) -> Iterator[None]:
    """Ablates a target inside the block: forward passes, generation, a training loop of one's own.

    Args:
        target: the model; it is left as it was, whatever happens.
        masks: path of a projection (``h.3.attn.c_proj``) → mask ``(neurons,)`` bool, for every use of it. A module's
            output is ``h.3:output``, an expert ``h.3.mlp.experts:expert0``. A calibration's name (``path#1``) stands
            for one use of a module that runs several times, and it knows parts of outputs (``h.3.attn.c_attn:query``).
        method: what takes the neurons' place, or its name.
        calibration: the statistics that the method needs, see :meth:`Calibration.load`; StatisticsError without them.
        source: another input, from which ``resample-partner`` and its like take activations, as keyword arguments of
            the target: as many examples as run inside, or one for all. Its ``attention_mask`` tells padding.
        heads: path → which heads, beside the masks. A calibration knows how many heads a site has, also one without
            statistics: ``Calibration(sites=find_sites(target, example))``.
        neurons: path → which neurons, beside the masks.
        positions: where they are ablated, ``(batch, seq)`` or ``(1, seq)`` bool; None for everywhere. Positions count
            from the beginning of a sequence, also in generation, with a cache or without: a mask of a prompt's length
            reaches no generated token.
        beyond: whether they are also ablated behind the last of these positions, as in what is generated.

    Raises:
        SiteError: if a path names no projection, or a mask, head or neuron isn't one of its own; at the end, if a
            projection never ran inside; when a backward pass would undo the ablation (gradient checkpointing).
        ConfigError: if the method needs a source and got none, or goes by positions where a cache hides them.
    """
    chosen, calibration = method_of(method), calibration or Calibration()
    if (chosen.source is None) != (source is None):
        needs = "no `source`, and got one" if chosen.source is None else "a `source` to resample from, and got none"
        raise ConfigError(f"{chosen.name} needs {needs}")
    widths = {name: features(module) for name, module in target.named_modules()}
    located = {site.path for site in calibration.sites if site.end == "input"}
    known = [Site(name, width) for name, width in widths.items() if width is not None and name not in located]
    known += calibration.sites
    others = {name for name in masks or {} if _is_other(target, name)} - {s.name.partition("#")[0] for s in known}
    known += [Site(name, torch.as_tensor(mask).numel()) for name, mask in (masks or {}).items() if name in others]
    units = Only(heads, neurons) if masks is None or heads or neurons else None
    masks = masks or {}
    given = {**masks, **(heads or {}), **(neurons or {})}
    if strange := set(given) - {name for site in known for name in (site.name, site.name.partition("#")[0])}:
        raise SiteError(
            f"the target has no site {min(strange)!r}; it is named by the path of a linear module, in `masks` also of "
            "any module with `:output` behind it, or of experts with `:expert0`; heads and neurons of outputs, and "
            "each use of a module that runs several times (path#1), by a calibration that knows them"
        )
    if unknown := {site.name for site in known if site not in calibration.sites} & set(heads or ()):
        raise SiteError(
            f"how many heads {min(unknown)} has isn't known here: give a mask in place of `heads`, or a calibration, "
            "such as calibration=Calibration(sites=find_sites(target, example))"
        )
    found = dict[Site, Tensor]()
    selections = [] if units is None else units.selections(known, [], [])
    for site in (site for site in known if given_for(site, given) is not None):
        own = given_for(site, masks)
        mask = torch.zeros(site.width, dtype=torch.bool) if own is None else torch.as_tensor(own)
        check_mask(mask, site, "ablated()")
        found[site] = mask if units is None else mask.cpu() | units.mask(selections[0], site)
    batch, passed = Batch(torch.zeros(0)), [0]  # positions that a cache holds of this pass's sequence
    if positions is not None:
        batch.places = partial(_places, positions, beyond, passed)
    if source is not None:
        read = _read(target, found, source)
        batch.sources = defaultdict(lambda: read)  # whatever kind and seed a method asks for
    edits = edits_of(chosen, found, calibration, device_of(target), batch=batch)
    with ExitStack() as stack:
        if chosen.needs_batch or positions is not None:
            begin = partial(_begin, batch, chosen, passed)
            stack.callback(target.register_forward_pre_hook(begin, with_kwargs=True).remove)
            stack.callback(target.register_forward_hook(partial(_end, batch), always_call=True).remove)
        ran = stack.enter_context(hooked(target, edits))
        yield
    if passed_by := [site.name for site in edits if not ran[site]]:
        raise SiteError(
            f"{few(passed_by)} never ran inside, so nothing was ablated there: run the target in the block, and not by "
            "a fused implementation, a traced copy or bare weights that pass its modules by"
        )


def edits_of(
    method: AblationMethod,
    masks: Mapping[Site, Tensor],
    calibration: Calibration,
    device: torch.device,
    seed: int | None = None,
    batch: Batch | None = None,
    constants: dict[tuple[str, Site], Replacement] | None = None,
) -> dict[Site, Edit]:
    """What a method does at each site. A site whose mask ``(neurons,)`` bool holds no True is left out.

    ``seed`` seeds the method's random draws; ``batch`` is what it may know of the examples; ``constants`` keeps the
    replacements that all conditions share. StatisticsError if a statistic that the method needs is missing.
    """
    batch, constants, edits = batch or Batch(), {} if constants is None else constants, dict[Site, Edit]()
    known = {site.name: masks.get(site, torch.zeros(site.width, dtype=torch.bool)) for site in calibration.sites}
    whole = digest({name: mask.cpu() for name, mask in known.items()})
    for site, mask in masks.items():
        if bool(mask.any()):
            statistics = calibration[site] if site in calibration.statistics else SiteStatistics(site.name, {})
            ablation = Ablation(site, mask.to(device), statistics, seed, batch, whole)
            try:
                replacement = constants.get((method.name, site)) or method.prepare(ablation)
            except StatisticsError as error:
                raise StatisticsError(f"the method {method.name!r} {error}") from error
            if method.constant:
                constants[method.name, site] = replacement
            edits[site] = method.edit(ablation, replacement, batch.places and partial(batch.places, site))
    return edits


def _is_other(target: nn.Module, name: str) -> bool:
    """Whether it names the output of a module, or one of its experts."""
    path, _, side = name.partition(":")
    module = dict(target.named_modules()).get(path)
    if module is None or not side.startswith(EXPERT):
        return module is not None and side == "output"
    return side in {f"{EXPERT}{number}" for number in range(experts_of(module) or 0)}


def _read(target: nn.Module, sites: Iterable[Site], source: Mapping[str, Any]) -> dict[Site, Source]:
    """The activations of the sites on another input."""
    found: dict[Site, Source] = {}
    mask = source.get("attention_mask", torch.ones(len(next(iter(source.values()))), 1))

    def keep(site: Site, activations: Tensor) -> None:
        found[site] = Source(*(one.clone() for one in by_example(activations, mask.to(activations.device).bool())))

    with torch.no_grad(), hooked(target, {site: partial(keep, site) for site in sites}, once=True):
        target(**source)
    return found


def _places(positions: Tensor, beyond: bool, passed: Sequence[int], site: Site, shape: torch.Size) -> Tensor:
    """Those of ``positions`` that a pass runs, bool ``(batch, ..., 1)``; SiteError for another number of examples."""
    if len(positions) not in (1, shape[0]):
        raise SiteError(
            f"`positions` are {tuple(positions.shape)}, expected one row, or {shape[0]}, as many as {site.name} reads"
        )
    count = shape[1:-1].numel()
    own = positions[:, passed[0] : passed[0] + count].bool()
    own = torch.nn.functional.pad(own, (0, count - own.shape[1]), value=beyond)
    return own.expand(shape[0], -1).reshape(*shape[:-1], 1)


def _begin(
    batch: Batch,
    method: AblationMethod,
    passed: list[int],
    target: nn.Module,
    inputs: Any,
    named: Mapping[str, Any],
) -> None:
    """Numbers the examples and positions that run; ConfigError if a cache hides those that a method must see."""
    first = next(one for one in (*inputs, *named.values()) if isinstance(one, Tensor))
    caches = [one for one in named.values() if hasattr(one, "get_seq_length")]
    try:
        passed[0] = max([int(one.get_seq_length()) for one in caches], default=0)
    except ValueError as error:  # it holds states alone
        raise ConfigError(f"a cache doesn't tell how many positions it holds ({error}); use_cache=False") from error
    if passed[0] and method.needs_batch:
        raise ConfigError(f"{method.name} goes by positions, which a cache hides in generation; use_cache=False")
    batch.examples = torch.arange(len(first), device=first.device)
    for source in batch.sources["", 0].values() if method.source else ():
        held, expected = len(source.activations), len(first)
        if held not in (1, expected):
            raise ConfigError(f"`source` holds {held} examples, expected {expected}, as many as the target runs, or 1")


def _end(batch: Batch, *_: Any) -> None:
    batch.examples = torch.zeros(0)  # outside of the target's own pass examples can't be told apart
