"""Files that are there whole or not at all, and that tell whether they still are what was written."""

import hashlib
import io
import os
import re
from pathlib import Path
from typing import Any

import torch

from lightning_ablate.errors import AblationError, loading

# at the end, where it is in nobody's way: torch.load finds its archive all the same
_SEAL = re.compile(rb"\nsha256 ([0-9a-f]{64})\n\Z")
_LENGTH = len("\nsha256 \n") + 64


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


def save(state: Any, path: Path) -> None:
    """Saves tensors and plain values, sealed by a checksum."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, _sealed(buffer.getvalue()))


def seal(path: Path) -> None:
    """Adds the checksum to a file that something else has written."""
    write_whole(path, _sealed(path.read_bytes()))


def check(path: Path, kind: type[AblationError]) -> bytes:
    """The content of a sealed file.

    Raises:
        AblationError: of the given kind, if the file is not as it was sealed.
    """
    with loading(str(path), kind):
        content = path.read_bytes()
        found = _SEAL.search(content, max(0, len(content) - _LENGTH))
        if found is None:
            raise kind(f"could not load {str(path)!r}: it was cut off, or `fit` of this version did not write it")
        if hashlib.sha256(content[:-_LENGTH]).hexdigest().encode() != found[1]:
            raise kind(f"could not load {str(path)!r}: it is damaged, its checksum is another one")
        return content[:-_LENGTH]


def load(path: Path, kind: type[AblationError]) -> Any:
    """What :func:`save` saved; nothing in the file is run.

    Raises:
        AblationError: of the given kind, if it can't be loaded.
    """
    content = check(path, kind)
    with loading(str(path), kind):
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _sealed(content: bytes) -> bytes:
    return content + b"\nsha256 " + hashlib.sha256(content).hexdigest().encode() + b"\n"
