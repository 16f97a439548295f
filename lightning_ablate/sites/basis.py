"""In which units a site's activations are read and replaced: its features, a part of them, directions, or others."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from lightning_ablate.errors import ConfigError, few, loading

_CODES = ("standard", "topk", "jumprelu")


class Basis(ABC):
    """Reads units of activations, and writes what replaces them back.

    Attributes:
        unit: what a unit is called.
        width: how many there are.
        features: how many features the activations must have; None for any number that holds the units.
    """

    unit: str = "neuron"
    width: int
    features: int | None = None

    @abstractmethod
    def read(self, activations: Tensor) -> Tensor:
        """The units ``(batch, ..., units)`` of activations ``(batch, ..., features)``."""

    @abstractmethod
    def write(self, activations: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """The activations with units ``after`` in place of ``before``, which :meth:`read` gave."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """What tells this basis from another one."""


class Part(Basis):
    """Some features, in an order."""

    def __init__(self, numbers: tuple[int, ...]) -> None:
        self.numbers, self.width = numbers, len(numbers)
        self._index = torch.tensor(numbers)

    def read(self, activations: Tensor) -> Tensor:
        """Those features."""
        return activations.index_select(-1, self._on(activations))

    def write(self, activations: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Others stay as they are, to the bit."""
        return activations.index_copy(-1, self._on(activations), after)

    @property
    def digest(self) -> str:
        """Their numbers."""
        return f"part {','.join(map(str, self.numbers))}"

    def _on(self, activations: Tensor) -> Tensor:
        self._index = self._index.to(activations.device)
        return self._index


class _Decoded(Basis):
    """Units that each add a vector to the activations: x' = x + Σ (after − before) d."""

    _tensors: dict[str, Tensor]  # "decoder": (units, features); computed with in their own dtype

    def write(self, activations: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """What the units don't hold of the activations is kept."""
        decoder = self._on(activations)["decoder"]
        return activations + ((after - before).to(decoder.dtype) @ decoder).to(activations.dtype)

    @property
    def digest(self) -> str:
        """SHA-256 of the tensors, in hexadecimal."""
        found = hashlib.sha256(repr(self._options()).encode())
        for name, tensor in sorted(self._tensors.items()):
            found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
            found.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
        return found.hexdigest()

    def _options(self) -> tuple[Any, ...]:
        return (type(self).__name__,)

    def _on(self, activations: Tensor) -> dict[str, Tensor]:
        if next(iter(self._tensors.values())).device != activations.device:
            self._tensors = {name: tensor.to(activations.device) for name, tensor in self._tensors.items()}
        return self._tensors


class Directions(_Decoded):
    """Directions, whose units are the coordinates of activations along them.

    Directions that aren't at right angles have the coordinates that make them up: replacing one leaves the others.

    Args:
        file: a safetensors file.
        name: of its tensor, ``(directions, features)`` or ``(features,)`` floating; None takes the only one.
        orthonormal: whether they are made orthonormal first, one after the other; else they stay as long as they are.

    Raises:
        ConfigError: if the file has no such tensor, or a direction is made up of others.
    """

    unit = "direction"

    def __init__(self, file: str, name: str | None = None, orthonormal: bool = True) -> None:
        found = _loaded(Path(file))
        if name not in found and (name is not None or len(found) != 1):
            raise ConfigError(f"{file} holds {few(found)}, expected {name or 'a single tensor, or its name'}")
        vectors = found[name] if name is not None else next(iter(found.values()))
        vectors = (vectors.unsqueeze(0) if vectors.ndim == 1 else vectors).double()
        if vectors.ndim != 2 or int(torch.linalg.matrix_rank(vectors)) < len(vectors):
            raise ConfigError(
                f"the directions of {file} are {tuple(vectors.shape)}, expected (directions, features), none of which "
                "is made up of others"
            )
        if orthonormal:
            vectors = torch.linalg.qr(vectors.T).Q.T * torch.linalg.qr(vectors.T).R.diagonal().sign().unsqueeze(1)
        self.width, self.features = vectors.shape
        encoder = torch.linalg.pinv(vectors)
        self._tensors = {"decoder": vectors.float(), "encoder": encoder.float()}

    def read(self, activations: Tensor) -> Tensor:
        """The coordinates, float32."""
        encoder = self._on(activations)["encoder"]
        return activations.to(encoder.dtype) @ encoder


class Features(_Decoded):
    """Features of a sparse autoencoder, as SAELens saves it: ``cfg.json`` and ``sae_weights.safetensors``.

    What the autoencoder doesn't reconstruct stays in the activations. It reads activations as they are, so one that
    normalises them first is refused.

    Args:
        folder: of an autoencoder with the architecture ``standard``, ``topk`` or ``jumprelu``.

    Raises:
        ConfigError: if it is none of these.
    """

    unit = "feature"

    def __init__(self, folder: str) -> None:
        path = Path(folder)
        try:
            about: dict[str, Any] = json.loads((path / "cfg.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{folder!r} isn't the folder of a sparse autoencoder, with cfg.json: {error}") from error
        found = _loaded(path / "sae_weights.safetensors")
        kind, norm = about.get("architecture"), about.get("normalize_activations", "none")
        function = about.get("activation_fn", about.get("activation_fn_str", "relu"))
        more = about.get("activation_fn_kwargs") or {}
        self._k = about.get("k", more.get("k")) if kind == "topk" else None
        plain = norm == "none" and about.get("reshape_activations", "none") == "none"
        plain &= not about.get("finetuning_scaling_factor") and (kind == "topk" or function == "relu")
        if kind not in _CODES or not plain or (kind == "topk" and not isinstance(self._k, int)):
            raise ConfigError(
                f"the autoencoder of {folder} is {kind!r} with {function!r}, activations normalised by {norm!r}, k "
                f"{self._k}; expected {', '.join(_CODES)}, reading activations as they are (SAELens folds norms into "
                "the weights), without other scales"
            )
        needed = {"W_enc", "b_enc", "W_dec", "b_dec"}
        if kind == "jumprelu":
            needed.add("threshold")
        if missing := needed - found.keys():
            raise ConfigError(f"{folder} lacks {few(sorted(missing))}, it holds {few(found)}")
        self.width, self.features = found["W_dec"].shape
        scale = found["W_dec"].norm(dim=1) if about.get("rescale_acts_by_decoder_norm") else 1.0
        shift = found["b_dec"] if about.get("apply_b_dec_to_input", True) else torch.zeros_like(found["b_dec"])
        self._tensors = {
            "decoder": found["W_dec"] / (scale.unsqueeze(1) if isinstance(scale, Tensor) else 1.0),
            "encoder": found["W_enc"] * scale,
            "bias": (found["b_enc"] - shift @ found["W_enc"]) * scale,
        }
        if "threshold" in needed:
            self._tensors["threshold"] = found["threshold"]

    def read(self, activations: Tensor) -> Tensor:
        """How strong each feature is, in the autoencoder's dtype."""
        on = self._on(activations)
        before = functional.linear(activations.to(on["encoder"].dtype), on["encoder"].T, on["bias"])
        if "threshold" in on:
            return before.relu() * (before > on["threshold"])
        if self._k is not None:
            largest = before.topk(self._k, dim=-1)
            return torch.zeros_like(before).scatter(-1, largest.indices, largest.values.relu())
        return before.relu()

    def _options(self) -> tuple[Any, ...]:
        return (type(self).__name__, self._k)


def _loaded(file: Path) -> Mapping[str, Tensor]:
    with loading(str(file), ConfigError):
        return load_file(file)
