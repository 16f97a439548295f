"""The folder of a run: its name, files that are written whole or not at all, and the versions of packages."""

import os
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import BinaryIO

_PACKAGES = "lightning-ablate lightning torch torchmetrics transformers timm datasets numpy pandas pyarrow"
_KEPT = ("results.csv", "ablation.ckpt")  # one of these files shows a run


def write_whole(path: Path, content: str | bytes | memoryview | Callable[[BinaryIO], object]) -> None:
    """Writes a file, or has it written; after a failure the earlier file is still there, whole."""
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):  # torch.save hides the cause
            raise error.__context__ from None
        raise


def fresh_folder(folder: Path, unless: Callable[[Path], bool] = lambda candidate: False) -> Path:
    """The first of ``folder``, its ``run-2``, ``run-3`` ... that holds no run, or for which ``unless`` is true."""
    candidate, number = folder, 1
    while not unless(candidate) and any((candidate / name).exists() for name in _KEPT):
        number += 1
        candidate = folder / f"run-{number}"
    return candidate


def base_name(name: str) -> str:
    """The last name of a path; a name on the hub, like ``facebook/opt-125m``, stays whole."""
    return (Path(name).name or name) if name.startswith(("/", ".", "~")) or os.path.exists(name) else name


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a run's numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES.split():
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a checkout that isn't installed
            found[package] = "not installed"
    return found
