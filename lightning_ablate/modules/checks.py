"""Checks a text against a language model, and the model against the class it was given as."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_ablate.errors import DataError


def check_vocabulary(target: Any, *ids: Tensor) -> None:
    """Raises DataError for token ids, int64 of any shape, that the target has no embedding for."""
    size, most = vocabulary_of(target), max(int(one.max()) for one in ids)
    if most >= size:
        raise DataError(
            f"the text has the token id {most}, expected ids below {size}, the target's embeddings; use its own "
            "tokenizer (--data.tokenizer), or resize the embeddings to it"
        )


def vocabulary_of(target: Any) -> int:
    """How many token ids a target of transformers has embeddings for."""
    embeddings = target.get_input_embeddings()
    return len(getattr(embeddings, "weight", embeddings))


class _Lookups(TorchFunctionMode):
    """Raises IndexError before a table is asked for a row that it lacks, which a GPU would not survive."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is functional.embedding and args[0].numel() and int(args[0].max()) >= len(args[1]):
            raise IndexError
        return func(*args, **(kwargs or {}))


def check_length(run: Callable[[Mapping[str, Tensor]], object], batch: Mapping[str, Tensor]) -> None:
    """Raises DataError if the target can't run on a batch ``(batch, seq)``, but can on fewer of its tokens."""
    device = next(iter(batch.values())).device

    def failure(count: int) -> Exception | None:
        try:
            with nullcontext() if device.type == "cpu" else _Lookups():
                run({name: tensor[:, :count] if tensor.ndim == 2 else tensor for name, tensor in batch.items()})
        except torch.OutOfMemoryError:
            raise
        except (IndexError, RuntimeError) as error:  # what a table of positions raises, or a mask of fixed size
            return error
        return None

    length = max(tensor.shape[1] for tensor in batch.values() if tensor.ndim == 2)
    with torch.no_grad():
        if (cause := failure(length)) is None:
            return
        least, most = 0, length - 1
        while least < most:
            middle = (least + most + 1) // 2
            least, most = (middle, most) if failure(middle) is None else (least, middle - 1)
    if not least:
        raise cause
    raise DataError(
        f"the sequences have {length} tokens, expected at most {least}, which the target has positions for; lower "
        "--data.max_length"
    ) from cause


def effect_of_later(run: Callable[[Tensor], Tensor], ids: Tensor, last: int, other: int) -> float:
    """How far predictions before place ``last`` of ``ids`` ``(1, seq)`` depend on the token there.

    ``run`` maps ids to logits ``(1, seq, vocabulary)``; ``other`` is another token for that place. The largest change
    is in units of what rounding may do: it is 0 where nothing depends on the token, and above 1 where more does.
    """
    changed = ids.clone()
    changed[0, last] = other
    with torch.no_grad():
        before, after = (run(one)[0, :last].cpu().nan_to_num(0, 0, 0) for one in (ids, changed))
    if not before.numel():
        return 0.0
    noise = torch.finfo(before.dtype).eps ** 0.75 * before.abs().amax().double()
    return float((after.double() - before.double()).abs().amax() / noise)
