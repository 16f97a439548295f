"""Checks a text against a language model, and the model against the class it was given as."""

from bisect import bisect
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
            with torch.no_grad(), nullcontext() if device.type == "cpu" else _Lookups():
                run({name: tensor[:, :count] if tensor.ndim == 2 else tensor for name, tensor in batch.items()})
        except torch.OutOfMemoryError:
            raise
        except (IndexError, RuntimeError) as error:  # what a table of positions raises, or a mask of fixed size
            return error
        return None

    length = max(tensor.shape[1] for tensor in batch.values() if tensor.ndim == 2)
    if (cause := failure(length)) is None:
        return
    most = bisect(range(1, length), False, key=lambda count: failure(count) is not None)
    if not most:
        raise cause
    raise DataError(
        f"the sequences have {length} tokens, expected at most {most}, which the target has positions for; lower "
        "--data.max_length"
    ) from cause


def effect_of_later(run: Callable[[Tensor], Tensor], ids: Tensor, last: int, other: int) -> float:
    """How far predictions before the position ``last`` of ``ids`` ``(1, seq)`` depend on the token there.

    ``run`` maps ids to logits ``(1, seq, vocabulary)``; ``other`` is another token for that position. The largest
    change is divided by what rounding may do: 0 means that nothing depends on the token, above 1 that something does.
    """
    changed = ids.clone()
    changed[0, last] = other
    with torch.no_grad():
        before, after = (run(one)[0, :last].cpu().nan_to_num(0, 0, 0) for one in (ids, changed))
    if not before.numel():
        return 0.0
    noise = torch.finfo(before.dtype).eps ** 0.75 * before.abs().amax().double()
    return float((after.double() - before.double()).abs().amax() / noise)
