"""How methods are drawn: colours, markers and dashes that belong to them in every figure."""

from collections.abc import Sequence
from typing import Any

from lightning_ablate.methods import shipped
from lightning_ablate.seeds import seed_of

# Colour-blind readers can tell these apart (Okabe & Ito, then Tol's muted palette); markers and dashes help in grey.
# The orange and blue that mean harm and help aren't among them.
_COLORS = (
    *("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#882255", "#117733"),
    *("#332288", "#AA4499", "#DDCC77", "#661100", "#44AA99", "#999933"),
)
_MARKERS, _DASHES = "os^DvPX<>*phd1", ("-", "--", "-.", ":")


def styles(methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How each method is drawn: a method of this package has its colour and marker in every figure.

    A user's own method takes those that its name's hash says, or the next ones that no other method here has. In joined
    runs ``METHOD (RUN)`` looks like ``METHOD``, and the runs differ by their dashes.
    """
    bases, known, count = [method.partition(" (")[0] for method in methods], shipped(), len(_COLORS)
    places = {base: known.index(base) for base in bases if base in known}
    for base in bases:
        start, taken = seed_of("style", base), {place % count for place in places.values()}
        places.setdefault(base, next((n for n in range(start, start + count) if n % count not in taken), start))
    runs = [places[base] + bases[:number].count(base) for number, base in enumerate(bases)]
    markers = {base: (place + place // count) % count for base, place in places.items()}  # others where colours repeat
    return {
        method: {
            **{"color": _COLORS[places[base] % count], "marker": _MARKERS[markers[base]]},
            **{"linestyle": _DASHES[run % len(_DASHES)], "markersize": 3.5, "linewidth": 1.2},
        }
        for method, base, run in zip(methods, bases, runs, strict=True)
    }
