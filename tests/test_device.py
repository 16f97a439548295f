"""Invariant 17: on a device without float64, as Apple's MPS, sums go to the CPU, and all digits stay the same.

The device of these tests is made of CPU tensors. It refuses float64 and operations that mix devices. PyTorch can't
forget a device, so it lives in a process of its own.
"""

import json
from collections import Counter

import pytest
import torch
from lightning.pytorch.accelerators import AcceleratorRegistry, CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from lightning_ablate import AblationCallback, Attribution, Calibration, ConditionalTuned, Optimal, Ranked, ablated
from lightning_ablate.sites import exact_device, site
from tests import tiny
from tests.command import FEW, here

NAME = "singles"
METHODS = ["zero", "mean", "peak", "positional-mean", "noise", "conditional-mean", "conditional-mean-per-head"]
METHODS += ["resample-same-position"]
ran = Counter()  # operations on the device
PATHS = ["transformer.h.0.attn.c_proj", "transformer.h.1.attn.c_proj"]


class OnDevice(Tensor):
    """A tensor of the device, whose numbers are in a tensor on the CPU."""

    @staticmethod
    def __new__(cls, inner):
        if inner.dtype == torch.float64:
            raise TypeError(f"{NAME} has no float64")
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return Tensor._make_wrapper_subclass(cls, inner.shape, **layout, device=torch.device(NAME, 0))

    def __init__(self, inner):
        self.inner = inner

    def tolist(self):
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):
        return self.inner.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return run(operation, *args, **kwargs or {})


def run(operation, *args, **kwargs):
    """Runs an operation on the CPU. What it makes is of the device, unless it moves its input away."""
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    name, to = operation._schema.name.removeprefix("aten::"), torch.device(kwargs.get("device") or NAME)
    if name == "_to_copy" and to.type == "cpu" and kwargs.get("dtype") == torch.float64:
        raise TypeError(f"{NAME} has no float64, and changes a dtype before it moves a tensor")  # as MPS does
    if name not in ("_to_copy", "copy_", "index", "index_put_") and any(
        t.ndim and not isinstance(t, OnDevice) for t in given
    ):
        raise RuntimeError(f"{name} got tensors of {NAME} and of the CPU")
    if kwargs.get("device") is not None:
        kwargs["device"] = "cpu"
    known = {id(tensor.inner): tensor for tensor in given if isinstance(tensor, OnDevice)}
    args, kwargs = tree_map_only(OnDevice, lambda tensor: tensor.inner, (args, kwargs))
    made = operation(*args, **kwargs)
    ran[name] += 1
    if to.type == "cpu" or (name == "copy_" and id(args[0]) not in known):
        return made
    return tree_map_only(Tensor, lambda tensor: known[id(tensor)] if id(tensor) in known else OnDevice(tensor), made)


class Making(TorchDispatchMode):
    """Lets tensors be made on the device."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        asked = torch.device(kwargs.get("device") or "cpu").type
        return run(operation, *args, **kwargs) if asked == NAME or OnDevice in types else operation(*args, **kwargs)


class Tensors(TorchFunctionMode):
    """Does the same for ``torch.tensor``, which no dispatch mode sees."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", None) if function is torch.tensor else None
        made = function(*args, **kwargs)
        return made if device is None else made.to(device)


class SinglesAccelerator(CPUAccelerator):
    def setup_device(self, device):
        pass


def register():
    """Makes the device known to this process."""
    _setup_privateuseone_for_python_backend(NAME)
    AcceleratorRegistry.register(NAME, SinglesAccelerator)
    StrategyRegistry.register(NAME, SingleDeviceStrategy, device=torch.device(NAME, 0))


def on(device):
    return {"accelerator": device, "strategy": NAME if device == NAME else "auto"}


def refused():
    """What the device says to everything that it must refuse."""
    single, said = torch.ones(2, device=NAME), []
    for refuse in (
        single.double,
        lambda: single.to("cpu", torch.float64),
        lambda: torch.ones(2, dtype=torch.float64).to(NAME),
        lambda: torch.zeros(2, dtype=torch.float64, device=NAME),
        lambda: single.sum(0, dtype=torch.float64),
        lambda: single + torch.ones(2),
    ):
        with pytest.raises((TypeError, RuntimeError)) as caught:
            refuse()
        said.append(str(caught.value))
    return said


def first_command(folder, device):
    """The README's first command, on fewer images."""
    limits = ["--trainer.limit_train_batches=4", "--trainer.limit_val_batches=2"]
    more = ["--trainer.enable_progress_bar=false", *(f"--trainer.{name}={value}" for name, value in on(device).items())]
    with sdpa_kernel(SDPBackend.MATH):  # the device has no other
        here("fit", *FEW, *limits, *more, f"--ablation.dirpath={folder / 'first'}")
    return (folder / "first" / "results.csv").read_text()


class There(tiny.Own):
    def evaluate(self, batch):
        scored = super().evaluate(batch)
        assert isinstance(scored.logits, OnDevice) == (type(self.trainer.accelerator) is SinglesAccelerator)
        return scored


def fitted(folder, device, callback):
    """Calibration, learning, attribution and the sweep of a tiny language model."""
    model = tiny.gpt2(attn_implementation="eager")
    return tiny.fit(folder, There(model), callback=callback, **on(device))


def everything(folder, device):
    """Every phase, and what its checkpoint gives for a target on the device outside of a run."""
    methods = [*METHODS, Optimal(steps=3), ConditionalTuned(1e-2, steps=2, examples=4)]
    attribution = Attribution(["mean", "noise", "conditional-mean"], draws=2, verify=1)
    made = AblationCallback(methods, [0.5, 1.0], [1], attribution=attribution)
    made.dirpath = folder / "all"
    module, _ = fitted(folder, device, made)
    learned = [values.tolist() for values in made.run.calibration.learned["optimal"].values()]
    found = [made.results.table.to_csv(), made.attributions.to_csv(), learned]
    target = module.target.to(device)
    known, ids = Calibration.load(folder / "all" / "ablation.ckpt", target), tiny.tokens()["input_ids"].to(device)
    for method in ("peak", "positional-mean", "conditional-mean", "optimal"):
        with torch.no_grad(), ablated(target, {path: torch.arange(16) < 8 for path in PATHS}, method, known):
            found.append(target(ids, use_cache=False).logits.tolist())
    return found


def ranked(folder, device):
    """Choices that go by covariances and by the target's own weights."""
    choices = [Ranked("surgeon"), Ranked("unexplained"), Ranked("weighted-rms", unit="head")]
    callbacks = [AblationCallback(["mean"], [0.5], neurons=choice) for choice in choices]
    return [fitted(folder, device, callback)[1].results.table.to_csv() for callback in callbacks]


CASES = {"first_command": first_command, "everything": everything, "ranked": ranked}


def on_device(_, folder):
    register()
    with Tensors(), Making():
        found = {"refused": refused()}
        with pytest.raises(TypeError, match=f"{NAME} has no float64"):  # as long as it isn't known
            fitted(folder / "unknown", NAME, AblationCallback(["mean"], [0.5]))
        site.WITHOUT_FLOAT64.add(NAME)
        for name, case in CASES.items():
            ran.clear()
            found[name] = case(folder / name, NAME)
            assert ran["addmm"] > 100  # or the target ran elsewhere
    (folder / "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("device")
    torch.multiprocessing.start_processes(on_device, (folder,), start_method="forkserver")
    return json.loads((folder / "found.json").read_text())


def test_the_device_refuses_float64_and_mixed_devices(found):
    *without, mixed = found["refused"]
    assert len(without) == 5 and all(f"{NAME} has no float64" in said for said in without)
    assert mixed == f"add got tensors of {NAME} and of the CPU"


@pytest.mark.parametrize("name", CASES)
def test_a_device_without_float64_gives_the_same_digits(name, found, tmp_path):
    assert found[name] == CASES[name](tmp_path, "cpu")


def test_only_mps_hands_its_sums_to_the_cpu():
    for name, exact in (("cpu", "cpu"), ("mps", "cpu"), ("cuda:1", "cuda:1"), ("meta", "meta")):
        assert exact_device(torch.device(name)) == torch.device(exact)
