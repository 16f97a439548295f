"""What a person can read of examples: the texts of tokens, and small pictures."""

import io
from typing import Any

from torch import Tensor

_BROKEN = "\ufffd"  # what decoding gives for a part of a character
_LONGEST = 8  # tokens that one character may take
_SIDE = 112  # pixels of a picture


def shown_text(tokenizer: Any, ids: Tensor, real: Tensor) -> dict[str, Any]:
    """The texts of the tokens ``(seq,)``, which join to the whole text; None where they aren't ``real``.

    A character that takes several tokens is the text of the last of them, and the others have none.
    """
    tokens: list[str | None] = [None] * len(ids)
    places = real.nonzero().squeeze(1).tolist()
    numbers, start, read = ids[real].tolist(), 0, 0
    for end in range(1, len(numbers) + 1):
        # with the last whole piece before it, as some tokenizers drop the space at the beginning of a text
        before, text = (_decoded(tokenizer, numbers[start:stop]) for stop in (read, end))
        whole = not text.endswith(_BROKEN) or end - read >= _LONGEST or end == len(numbers)
        tokens[places[end - 1]] = text[len(before) :] if whole else ""
        if whole:
            start, read = read, end
    return {"tokens": tokens}


def text_of(tokenizer: Any, token: int) -> str:
    """The text of one token; of a part of a character, the tokenizer's own name in angle brackets."""
    text = _decoded(tokenizer, [token])
    return f"\u27e8{tokenizer.convert_ids_to_tokens(token) or token}\u27e9" if _BROKEN in text or not text else text


def shown_image(pixels: Tensor) -> bytes:
    """A PNG file of an image ``(channels, height, width)``, whose darkest value is black and whose lightest white."""
    from PIL import Image

    pixels = pixels.float().cpu()
    levels = (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp_min(1e-12)
    levels = levels[:3] if len(levels) >= 3 else levels[:1].expand(3, -1, -1)
    picture = Image.fromarray((255 * levels).round().byte().permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)
