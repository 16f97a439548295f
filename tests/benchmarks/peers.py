"""The same ablated evaluation by other libraries, next to ours.

``python -m tests.benchmarks.peers`` installs TransformerLens, nnsight and taker from the package index, each into an
environment of its own (``--environments`` keeps them), zeroes half of the attention pre-out neurons of a random OPT,
the same ones for all, and compares. Each library runs in its own process, interleaved with a bare Hugging Face forward
pass with cross-entropy and top-1 there. The last line is our ratio to that pass.
"""

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import torch

from lightning_ablate import Random, Site
from lightning_ablate.conditions import Selection
from tests import tiny
from tests.benchmarks import targets

PEERS = {"transformer_lens": "transformer-lens", "nnsight": "nnsight", "taker": "taker"}
SCRIPT = Path(__file__).with_name("peer.py")


def python_of(environments, package):
    folder = environments / package
    if not (folder / "installed").exists():
        venv.create(folder, with_pip=True)
        subprocess.run([folder / "bin/python", "-m", "pip", "install", "--quiet", package], check=True)
        (folder / "installed").touch()
    return str(folder / "bin/python")


def save(folder, shape, batches, batch, length):
    """The target, token ids, and masks of half of the neurons of each layer."""
    torch.manual_seed(0)
    target = targets.opt(**(targets.SMALL_OPT if shape == "tiny" else {}))
    target.save_pretrained(folder)
    tiny.tokenizer(longest=2048).save_pretrained(folder)
    torch.save(torch.randint(5, 200, (batches, batch, length)), folder / "ids.pt")
    layers, width = target.config.num_hidden_layers, target.config.hidden_size
    masks = [Random().mask(Selection(0.5, 1), Site(f"layers.{layer}.out_proj", width)) for layer in range(layers)]
    torch.save(torch.stack(masks), folder / "masks.pt")


def main():
    description = "Compares ablated evaluations by several libraries."
    parser = targets.parser(description, ("tiny", "opt-125m"), tokens=4096, rounds=5)
    parser.add_argument("--environments", type=Path, help="folder of the libraries' environments, which are kept")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "target"
        folder.mkdir()
        save(folder, given.shape, given.tokens // (given.batch * given.length), given.batch, given.length)
        environments = given.environments or Path(temporary)
        pythons = {name: python_of(environments, PEERS[name]) for name in given.peers}
        found = {}
        for name, python in {**pythons, "ours": sys.executable}.items():
            command = [python, str(SCRIPT), name, str(folder), str(given.rounds)]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                sys.exit(f"{name} failed: {run.stderr[-2000:]}")
            found[name] = json.loads(run.stdout.splitlines()[-1])
    print(f"{given.shape}, {given.tokens:,} tokens; the clean cross-entropy is {found['ours']['clean']:.6f}")
    print(f"{'library':18} {'version':10} {'ablated / bare':>14} {'cross-entropy':>14}")
    for name, one in found.items():
        ratio = targets.ratio(zip(one["bare"], one["ablated"], strict=True))
        print(f"{name:18} {one['version']:10} {ratio:14.3f} {one['cross_entropy']:14.6f}")
    losses = [one["cross_entropy"] for one in found.values()]
    print(f"largest difference of the cross-entropies: {max(losses) - min(losses):.1e}")
    print(f"ours / bare forward: {ratio:.3f}")


if __name__ == "__main__":
    main()
