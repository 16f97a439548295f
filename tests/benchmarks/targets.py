"""Targets with random weights in the shapes of known models, the embedded ones, batches for them, and measures."""

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional

from lightning_ablate import CausalLM, Digits, ImageClassifier, PythonTexts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL_OPT = {"hidden_size": 64, "ffn_dim": 256, "num_hidden_layers": 2, "num_attention_heads": 4}


class Text(CausalLM):
    def __init__(self, make):
        super().__init__("random")
        self.make = make

    def build_target(self):
        return on_device(self.make)

    def probes(self, batch):
        """It has no tokenizer to make them with."""


def on_device(make):
    """Made where it runs, in bfloat16 on a GPU."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    try:
        with torch.device(DEVICE):
            target = make()
    finally:
        torch.set_default_dtype(torch.float32)
    target.eval().requires_grad_(False)
    target.config.use_cache = False
    return target


def opt(**shape):
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(OPTConfig(**shape, word_embed_proj_dim=shape.get("hidden_size", 768)))


def mistral():
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig())


MAKERS = {
    "digits": lambda: ImageClassifier("demo:vit"),
    "gpt2": lambda: CausalLM("demo:gpt2"),
    "tiny": lambda: Text(lambda: opt(**SMALL_OPT)),
    "opt-125m": lambda: Text(opt),
    "mistral-7b": lambda: Text(mistral),
}
EMBEDDED = {"digits": Digits, "gpt2": PythonTexts}


def batches(shape, module, tokens, batch, length):
    if shape in EMBEDDED:
        data = EMBEDDED[shape]()
        data.trainer = type("Trainer", (), {"lightning_module": module, "global_rank": 0, "world_size": 1})()
        module.configure_model()
        made = data.val_dataloader()
    else:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1000, (max(1, tokens // (batch * length)), batch, length), generator=generator)
        index = torch.arange(len(ids) * batch).view(len(ids), batch)
        pairs = zip(ids, index, strict=True)
        made = [{"input_ids": i, "attention_mask": torch.ones_like(i), "index": n} for i, n in pairs]
    return [{name: tensor.to(DEVICE) for name, tensor in one.items()} for one in made]


@torch.no_grad()
def bare(target, batch):
    """One forward pass with a plain cross-entropy and argmax: their sums."""
    if "pixel_values" in batch:
        logits, labels = target(batch["pixel_values"]), batch["label"]
    else:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = target(input_ids=ids, attention_mask=mask).logits[:, :-1].flatten(0, 1)
        labels = torch.where(mask[:, 1:] > 0, ids[:, 1:], -100).flatten()
    loss = functional.cross_entropy(logits.float(), labels, reduction="sum")
    return loss.item(), int((logits.argmax(1) == labels).sum())


def wait():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(run, *arguments):
    wait()
    began = time.perf_counter()
    run(*arguments)
    wait()
    return time.perf_counter() - began


def show(names, times):
    """Prints the median seconds of each, of rounds in which all were timed."""
    for name, found in zip(names, zip(*times, strict=True), strict=True):
        print(f"{name:14} {statistics.median(found):8.3f} s")


def ratio(times, which=1):
    """The median over the rounds of the seconds of one over those of the first."""
    return statistics.median(found[which] / found[0] for found in times)


def parser(description, shapes, *, tokens=8192, rounds, measured=()):
    """Sizes, and of what an own process prints the largest memory."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--shape", choices=shapes, default="opt-125m")
    for name, value in {"tokens": tokens, "batch": 8, "length": 256, "rounds": rounds}.items():
        made.add_argument(f"--{name}", type=int, default=value)
    if measured:
        made.add_argument("--memory", action="store_true", help="what is added to the largest memory")
        made.add_argument("--only", choices=measured, help="prints the largest memory in KiB")
    return made


def largest_memory(run):
    """The most memory in use during a run, in KiB; on a CPU that of the process (Linux)."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() // 1024
    Path("/proc/self/clear_refs").write_text("5")  # forgets the high-water mark
    run()
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def compare(benchmark, description, shapes, make, parts, rounds):
    """Seconds of a benchmark's parts of a rig, by name, in each round; the first one is what the others ride on.

    With ``--memory`` prints what these add to its largest memory, with ``--only`` the memory of a part alone.
    """
    names = list(parts)
    given = parser(description, shapes, rounds=rounds, measured=names).parse_args()
    if given.memory:
        for tokens in (given.tokens, 2 * given.tokens):
            bare, *others = (memory_of(benchmark, given, name, tokens=tokens) for name in names)
            extra = (f"{(own - bare) / 1024:.0f} MiB by {name}" for own, name in zip(others, names[1:], strict=True))
            print(f"added at {tokens:,} tokens: {', '.join(extra)}")
    rig = make(given.shape, given.tokens, given.batch, given.length)
    if given.only:
        for earlier in names[1 : names.index(given.only)]:
            parts[earlier](rig)
        print(largest_memory(lambda: parts[given.only](rig)))
        sys.exit()
    print(f"{given.shape} on {DEVICE}, {given.tokens:,} tokens, batches of {given.batch} x {given.length}")
    parts[names[0]](rig)
    times = [[seconds(part, rig) for part in parts.values()] for _ in range(given.rounds)]
    show(parts, times)
    return times


def memory_of(benchmark, given, what, **changed):
    """The largest memory of a part of a benchmark in a process of its own, in KiB."""
    sizes = {name: vars(given)[name] for name in ("shape", "tokens", "batch", "length")} | changed
    options = [f"--{name}={size}" for name, size in sizes.items()]
    command = [sys.executable, "-m", f"tests.benchmarks.{benchmark}", *options, f"--only={what}"]
    # large tensors in memory of their own, which is given back at once: the largest is then what was in use
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(run.stdout.split()[-1])
