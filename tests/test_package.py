"""What the package ships, and in which direction it imports."""

import ast
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lightning_ablate"
# plain torch and torchmetrics: usable and testable without a Trainer
PLAIN = [
    "trace.py",
    "sites.py",
    "masks.py",
    "metrics.py",
    "calibration.py",
    "sweep.py",
    "statistics/*.py",
    "methods/*.py",
]
RANKS = [
    ["errors", "files", "tokens", "trace", "sites", "masks", "statistics", "demo", "folding"],
    ["methods", "calibration", "metrics"],
    ["sweep", "sharding", "learning"],
    ["modules"],
    ["results", "comparisons", "report", "join", "progress", "data", "journal", "neurons", "plan"],
    ["callback"],
    ["cli"],
]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def rank(module):
    part = module.split(".")[1]
    return next(number for number, names in enumerate(RANKS) if part in names)


@pytest.mark.parametrize("path", [path for pattern in PLAIN for path in PACKAGE.glob(pattern)], ids=str)
def test_the_mathematics_knows_no_lightning(path):
    assert not [name for name in imports(path) if name.split(".")[0] == "lightning"]


def test_imports_go_one_way():
    for path in PACKAGE.rglob("*.py"):
        own = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if own in ("lightning_ablate", "lightning_ablate.__main__", "lightning_ablate.demo.train"):
            continue
        for name in imports(path):
            if name.startswith("lightning_ablate."):
                assert rank(name) <= rank(own), f"{own} imports {name}"


def test_the_wheel_takes_every_data_file():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = config["tool"]["setuptools"]["package-data"]["lightning_ablate.demo"]
    data = [path.relative_to(PACKAGE / "demo") for path in (PACKAGE / "demo").rglob("*") if path.is_file()]
    data = [path for path in data if path.suffix not in (".py", ".pyc")]
    assert len(data) >= 9
    for path in data:
        assert any(fnmatch(str(path), pattern) for pattern in patterns), path
    others = [p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")]
    assert all("demo" in p.relative_to(PACKAGE).parts[:1] for p in others)
