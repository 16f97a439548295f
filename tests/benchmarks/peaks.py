"""How far estimates of the peak are from the true mode, on distributions whose mode is known.

``python -m tests.benchmarks.peaks`` prints the root mean squared error of each estimator over many neurons.
"""

import argparse
import math

import torch

from lightning_ablate import Site
from lightning_ablate.statistics import Histogram, Moments
from tests import tiny

ESTIMATORS = ("peak", "mode", "median", "half_sample_mode")


def mixture(shape):
    """80% around 0 with a standard deviation of 0.2, 20% around 1 with 0.5."""
    return torch.where(torch.rand(shape) < 0.8, 0.2 * torch.randn(shape), 1 + 0.5 * torch.randn(shape))


def mode_of_mixture():
    x = torch.linspace(-0.1, 0.2, 300_001, dtype=torch.float64)
    density = 0.8 / 0.2 * torch.exp(-0.5 * (x / 0.2) ** 2) + 0.2 / 0.5 * torch.exp(-0.5 * ((x - 1) / 0.5) ** 2)
    return x[density.argmax()].item()


DISTRIBUTIONS = {
    "normal": (torch.randn, 0.0),
    "Laplace": (torch.distributions.Laplace(0.0, 1.0).sample, 0.0),
    "gamma(3)": (torch.distributions.Gamma(3.0, 1.0).sample, 2.0),
    "t(3)": (torch.distributions.StudentT(3.0).sample, 0.0),
    "mixture": (mixture, mode_of_mixture()),
}


def errors(name, size, neurons, batch=5_000):
    draw, mode = DISTRIBUTIONS[name]
    torch.manual_seed(size)
    batches = [draw((batch, neurons)) for _ in range(size // batch)]
    histogram = tiny.gathered(Site(name, neurons), batches, Moments, Histogram)[Histogram]
    histogram.reduce()
    return {by: math.sqrt((getattr(histogram.centres, by) - mode).square().mean().item()) for by in ESTIMATORS}


def main():
    parser = argparse.ArgumentParser(description="Prints the error of each estimator of the peak.")
    parser.add_argument("--neurons", type=int, default=200, help="repetitions of each")
    neurons = parser.parse_args().neurons
    print(f"{'distribution':14}{'n':>8}" + "".join(f"{name:>18}" for name in (*ESTIMATORS, "peak / mode")))
    ratios = []
    for size in (10_000, 100_000):
        for name in DISTRIBUTIONS:
            found = errors(name, size, neurons)
            ratios.append(found["peak"] / found["mode"])
            print(f"{name:14}{size:8}" + "".join(f"{error:18.4f}" for error in found.values()) + f"{ratios[-1]:18.2f}")
    print(f"smallest ratio {min(ratios):.2f}")


if __name__ == "__main__":
    main()
