"""One library's ablated evaluation beside a bare Hugging Face one; started by peers.py with each library's Python.

Prints one line of JSON: the library's version, the cross-entropy (nats per scored position), and the seconds of both.
"""

import importlib.metadata
import json
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_grad_enabled(False)


def ours(folder, target, masks):
    from lightning_ablate import ablated

    named = {f"model.decoder.layers.{layer}.self_attn.out_proj": mask for layer, mask in enumerate(masks)}

    def run(ids):
        with ablated(target, named):
            return target(input_ids=ids).logits

    return run


def transformer_lens(folder, target, masks):
    from transformer_lens.model_bridge import TransformerBridge

    tokenizer = AutoTokenizer.from_pretrained(folder)
    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu", hf_model=target, tokenizer=tokenizer)

    def zero(layer):
        return lambda z, hook: torch.where(masks[layer].view(z.shape[2:]), 0.0, z)

    hooks = [(f"blocks.{layer}.attn.hook_z", zero(layer)) for layer in range(len(masks))]
    return lambda ids: bridge.run_with_hooks(ids, fwd_hooks=hooks)


def nnsight(folder, target, masks):
    from nnsight import NNsight

    wrapped = NNsight(target)

    def run(ids):
        with wrapped.trace(input_ids=ids):
            for layer, mask in zip(wrapped.model.decoder.layers, masks):  # noqa: B905 - as its users write it
                layer.self_attn.out_proj.input = torch.where(mask, 0.0, layer.self_attn.out_proj.input)
            logits = wrapped.output.logits.save()
        return logits

    return run


def taker(folder, target, masks):
    from taker import Model

    model = Model(str(folder), dtype="fp32", model_device="cpu")
    model.hooks.delete_attn_neurons(masks)
    return lambda ids: model.predictor(ids).logits


def score(logits, ids):
    """The summed cross-entropy, and right answers counted as well, as a bare evaluation does."""
    logits, targets = logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    int((logits.argmax(1) == targets).sum())
    return functional.cross_entropy(logits.float(), targets, reduction="sum").item()


def main():
    name, folder, rounds = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    masks, ids = torch.load(folder / "masks.pt"), torch.load(folder / "ids.pt")
    # loaded for the bare passes and for the library apart, so that nothing a library leaves behind slows the bare ones
    bare, target = (AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2))
    for model in (bare, target):
        model.config.use_cache = False
    runs = {"bare": lambda batch: bare(input_ids=batch).logits, name: globals()[name](folder, target, masks)}
    seconds, loss = {which: [] for which in runs}, {}
    for _ in range(rounds + 1):  # the first one warms up
        for which, run in runs.items():
            began = time.perf_counter()
            loss[which] = sum(score(run(batch), batch) for batch in ids)
            seconds[which].append(time.perf_counter() - began)
    positions = ids[:, :, 1:].numel()
    found = {"version": importlib.metadata.version("lightning_ablate" if name == "ours" else name)}
    found |= {"clean": loss["bare"] / positions, "cross_entropy": loss[name] / positions}
    print(json.dumps({**found, "bare": seconds["bare"][1:], "ablated": seconds[name][1:]}))


if __name__ == "__main__":
    main()
