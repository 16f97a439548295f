"""What a run is going to do, said before it does it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """What a run amounts to.

    Attributes:
        conditions: of the sweep, the baseline among them.
        passes: forward passes of one batch that a process makes from first to last; None where the data have no length.
        positions: scored positions of all processes together, extrapolated from the first batch; None likewise.
        statistics: bytes that the statistics of the sites take on each process.
        seconds: of one pass, as the first batch took it.

    Example:
        >>> print(Plan(conditions=115, passes=1_000, positions=8_000, statistics=2_500_000, seconds=0.5))
        plan: 115 conditions, 1,000 forward passes, about 8,000 scored positions, statistics of 2.5 MB, about 8 min
    """

    conditions: int
    passes: int | None
    positions: int | None
    statistics: int
    seconds: float

    def __str__(self) -> str:
        """One line."""
        about = []
        if self.passes is not None:
            about.append(f"{self.passes:,} forward passes")
        if self.positions is not None:
            about.append(f"about {self.positions:,} scored positions")
        about.append(f"statistics of {self.statistics / 1e6:,.1f} MB")
        if self.passes is not None:
            about.append(f"about {_duration(self.passes * self.seconds)}")
        else:
            about.append(f"{_duration(self.seconds)} a pass; the data tell no length")
        return f"plan: {self.conditions:,} condition{'s' * (self.conditions != 1)}, {', '.join(about)}"


def _duration(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
