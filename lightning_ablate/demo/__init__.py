"""Three small trained targets that come with the package."""

from pathlib import Path

from lightning_ablate.errors import TargetError

_FOLDER = Path(__file__).parent
_PREFIX = "demo:"


def resolve(name: str) -> str:
    """The folder of an embedded target (``demo:vit``), or TargetError; any other name as it is, with ``~`` expanded."""
    if not name.startswith(_PREFIX):
        return str(Path(name).expanduser()) if name.startswith("~") else name
    folder = _FOLDER / name.removeprefix(_PREFIX)
    if not (folder / "config.json").is_file():
        known = sorted(_PREFIX + path.parent.name for path in _FOLDER.glob("*/config.json"))
        raise TargetError(f"no target {name!r} is embedded, expected one of {', '.join(known)} (--model.name)")
    return str(folder)
