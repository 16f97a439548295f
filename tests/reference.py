"""The plain way of everything, without a line of the package: what tests compare with."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@contextmanager
def plain_hooks(model: nn.Module, replace: Mapping[str, Callable[[Tensor], Tensor | None]]):
    """Changes, or only reads, what goes into modules, by their paths, or comes out of them (``path:output``)."""

    def hook(change):
        def pre_hook(_, inputs):
            changed = change(inputs[0])
            return None if changed is None else (changed,)

        return pre_hook

    def behind(change):
        def post_hook(_, inputs, output):
            changed = change(output[0] if isinstance(output, tuple) else output)
            return changed if changed is None or not isinstance(output, tuple) else (changed, *output[1:])

        return post_hook

    handles = []
    for name, change in replace.items():
        module = model.get_submodule(name.removesuffix(":output"))
        out = name.endswith(":output")
        register = module.register_forward_hook if out else module.register_forward_pre_hook
        handles.append(register(behind(change) if out else hook(change)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def put(mask: Tensor, values: Tensor) -> Callable[[Tensor], Tensor]:
    """Writes values ``(neurons,)``, or ``(positions, neurons)``, into the masked neurons, one after the other."""

    def change(activations):
        changed = activations.clone()
        for neuron in mask.nonzero().flatten().tolist():
            changed[..., neuron] = values[..., neuron]
        return changed

    return change


def forward(model: nn.Module, batch: dict) -> Tensor:
    """What a model of images or text makes of a batch."""
    if "pixel_values" in batch:
        output = model(batch["pixel_values"])
    else:
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return output if isinstance(output, Tensor) else output.logits


def scored(model: nn.Module, batch: dict) -> tuple[Tensor, Tensor]:
    """Logits and targets of a batch: of its classes, of the tokens it asks for, or else of each next token."""
    logits = forward(model, batch)
    if "label" in batch:
        return logits, batch["label"]
    if "labels" in batch:
        return logits[batch["labels"] != -100], batch["labels"][batch["labels"] != -100]
    real = batch["attention_mask"].bool()
    real = real[:, :-1] & real[:, 1:]  # a token predicts the next one only if both are there
    return logits[:, :-1][real], batch["input_ids"][:, 1:][real]


def raw_activations(model: nn.Module, batches: Iterable[dict], paths: Iterable[str]) -> dict[str, Tensor]:
    """Every activation of these modules' inputs at positions that aren't padding, ``(positions, neurons)``."""
    kept = {path: [] for path in paths}
    with torch.no_grad():
        for batch in batches:
            seen = {}
            with plain_hooks(model, {path: partial(seen.__setitem__, path) for path in kept}):
                forward(model, batch)
            for path, x in seen.items():
                kept[path].append(x[batch["attention_mask"].bool()] if "attention_mask" in batch else x.flatten(0, -2))
    return {path: torch.cat(pieces) for path, pieces in kept.items()}


def evaluation(model: nn.Module, batches: Iterable[dict], replace: Mapping | None = None) -> tuple[float, float, int]:
    """Mean cross-entropy, top-1 and the scored positions of a model, with what goes into modules changed."""
    loss, hits, n = 0.0, 0, 0
    with torch.no_grad(), plain_hooks(model, replace or {}):
        for batch in batches:
            logits, targets = scored(model, batch)
            loss += functional.cross_entropy(logits.double(), targets, reduction="sum").item()
            hits += int((logits.argmax(-1) == targets).sum())
            n += len(targets)
    return loss / n, hits / n, n


def peak(column: Tensor) -> float:
    """The paper's peak of one neuron by numpy: the centre of the fullest of 100 bins, or a constant's value."""
    values = column.double().numpy()
    if values.min() == values.max():
        return float(values[0])
    counts, edges = np.histogram(values, bins=100)
    fullest = counts.argmax()
    return float((edges[fullest] + edges[fullest + 1]) / 2)


def peaks(activations: Tensor) -> Tensor:
    """The paper's peaks of all neurons of ``(positions, neurons)``, float64."""
    return torch.tensor([peak(activations[:, neuron]) for neuron in range(activations.shape[1])], dtype=torch.float64)


def conditional_mean(activations: Tensor, mask: Tensor, ridge: float = 1e-6) -> Callable[[Tensor], Tensor]:
    """Puts in the masked neurons' place what a regression of them on the others, by numpy, expects of these."""
    x = activations.double().numpy()
    covariance, mean = np.cov(x.T, bias=True), x.mean(0)
    kept, ablated = (~mask).nonzero().flatten().numpy(), mask.nonzero().flatten().numpy()
    among = covariance[np.ix_(kept, kept)].copy()
    among[np.diag_indices_from(among)] *= 1 + ridge
    slope = np.linalg.solve(among, covariance[np.ix_(kept, ablated)]) if len(kept) else np.zeros((0, len(ablated)))

    def change(values):
        changed = values.clone()
        expected = mean[ablated] + (values[..., kept].double().numpy() - mean[kept]) @ slope
        changed[..., ablated] = torch.from_numpy(expected).to(values.dtype)
        return changed

    return change


def losses(model: nn.Module, batch: dict, row: int, replace: Mapping) -> Tensor:
    """The cross-entropies of the scored positions of one example, run alone with what goes into modules changed."""
    ids, real = batch["input_ids"][row : row + 1], batch["attention_mask"][row : row + 1]
    with plain_hooks(model, replace):
        logits = model(input_ids=ids, attention_mask=real).logits[0, :-1]
    told = real[0, :-1].bool() & real[0, 1:].bool()
    return functional.cross_entropy(logits.double(), ids[0, 1:], reduction="none")[told]
