"""What a tokenizer adds to a text, and what fills it up."""

from typing import Any

import torch
from torch import Tensor


def special_frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text."""
    framed, plain = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    start = next(i for i in range(len(framed)) if framed[i : i + len(plain)] == plain)
    return framed[:start], framed[start + len(plain) :]


def padded(ids: list[int], filler: int, length: int) -> Tensor:
    """The numbers, filled up to ``(length,)`` int64."""
    return torch.tensor(ids + [filler] * (length - len(ids)))


def padding_id(tokenizer: Any) -> int:
    """The padding token, or another one where there is none: padded positions are masked anyway."""
    return next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
