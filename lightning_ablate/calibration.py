"""Gathers the statistics of every site, epoch by epoch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ablate.errors import NonFiniteError, SiteError, StatisticsError
from lightning_ablate.sites import Site, hooked
from lightning_ablate.statistics import ActivationStatistic, SiteStatistics


class Calibration:
    """The statistics of a target's sites: gathered here, saved here, and handed to the methods.

    Args:
        target: the model under study.
        sites: where its activations are read.
        kinds: the statistics asked for; those they need are added.
        device: where they are gathered.
    """

    def __init__(
        self,
        target: nn.Module,
        sites: Sequence[Site],
        kinds: Iterable[type[ActivationStatistic]],
        device: torch.device | str = "cpu",
    ) -> None:
        self.target, self.sites, self.device = target, tuple(sites), torch.device(device)
        self.kinds = _with_needs(kinds)
        self.statistics: dict[Site, dict[type[ActivationStatistic], ActivationStatistic]] = {s: {} for s in sites}
        self._current: dict[Site, list[ActivationStatistic]] = {}

    def __getitem__(self, site: Site) -> SiteStatistics:
        """The statistics of one site."""
        return SiteStatistics(site.name, self.statistics[site])

    def start(self, epoch: int) -> None:
        """Makes the statistics that are gathered in this epoch, from 0."""
        for site in self.sites:
            new = [k(site.width, self[site]).to(self.device) for k in self.kinds if k.epoch() == epoch]
            self.statistics[site] |= {type(statistic): statistic for statistic in new}
            self._current[site] = new

    @contextmanager
    def collecting(self, valid: Tensor | None) -> Iterator[None]:
        """Reads every site during one forward pass.

        Args:
            valid: bool, broadcastable to ``(batch, seq)``, False at padding; None where nothing is padded.

        Raises:
            SiteError: if a site did not run, or ran more than once.
            NonFiniteError: if an activation is NaN or infinite.
        """
        runs = dict.fromkeys(self.sites, 0)

        def read(site: Site, activations: Tensor) -> None:
            runs[site] += 1
            for statistic in self._current[site]:
                statistic.update(activations, valid)

        with hooked(self.target, self.sites, read):
            yield
        check_runs(runs)
        self._check_finite()

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

    def state_dict(self) -> dict[str, dict[str, dict[str, Any]]]:
        """The statistics as tensors on the CPU, by site name and class name."""
        return {
            site.name: {kind.__name__: _on_cpu(statistic) for kind, statistic in statistics.items()}
            for site, statistics in self.statistics.items()
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
        """Takes the statistics asked for from a :meth:`state_dict`; those it lacks stay missing.

        Raises:
            StatisticsError: if it lacks a site.
        """
        for site in self.sites:
            if site.name not in state:
                raise StatisticsError(
                    f"the checkpoint holds no statistics of the site {site.name}, it holds {', '.join(state)}; "
                    "name these with --ablation.sites, or run `fit` again"
                )
            for kind in self.kinds:
                if kind.__name__ in state[site.name]:
                    statistic = kind(site.width)
                    statistic.load_state_dict(dict(state[site.name][kind.__name__]))
                    self.statistics[site][kind] = statistic.to(self.device)

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
                f"the site {site.name} ran {count} times in one forward pass, expected once: "
                + ("a fused implementation goes past it" if count == 0 else "it is shared between layers")
                + "; leave it out with a pattern (--ablation.sites)"
            )


def _with_needs(kinds: Iterable[type[ActivationStatistic]]) -> list[type[ActivationStatistic]]:
    found: dict[type[ActivationStatistic], None] = {}
    for kind in kinds:
        found |= dict.fromkeys([*_with_needs(kind.needs), kind])
    return list(found)


def _on_cpu(statistic: ActivationStatistic) -> dict[str, Any]:
    return {name: value.detach().cpu().clone() for name, value in statistic.state_dict().items()}
