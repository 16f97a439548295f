"""Real data that comes with Python and scikit-learn, so that the demo needs no network."""

import hashlib
import sys
import sysconfig
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_ablate.data.base import Purpose
from lightning_ablate.data.image import ImageData
from lightning_ablate.data.rows import MadeRows
from lightning_ablate.data.text import TextData

Role = Literal["train", "calibration", "evaluation"]
ROLES: tuple[Role, ...] = get_args(Role)

# Some distributions lack these or generate them; pydoc_data is counted as topics already.
_UNEVEN_MODULES = frozenset(
    "__pycache__ distutils encodings ensurepip idlelib lib2to3 pydoc_data site-packages test tkinter turtledemo".split()
)
_PASSAGE_CHARACTERS = 1_200


@dataclass(kw_only=True, eq=False, repr=False)
class PythonTexts(MadeRows, TextData):
    """CPython's documentation and sources, held out from training the demo targets."""

    name: str = field(default="python-texts", init=False)
    calibration_tokens: int = 50_000
    evaluation_tokens: int = 16_000
    max_length: int = 128
    batch_size: int = 16

    def rows(self, purpose: Purpose) -> Any:
        """The passages for a purpose."""
        return [{"text": passage} for passage in python_texts(purpose)]


@dataclass(kw_only=True, eq=False, repr=False)
class Digits(MadeRows, ImageData):
    """scikit-learn's digits: evaluates on images held out from the training of the embedded ViT.

    Args:
        calibration_images: images that calibrate, 1,348 at most.
        evaluation_images: images that are evaluated, 449 at most.
    """

    name: str = field(default="digits", init=False)
    calibration_images: int = 1_348
    evaluation_images: int = 449
    batch_size: int = 225

    def rows(self, purpose: Purpose) -> Any:
        """The images for a purpose."""
        return digits(purpose)


def role_of(name: str) -> Role:
    """The role of a topic or top-level module, by its hash: 80% train, 10% calibration, 10% evaluation."""
    bucket = _rank(name) % 10
    return "calibration" if bucket == 8 else "evaluation" if bucket == 9 else "train"


@cache
def python_texts(role: Role) -> tuple[str, ...]:
    """Passages of CPython's documentation topics and standard-library sources, in an order fixed by their hash.

    The text is that of the running interpreter, so it differs a little between Python versions; names keep their role.
    Passages are distinct, of about 1,200 characters, and cut at blank lines. A passage of two roles (a licence header,
    say) belongs to the later one. The demo targets were trained on ``"train"`` alone.
    """
    own, *later = (_passages(one) for one in ROLES[ROLES.index(role) :])
    return tuple(sorted(own.difference(*later), key=_rank))


@cache
def digits(role: Role) -> Any:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey images, split by index.

    The columns are ``image`` (PIL, mode L) and ``label`` (0 to 9). Grey levels 0 to 16 are stored as multiples of 15,
    which any image library reads back exactly. ``"evaluation"`` is every fourth image (449), never trained on;
    ``"train"`` and ``"calibration"`` are the other 1,348.
    """
    from datasets import ClassLabel, Dataset, Features, Image
    from sklearn.datasets import load_digits

    loaded = load_digits()
    chosen = [i for i in range(len(loaded.target)) if (i % 4 == 3) == (role == "evaluation")]
    pixels = (loaded.images[chosen] * 15).astype("uint8")
    features = Features({"image": Image(mode="L"), "label": ClassLabel(num_classes=10)})
    return Dataset.from_dict({"image": list(pixels), "label": loaded.target[chosen].tolist()}, features=features)


def _passages(role: Role) -> set[str]:
    from pydoc_data.topics import topics

    texts = [text for name, text in topics.items() if role_of(f"topic {name}") == role]
    root, names = Path(sysconfig.get_path("stdlib")), sys.stdlib_module_names - _UNEVEN_MODULES
    for name in names:
        if "sysconfigdata" not in name and role_of(f"module {name}") == role:
            paths = [path for path in (root / f"{name}.py", *(root / name).rglob("*.py")) if path.is_file()]
            texts += [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    return {passage for text in texts for passage in _cut(text)}


def _cut(text: str) -> list[str]:
    passages, current = [], ""
    for paragraph in text.split("\n\n"):
        if current and len(current) + len(paragraph) > _PASSAGE_CHARACTERS:
            passages.append(current.strip("\n"))
            current = ""
        current += paragraph + "\n\n"
    return [passage for passage in (*passages, current.strip("\n")) if passage.strip()]


def _rank(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode(errors="replace")).digest()[:8], "big")
