"""How far estimates of the peak are from the true mode, on distributions whose mode is known.

``python -m tests.benchmarks.peaks`` prints the root mean squared error of each estimator over many neurons.
"""

import argparse
import math

import torch
from torch import Tensor

from lightning_ablate.statistics import (
    HalfSampleMode,
    LatticeHistogram,
    Median,
    RangeHistogram,
    SiteStatistics,
    SmoothedMode,
)

ESTIMATORS = {"mode": SmoothedMode(), "half-sample": HalfSampleMode(), "median": Median()}
SIZES = (10_000, 100_000)


def normal(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape)


def laplace(shape: tuple[int, int]) -> Tensor:
    return torch.distributions.Laplace(0.0, 1.0).sample(shape)


def gamma(shape: tuple[int, int]) -> Tensor:
    return torch.distributions.Gamma(3.0, 1.0).sample(shape)


def student(shape: tuple[int, int]) -> Tensor:
    return torch.distributions.StudentT(3.0).sample(shape)


def mixture(shape: tuple[int, int]) -> Tensor:
    """80% around 0 with a standard deviation of 0.2, 20% around 1 with 0.5."""
    return torch.where(torch.rand(shape) < 0.8, 0.2 * torch.randn(shape), 1 + 0.5 * torch.randn(shape))


def _mode_of_mixture() -> float:
    x = torch.linspace(-0.1, 0.2, 300_001, dtype=torch.float64)
    density = 0.8 / 0.2 * torch.exp(-0.5 * (x / 0.2) ** 2) + 0.2 / 0.5 * torch.exp(-0.5 * ((x - 1) / 0.5) ** 2)
    return x[density.argmax()].item()


DISTRIBUTIONS = {
    "normal": (normal, 0.0),
    "Laplace": (laplace, 0.0),
    "gamma(3)": (gamma, 2.0),
    "t(3)": (student, 0.0),
    "mixture": (mixture, _mode_of_mixture()),
}


def errors(name: str, size: int, neurons: int, batch: int = 5_000) -> dict[str, float]:
    """The root mean squared error of each estimator, in raw units."""
    draw, mode = DISTRIBUTIONS[name]
    torch.manual_seed(size)
    batches = [draw((batch, neurons)).unsqueeze(0) for _ in range(size // batch)]
    bounds, lattice = LatticeHistogram(neurons), LatticeHistogram(neurons)
    for x in batches:
        bounds.update(x)
        lattice.update(x)
    histogram = RangeHistogram(neurons, SiteStatistics(name, {LatticeHistogram: bounds}))
    for x in batches:
        histogram.update(x)
    found = {"peak": histogram.peak()}
    found |= {estimator: estimate(lattice.histogram) for estimator, estimate in ESTIMATORS.items()}
    return {estimator: math.sqrt((values - mode).square().mean().item()) for estimator, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints the error of each estimator of the peak.")
    parser.add_argument("--neurons", type=int, default=200, help="repetitions of each")
    neurons = parser.parse_args().neurons
    names = ["peak", *ESTIMATORS]
    print(f"{'distribution':14}{'n':>8}  " + "".join(f"{name:>13}" for name in names) + f"{'peak / mode':>13}")
    worst = math.inf
    for size in SIZES:
        for name in DISTRIBUTIONS:
            found = errors(name, size, neurons)
            ratio = found["peak"] / found["mode"]
            worst = min(worst, ratio)
            print(f"{name:14}{size:8}  " + "".join(f"{found[n]:13.4f}" for n in names) + f"{ratio:13.2f}")
    print(f"smallest ratio {worst:.2f}")


if __name__ == "__main__":
    main()
