"""What the paths of modules tell: which layer they belong to, and which are alike."""

import re
from collections.abc import Sequence

from torch import nn

_DIGITS = re.compile(r"(?:^|(?<=[._]))\d+")
_NUMBERED = re.compile(r"(^|_)\d+$")
_CROSS_PATH = re.compile(r"(^|[._])(cross|encoder_att|encdecatt)", re.IGNORECASE)


def shape(path: str) -> str:
    """A path without its numbers, which modules of all layers share."""
    return _DIGITS.sub("*", path)


def modules_around(attention: Sequence[str]) -> tuple[str, ...]:
    """The prefixes of the attention modules that hold these projections; a layer that holds one itself is left out."""
    modules = {path.rpartition(".")[0] for path in attention}
    return tuple(module + "." for module in modules if not _NUMBERED.search(module.rpartition(".")[2]))


def layer_of(path: str, mlps: Sequence[str]) -> str:
    """The closest numbered module around a projection that has an MLP as well; else the closest numbered one."""
    parts = path.split(".")
    numbered = [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1) if _NUMBERED.search(parts[end - 1])]
    return next((name for name in numbered if any(mlp.startswith(name + ".") for mlp in mlps)), [*numbered, ""][0])


def is_cross(target: nn.Module, path: str) -> bool:
    """Whether attention is cross-attention, by the names of its modules."""
    parts = path.split(".")
    around = [target.get_submodule(".".join(parts[:end])) for end in range(len(parts) + 1)]
    if parts[-2:-1] == ["multihead_attn"] and hasattr(around[-3], "self_attn"):  # as torch.nn.TransformerDecoderLayer
        return True
    return bool(_CROSS_PATH.search(path)) or any("CrossAtt" in type(module).__name__ for module in around)
