"""What the package ships; `lint-imports` checks in which direction it imports."""

import tomllib
from fnmatch import fnmatch
from pathlib import Path

import lightning_ablate as package

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lightning_ablate"


def subclasses(kind):
    return [kind, *(found for subclass in kind.__subclasses__() for found in subclasses(subclass))]


def test_every_name_that_is_exported_is_there_and_all_that_users_name_is_exported():
    names = set(package.__all__)
    assert len(names) == len(package.__all__) and all(hasattr(package, name) for name in names)
    for kind in (package.AblationMethod, package.Choice, package.AblationDataModule, package.AblationModule):
        own = [
            k
            for k in subclasses(kind)
            if k.__module__.startswith("lightning_ablate.") and not k.__abstractmethods__ and k.__name__[0] != "_"
        ]
        assert len(own) > 3 and {kind.__name__ for kind in own} <= names
    assert {"Site", "Calibration", "ablated", "Results", "load", "AblationCallback"} <= names


def test_the_wheel_takes_every_data_file():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    data = config["tool"]["setuptools"]["package-data"]
    rest = [path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc", ".md")]
    files = [path.relative_to(PACKAGE) for path in rest]
    patterns = [f"demo/{pattern}" for pattern in data["lightning_ablate.demo"]] + data["lightning_ablate"]
    assert len(files) >= 9 and not [f for f in files if not any(fnmatch(str(f), pattern) for pattern in patterns)]
