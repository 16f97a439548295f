"""How fast the statistics of a calibration's first epoch read activations, beside a plain copy of them.

``python tests/benchmarks/kernel.py`` gathers each statistic of one site of a Mistral-7B, 8,192 positions of 4,096
bfloat16 neurons, on a GPU; its last line is the histogram kernel's bytes per second over those of a copy (read and
written bytes). Without a GPU the plain torch code runs at a small size.
"""

import statistics
import time
from collections.abc import Callable

import torch

from lightning_ablate.callback import ALWAYS
from lightning_ablate.statistics import LatticeHistogram


def seconds(run: Callable[[], object], rounds: int = 20) -> float:
    """The median of several runs, after three more."""
    found = []
    for _ in range(rounds + 3):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found[3:])


def main() -> None:
    cuda = torch.cuda.is_available()
    positions, neurons = (8192, 4096) if cuda else (512, 256)
    rows = torch.randn(positions, neurons).to("cuda" if cuda else "cpu", torch.bfloat16 if cuda else torch.float32)
    if not cuda:
        print("no CUDA device: the kernels are skipped, the plain torch code runs at a small size")
    size, target = rows.numel() * rows.element_size(), torch.empty_like(rows)
    copied = 2 * size / seconds(lambda: target.copy_(rows))
    print(f"{'copy':20} {copied / 1e9:10.1f} GB/s")
    read = {}
    for kind in ALWAYS:
        statistic = kind(neurons).to(rows.device)
        read[kind] = size / seconds(lambda: statistic.update(rows))  # noqa: B023
        print(f"{kind.__name__:20} {read[kind] / 1e9:10.1f} GB/s")
    print(f"histogram / copy: {read[LatticeHistogram] / copied:.3f}")


if __name__ == "__main__":
    main()
