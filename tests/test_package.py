"""What the package ships, and in which direction it imports."""

import ast
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import lightning_ablate as package

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lightning_ablate"
# each imports only what is in front of it
RANKS = (
    "errors identity tokens, trust sites demo, statistics, conditions, choices, methods metrics, "
    "attribution calibration sharding, ablation results data, phases, modules, progress trainer, "
    "report export, callback, parser, cli"
)
# plain torch and torchmetrics: usable and testable without a Trainer
PLAIN = "statistics sites choices conditions methods metrics calibration ablation phases results".split()


def imports(tree):
    """What is imported when it runs, so not for the types' sake alone; by module and name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'")):
            yield from imports(node)


def imported():
    found = {}
    for path in set(PACKAGE.rglob("*.py")) - set(PACKAGE.rglob("__main__.py")):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        found.setdefault(part, set()).update(imports(ast.parse(path.read_text(encoding="utf-8"))))
    return found


def test_imports_go_one_way_and_the_mathematics_knows_no_lightning():
    rank = {part: number for number, parts in enumerate(RANKS.split(", ")) for part in parts.split()}
    found = imported()
    for part in found.keys() - {"__init__", "__main__"}:
        for name in found[part]:
            if name.startswith("lightning_ablate.") and name.split(".")[1] != part:
                assert rank[name.split(".")[1]] < rank[part], f"{part} imports {name}"
    for part in PLAIN:
        assert not {name for name in found[part] if name.split(".")[0] in ("lightning", "pytorch_lightning")}, part
    known = {name for name in found["modules"] if ".phases." in name}
    assert known <= {"lightning_ablate.phases.Phase", "lightning_ablate.phases.phase.Phase"}


def subclasses(kind):
    return [kind, *(found for subclass in kind.__subclasses__() for found in subclasses(subclass))]


def test_every_name_that_is_exported_is_there_and_all_that_users_name_is_exported():
    names = set(package.__all__)
    assert len(names) == len(package.__all__) and all(hasattr(package, name) for name in names)
    for kind in (package.AblationMethod, package.Choice, package.AblationDataModule, package.AblationModule):
        own = [
            k for k in subclasses(kind) if k.__module__.startswith("lightning_ablate.") and not k.__abstractmethods__
        ]
        assert len(own) > 3 and {kind.__name__ for kind in own} <= names
    assert {"Site", "Calibration", "ablated", "Results", "load", "AblationCallback"} <= names


def test_the_wheel_takes_every_data_file():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    data = config["tool"]["setuptools"]["package-data"]
    files = [p.relative_to(PACKAGE) for p in PACKAGE.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")]
    patterns = [f"demo/{pattern}" for pattern in data["lightning_ablate.demo"]] + data["lightning_ablate"]
    assert len(files) >= 9 and not [f for f in files if not any(fnmatch(str(f), pattern) for pattern in patterns)]
