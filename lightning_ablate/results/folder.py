"""The folder of a run: a fresh one, files that are there whole or not at all, and the versions that made them."""

import os
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = "lightning-ablate lightning torch torchmetrics transformers timm datasets numpy pandas pyarrow"
_KEPT = ("results.csv", "ablation.ckpt", "config.yaml")  # by which a run is known


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file so that it is there whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def fresh_folder(folder: Path, unless: Callable[[Path], bool] = lambda candidate: False) -> Path:
    """The folder, or its first ``run-2``, ``run-3`` ... that holds no earlier run's files, or ``unless`` holds."""
    candidate, number = folder, 1
    while not unless(candidate) and any((candidate / name).exists() for name in _KEPT):
        number += 1
        candidate = folder / f"run-{number}"
    return candidate


def versions() -> dict[str, str]:
    """Those of Python and of the packages that a run's numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES.split():
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a checkout that isn't installed
            found[package] = "not installed"
    return found
