import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_ablate.statistics import LatticeHistogram, Moments
from tests.statistics.test_lattice import DTYPES, adversarial

pytest.importorskip("triton")


def test_kernels_agree_with_their_reference_in_tritons_interpreter(request):
    seeds = "5" if request.config.getoption("--full") else "1"
    run = subprocess.run(
        [sys.executable, "-m", "tests.statistics.kernels_interpreted", seeds],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.stdout.endswith("kernels agree\n"), run.stderr


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset")
@pytest.mark.parametrize("value", ["bf16", "fp16", "fp32", "fp64"])
def test_kernels_compile_for_a_gpu_that_need_not_be_there(value):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from lightning_ablate.statistics import kernels

    by = "*fp64" if value == "fp64" else "*fp32"
    sizes = {"positions": "i32", "neurons": "i32", "stride": "i32", "share": "i32", "counts_stride": "i32"}
    pointers = {"rows": f"*{value}", "counts": "*i32", "skip": "*i1", "reference": "*fp64"}
    for kernel in (kernels._count_inside, kernels._count_outside, kernels._power_sums):
        found = "*fp64" if kernel is kernels._power_sums else by
        types = {**pointers, "found": found, **sizes, "BT": "constexpr", "BN": "constexpr"}
        signature = {name: types.get(name, by) for name in kernel.arg_names}
        made = compile(ASTSource(kernel, signature, {"BT": 32, "BN": 64}), target=GPUTarget("cuda", 90, 32))
        assert ".target sm_90" in made.asm["ptx"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_agree_with_their_reference_on_the_gpu(dtype):
    for seed in range(5):
        x = adversarial(dtype, seed)
        for kind in (LatticeHistogram, Moments):
            here, there = kind(x.shape[1]), kind(x.shape[1]).cuda()
            for part in x.split(29):
                here.update(part.unsqueeze(0))
                there.update(part.cuda().unsqueeze(0))
            for name, state in here.state_dict().items():
                torch.testing.assert_close(there.state_dict()[name].cpu(), state, rtol=1e-9, atol=0)
