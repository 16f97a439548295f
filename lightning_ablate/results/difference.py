"""What an ablation does to the tokens of any text, without a Trainer."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_ablate.ablation import ablated
from lightning_ablate.calibration import Calibration
from lightning_ablate.errors import ConfigError, DataError
from lightning_ablate.methods import AblationMethod, method_of
from lightning_ablate.results.evidence import coloured
from lightning_ablate.shown import shown_text
from lightning_ablate.sites import find_sites
from lightning_ablate.sites.site import device_of


class Difference(pd.DataFrame):  # type: ignore[misc]
    """One row per token: its text, the intact cross-entropy and what ablation adds, which a notebook shows as colour.

    Columns: ``token`` (str), ``clean`` and ``change`` (float64, nats; NaN for the first token, which nothing predicts).
    """

    def _repr_html_(self) -> str:
        said = f"{self.attrs.get('said', 'ablation')} adds {self['change'].mean():+.4f} nats a token"
        return f"<p>{escape(said)}; orange: it harms, blue: it helps</p>" + coloured(
            zip(self["token"], self["change"], strict=True)
        )


def difference(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    masks: Mapping[str, Tensor] | None = None,
    method: AblationMethod | str = "zero",
    calibration: Calibration | None = None,
    *,
    heads: Mapping[str, Sequence[int]] | None = None,
    neurons: Mapping[str, Sequence[int]] | None = None,
) -> Difference:
    """What an ablation of a causal language model adds to the cross-entropy of each token of a text.

    Args:
        model: of transformers, or another one whose output has ``logits`` ``(1, seq, vocabulary)``.
        tokenizer: the model's.
        text: of at least two tokens; DataError otherwise, and ConfigError for a model that isn't causal, or trains.
        masks: path of a projection → mask ``(neurons,)`` bool, as for :func:`~lightning_ablate.ablated`, whose errors
            it raises.
        method: what takes the neurons' place, or its name; ``zero`` needs no calibration.
        calibration: the statistics that the method needs.
        heads: path → which heads; without a calibration one pass over the text finds how many there are.
        neurons: path → which neurons.

    Example:
        >>> from lightning_ablate import CausalLM
        >>> module = CausalLM("demo:gpt2")
        >>> module.configure_model()
        >>> head = {"transformer.h.0.attn.c_proj": [1]}
        >>> found = difference(module.target, module.tokenizer, "def parse(text):", heads=head)
        >>> "".join(found["token"]), int(found["change"].notna().sum()) == len(found) - 1
        ('def parse(text):', True)
    """
    inputs = tokenizer(text, return_tensors="pt").to(device_of(model))
    ids, real = inputs["input_ids"][0].cpu(), inputs["attention_mask"][0].cpu().bool()
    if len(ids) < 2:
        raise DataError(f"the text {text!r:.60} is {len(ids)} tokens, expected at least 2, as one predicts the next")
    if model.training:
        raise ConfigError("the model is in training mode, whose dropout would count as a difference; call model.eval()")
    if heads and calibration is None:
        calibration = Calibration(sites=find_sites(model, inputs))
    with torch.no_grad():
        clean = model(**inputs).logits
        prefix = model(**{name: given[:, :-1] for name, given in inputs.items()}).logits
        if float((prefix - clean[:, :-1]).norm()) > 0.1 * float(clean.norm()):
            raise ConfigError("the model's predictions see later tokens, expected a causal language model")
        with ablated(model, masks, method, calibration, heads=heads, neurons=neurons):
            changed = model(**inputs).logits
    before, after = (
        functional.cross_entropy(logits[0, :-1].cpu().double(), ids[1:], reduction="none").numpy()
        for logits in (clean, changed)
    )
    columns = {"clean": [np.nan, *before], "change": [np.nan, *(after - before)]}
    found = Difference({"token": shown_text(tokenizer, ids, real)["tokens"], **columns})
    units = [
        f"{path} {kind} {list(some)}"
        for kind, given in (("heads", heads), ("neurons", neurons))
        for path, some in (given or {}).items()
    ]
    found.attrs["said"] = f"{method_of(method).name} at {', '.join([*(masks or {}), *units])}"
    return found
