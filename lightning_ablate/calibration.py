"""Gathers the statistics of every site, epoch by epoch."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ablate.errors import NonFiniteError, SiteError, StatisticsError
from lightning_ablate.sites import Site, find_sites, hooked, is_asked, is_covered
from lightning_ablate.statistics import ActivationStatistic, SiteStatistics


class Calibration:
    """The statistics of a target's sites: gathered here, saved here, and handed to the methods.

    Args:
        target: the model under study.
        kinds: the statistics asked for; those they need are added.
        which: kinds of sites, and patterns of their paths (see :func:`~lightning_ablate.sites.find_sites`).
        device: where they are gathered.

    Attributes:
        sites: where activations are read, once :meth:`find` or :meth:`load_state_dict` has told.
        learned: the values that a method learned, of each site, by the method's name.
    """

    def __init__(
        self,
        target: nn.Module,
        kinds: Iterable[type[ActivationStatistic]],
        which: Sequence[str] = ("attention",),
        device: torch.device | str = "cpu",
    ) -> None:
        self.target, self.which, self.device = target, tuple(which), torch.device(device)
        self.kinds = _with_needs(kinds)
        self.sites: tuple[Site, ...] = ()
        self.statistics: dict[Site, dict[type[ActivationStatistic], ActivationStatistic]] = {}
        self.learned: dict[str, dict[Site, Tensor]] = {}
        self._current: dict[Site, list[ActivationStatistic]] = {}
        self._epoch = 0

    def __getitem__(self, site: Site) -> SiteStatistics:
        """The statistics of one site, and what was learned for it."""
        return self.with_learned(site, {name: values[site] for name, values in self.learned.items()})

    def with_learned(self, site: Site, learned: Mapping[str, Tensor]) -> SiteStatistics:
        """The statistics of one site, and other values as those learned for it."""
        return SiteStatistics(site.name, self.statistics[site], learned)

    def find(self, run: Callable[[], object]) -> None:
        """Finds the sites by one forward pass.

        Raises:
            SiteError: if they can't be told.
        """
        self.sites = tuple(find_sites(self.target, run, self.which))
        self.statistics = {site: {} for site in self.sites}
        self.start(self._epoch)

    def start(self, epoch: int, anew: bool = True) -> None:
        """Makes the statistics that are gathered in this epoch, from 0; or goes on with those that are there."""
        self._epoch, kinds = epoch, [kind for kind in self.kinds if kind.epoch() == epoch]
        for site in self.sites:
            if anew:
                self.statistics[site] |= {kind: kind.of(site, self[site]).to(self.device) for kind in kinds}
            self._current[site] = [self.statistics[site][kind] for kind in kinds]

    @contextmanager
    def collecting(
        self, valid: Callable[[Site], Tensor | None], read: set[ActivationStatistic] | None = None
    ) -> Iterator[None]:
        """Reads every site during one forward pass.

        Args:
            valid: of a site, bool, broadcastable to ``(batch, seq)``, False at padding; None where nothing is padded.
            read: the statistics that have this input already, from a pass that failed; those that get it are added.

        Raises:
            SiteError: if a site did not run, or ran more than once.
            NonFiniteError: if an activation is NaN or infinite.
        """
        runs, known = dict.fromkeys(self.sites, 0), set() if read is None else read

        def update(site: Site, activations: Tensor) -> None:
            runs[site] += 1
            positions = valid(site)
            for statistic in self._current[site]:
                if statistic not in known:
                    with _whole(statistic):
                        statistic.update(activations, positions)
                    known.add(statistic)

        with hooked(self.target, self.sites, update):
            yield
        check_runs(runs)
        self._check_finite()

    @property
    def bytes(self) -> int:
        """What the statistics of all sites take, those of later epochs included."""
        with torch.device("meta"):  # those of later epochs
            later = {(kind, site): kind.of(site) for kind in self.kinds for site in self.sites}
        all_of_them = [self.statistics[site].get(kind, made) for (kind, site), made in later.items()]
        return sum(tensor.nbytes for statistic in all_of_them for tensor in statistic.state_dict().values())

    def finish(self) -> None:
        """Merges the ranks and checks what the epoch gathered; every rank must call it.

        Raises:
            StatisticsError: if nothing was gathered, or the epoch doesn't agree with the one before.
        """
        for site, statistics in self._current.items():
            for statistic in statistics:
                statistic.sync()
                try:
                    statistic.check()
                except StatisticsError as error:
                    raise StatisticsError(f"site {site.name}: {error}") from error
        self._current = {}

    def state_dict(self) -> dict[str, Any]:
        """What was asked for; and of each site, as tensors on the CPU, the statistics and what was learned."""
        sites = [
            {
                "site": asdict(site),
                "statistics": {kind.__name__: _on_cpu(found) for kind, found in statistics.items()},
                "learned": {name: values[site].cpu() for name, values in self.learned.items()},
            }
            for site, statistics in self.statistics.items()
        ]
        return {"which": list(self.which), "sites": sites}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the sites asked for, and their statistics, from a :meth:`state_dict`; those it lacks stay missing.

        Raises:
            StatisticsError: if it lacks a site.
        """
        if "sites" not in state:
            raise StatisticsError("the checkpoint is of an older version of this package; run `fit` again")
        saved = {Site(**entry["site"]): entry["statistics"] for entry in state["sites"]}
        learned = {Site(**entry["site"]): entry.get("learned", {}) for entry in state["sites"]}
        for word in self.which:
            if not is_covered(self.target, word, tuple(saved), state["which"]):
                raise StatisticsError(
                    f"the checkpoint doesn't hold the statistics of all sites {word!r}, it holds "
                    f"{', '.join(site.name for site in saved)}; name these with --ablation.sites, or run `fit` again"
                )
        self.sites = tuple(site for site in saved if any(is_asked(site, word) for word in self.which))
        self.statistics = {site: {} for site in self.sites}
        for site in self.sites:
            for kind in self.kinds:
                if kind.__name__ in saved[site]:
                    statistic = kind.of(site)
                    _check_shapes(site, statistic, saved[site][kind.__name__])
                    statistic.load_state_dict(dict(saved[site][kind.__name__]))
                    self.statistics[site][kind] = statistic.to(self.device)
        common = set.intersection(*(set(learned[site]) for site in self.sites)) if self.sites else set()
        self.learned = {name: {site: learned[site][name].to(self.device) for site in self.sites} for name in common}

    def _check_finite(self) -> None:
        sites = [site for site, statistics in self._current.items() if statistics]
        if not sites:
            return
        finite = torch.stack([torch.stack([s.finite() for s in self._current[site]]).all() for site in sites])
        if not bool(finite.all()):  # the one host synchronisation of a batch
            bad = [site.name for site, good in zip(sites, finite.tolist(), strict=True) if not good]
            raise NonFiniteError(
                f"activations at {bad[0]} are NaN or infinite ({len(bad)} of {len(sites)} sites); "
                "try another precision (--trainer.precision, --model.dtype), or look for it in the data or weights"
            )


def check_runs(runs: Mapping[Site, int]) -> None:
    """Raises SiteError unless every site ran exactly once in a forward pass."""
    for site, count in runs.items():
        if count != 1:
            raise SiteError(
                f"the site {site.name} ran {count} times in one forward pass, expected once, as when the sites were "
                "found: `evaluate` must run the target once, in the same way for every batch, and not compiled by "
                "torch.compile before"
            )


@contextmanager
def _whole(statistic: ActivationStatistic) -> Iterator[None]:
    """Takes back what an update has begun if it fails."""
    before = {name: value.clone() for name, value in statistic.metric_state.items() if isinstance(value, Tensor)}
    try:
        yield
    except BaseException:
        for name, value in before.items():
            setattr(statistic, name, value)
        raise


def _with_needs(kinds: Iterable[type[ActivationStatistic]]) -> list[type[ActivationStatistic]]:
    found: dict[type[ActivationStatistic], None] = {}
    for kind in kinds:
        found |= dict.fromkeys([*_with_needs(kind.needs), kind])
    return list(found)


def _check_shapes(site: Site, statistic: ActivationStatistic, saved: Mapping[str, Tensor]) -> None:
    """Refuses what another version of the package saved; how long the first dimension is, may follow from the data."""
    for name, own in statistic.state_dict(keep_vars=True).items():
        if name in saved and (saved[name].ndim != own.ndim or saved[name].shape[1:] != own.shape[1:]):
            raise StatisticsError(
                f"the checkpoint holds {type(statistic).__name__} of {site.name} as {tuple(saved[name].shape)}, "
                f"expected {tuple(own.shape)}: it is of another version of this package; run `fit` again"
            )


def _on_cpu(statistic: ActivationStatistic) -> dict[str, Any]:
    return {name: value.detach().cpu().clone() for name, value in statistic.state_dict().items()}
