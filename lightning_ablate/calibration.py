"""What a run knows of a target's sites: statistics, learned values, and what units are worth."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from lightning_ablate.errors import StatisticsError, TargetError, few, loading
from lightning_ablate.identity import fingerprint
from lightning_ablate.positions import ALL, Positions
from lightning_ablate.sites import Basis, Site, exact_device, is_asked, is_covered, weights_of
from lightning_ablate.sites.bases import in_basis, saved_site, site_of
from lightning_ablate.sites.site import device_of
from lightning_ablate.statistics import ActivationStatistic, Covariance, SiteStatistics


class AtSite(Mapping[str, Tensor]):
    """Of values by name and site, those of one site by name; nothing is copied."""

    def __init__(self, values: Mapping[str, Mapping[Site, Tensor]], site: Site) -> None:
        self._values, self._site = values, site

    def __getitem__(self, name: str) -> Tensor:
        """The site's value of this name; KeyError if there is none."""
        return self._values[name][self._site]

    def __iter__(self) -> Iterator[str]:
        """The names under which the site has a value."""
        return (name for name, by_site in self._values.items() if self._site in by_site)

    def __len__(self) -> int:
        """How many there are."""
        return sum(1 for _ in self)


class Calibration:
    """The statistics of a target's sites, as methods and choices ask for them.

    Only complete statistics enter it: those of whole epochs, merged over all processes.

    Attributes:
        which: kinds of sites, and patterns of their paths, see :func:`~lightning_ablate.sites.find_sites`.
        sites: the sites that were found.
        statistics: site → class → statistic.
        learned: name of a method → site → the values it learned, ``(neurons,)`` float32. A method that learns for each
            condition has a name for each, see :meth:`~lightning_ablate.methods.ConditionalTuned.key`.
        attributed: name of a method → site → what each unit is worth, see
            :func:`~lightning_ablate.attribution.table_of`.
        at: the positions whose activations the statistics are of.
        bases: word of ``which``, or pattern of paths → the basis of the sites that it asks for.
    """

    def __init__(
        self,
        which: Sequence[str] = ("attention",),
        sites: Sequence[Site] = (),
        at: Positions = ALL,
        bases: Mapping[str, Basis] | None = None,
    ) -> None:
        self.which, self.at, self.bases = tuple(which), at, dict(bases or {})
        self.learned: dict[str, dict[Site, Tensor]] = {}
        self.attributed: dict[str, dict[Site, Tensor]] = {}
        self.locate(sites)

    def __getitem__(self, site: Site) -> SiteStatistics:
        """The statistics of a site, and the values learned for it."""
        return self.with_learned(site, AtSite(self.learned, site))

    def with_learned(self, site: Site, learned: Mapping[str, Tensor]) -> SiteStatistics:
        """The statistics of a site, with these values in place of the learned ones."""
        weights = self._weights.get(site)
        weight = None if weights is None else weights[0].detach() if weights[2] else weights[0].detach().T
        return SiteStatistics(site.name, self.statistics[site], learned, AtSite(self.attributed, site), weight)

    def locate(self, sites: Iterable[Site], target: nn.Module | None = None) -> None:
        """Takes the sites that were found in a target, each in its basis, and their projections' weights.

        SiteError for a basis that doesn't fit.
        """
        self.sites = tuple(in_basis(sites, self.bases))
        # a projection that runs several times has one weight
        self._weights = {} if target is None else {s: weights_of(target, replace(s, uses=1)) for s in self.sites}
        self.statistics: dict[Site, dict[type[ActivationStatistic], ActivationStatistic]] = {s: {} for s in self.sites}

    def add(self, site: Site, statistic: ActivationStatistic) -> None:
        """Takes a complete statistic."""
        self.statistics[site][type(statistic)] = statistic

    def leave_out(self, sites: Sequence[Site]) -> None:
        """Forgets sites of which nothing can be known; StatisticsError if none is left."""
        if not {*self.sites} - {*sites}:
            raise StatisticsError(
                f"no calibration position is routed to any of the experts, {few(one.name for one in sites)}; calibrate "
                "on more data, or ablate others (--ablation.sites)"
            )
        self.sites = tuple(site for site in self.sites if site not in sites)
        for site in sites:
            del self.statistics[site]

    @property
    def ridges(self) -> dict[str, dict[str, float]]:
        """Class of covariances → name of a site → the ridge chosen there."""
        found: dict[str, dict[str, float]] = {}
        for site, statistics in self.statistics.items():
            for kind, statistic in statistics.items():
                if isinstance(statistic, Covariance):
                    found.setdefault(kind.__name__, {})[site.name] = statistic.ridge
        return found

    def reduce(self) -> None:
        """Frees what statistics no longer need, once the neurons are described."""
        for statistics in self.statistics.values():
            for statistic in statistics.values():
                statistic.reduce()

    def state_dict(self) -> dict[str, Any]:
        """The kinds of sites, and for each site its statistics and learned values, as tensors on the CPU."""
        sites = [
            {
                "site": saved_site(site),
                "statistics": {
                    _key(kind): {name: _alone(value) for name, value in found.state_dict().items()}
                    for kind, found in statistics.items()
                },
                "learned": {name: values[site].cpu() for name, values in self.learned.items() if site in values},
                "attributed": {name: values[site].cpu() for name, values in self.attributed.items()},
            }
            for site, statistics in self.statistics.items()
        ]
        return {"which": list(self.which), "sites": sites, "at": self.at}

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Any],
        target: nn.Module,
        kinds: Iterable[type[ActivationStatistic]] | None = None,
        which: Sequence[str] | None = None,
        at: Positions | None = None,
        bases: Mapping[str, Basis] | None = None,
    ) -> Self:
        """Takes sites and statistics from a :meth:`state_dict` of the same target.

        Args:
            state: the state.
            target: the target, which says which paths a pattern covers.
            kinds: the statistics to take, if they are there; None takes all.
            which: the sites to take; None takes all.
            at: the positions of which the statistics must be; None takes any.
            bases: those of the sites, see :class:`Calibration`; a state doesn't hold them.

        Raises:
            StatisticsError: if the state lacks a site, is of other positions or bases, or another version of this
                package made it.
        """
        if "sites" not in state:
            raise StatisticsError("the checkpoint is of an older version of this package; run `fit` again")
        which, gathered = tuple(state["which"]) if which is None else which, state.get("at", ALL)
        saved = {site_of(entry["site"], bases or {}, which): entry for entry in state["sites"]}
        if at not in (None, gathered):
            raise StatisticsError(
                f"the checkpoint's statistics are of the positions {gathered!r}, expected those of {at!r}; change "
                "--ablation.positions and --ablation.calibrate_at, or run `fit` again"
            )
        for word in which:
            if not is_covered(target, word, tuple(saved), state["which"]):
                raise StatisticsError(
                    f"the checkpoint doesn't hold the statistics of all sites {word!r}, it holds "
                    f"{', '.join(site.name for site in saved)}; name these with --ablation.sites, or run `fit` again"
                )
        made, device = cls(which, at=gathered, bases=bases), exact_device(device_of(target))
        made.locate([site for site in saved if any(is_asked(site, word) for word in which)], target)
        if not made.sites:
            raise StatisticsError("the checkpoint holds no site: its calibration wasn't complete; run `fit` again")
        known = {_key(kind): kind for kind in (_all(ActivationStatistic) if kinds is None else kinds)}  # type: ignore[type-abstract]
        for site in made.sites:
            for name, tensors in saved[site]["statistics"].items():
                if name in known:
                    statistic = known[name].of(site)
                    _check_shapes(site, statistic, tensors)
                    statistic.load_state_dict(dict(tensors))
                    made.add(site, statistic.to(device))
        for kind, found in (("learned", made.learned), ("attributed", made.attributed)):
            for site in made.sites:
                for name, values in saved[site].get(kind, {}).items():
                    found.setdefault(name, {})[site] = values.to(device)
        return made

    @classmethod
    def load(cls, path: Path | str, target: nn.Module, bases: Mapping[str, Basis] | None = None) -> Self:
        """What ``fit`` left for this target in a run's folder, or in another checkpoint that Lightning wrote then.

        ``bases`` are those of the run. TargetError if it can't be read, or is of another target; StatisticsError if it
        holds no calibration.
        """
        path = Path(path)
        state = saved_state(path / "ablation.ckpt" if path.is_dir() else path)
        check_target(state, fingerprint(target))
        with loading(str(path), StatisticsError):
            return cls.from_state_dict(state["calibration"], target, bases=bases)


def saved_state(path: Path | str, *, mmap: bool = False) -> dict[str, Any]:
    """What the callback of a run has left in a checkpoint, empty if nothing; no code in the file is run."""
    with loading(str(path), TargetError):
        saved: dict[str, dict[str, Any]] = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)[
            "callbacks"
        ]
        return next((state for state in saved.values() if "calibration" in state), {})


def check_target(state: Mapping[str, Any], target: str) -> None:
    """Refuses a callback's state without a calibration (StatisticsError), or of another fingerprint (TargetError)."""
    if "calibration" not in state:
        raise StatisticsError(
            "validate needs the statistics of a calibration: name the checkpoint that `fit` left (--ckpt_path), or run "
            "`fit`"
        )
    if state.get("target") != target:
        raise TargetError(
            f"the checkpoint is of another target, with the weights {state.get('target')!s:.12}, here are "
            f"{target[:12]}; run `fit` on this one"
        )


def _alone(value: Tensor) -> Tensor:
    """On the CPU; a part of a larger tensor is copied, as a file would hold the whole."""
    value = value.detach().cpu()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def _key(kind: type[ActivationStatistic]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _all(kind: type[ActivationStatistic]) -> list[type[ActivationStatistic]]:
    return [kind, *(found for subclass in kind.__subclasses__() for found in _all(subclass))]


def _check_shapes(site: Site, statistic: ActivationStatistic, saved: Mapping[str, Tensor]) -> None:
    """Refuses states of another version of the package; only a first dimension may differ, as it follows from data."""
    for name, own in statistic.state_dict(keep_vars=True).items():
        if name in saved and (saved[name].ndim != own.ndim or saved[name].shape[1:] != own.shape[1:]):
            raise StatisticsError(
                f"the checkpoint holds {type(statistic).__name__} of {site.name} as {tuple(saved[name].shape)}, "
                f"expected {tuple(own.shape)}: it is of another version of this package; run `fit` again"
            )
