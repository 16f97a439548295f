"""The compiled target gives the figures of the plain one, and is compiled once for all conditions."""

import pytest
import torch

from lightning_ablate import AblationCallback, CausalLM
from lightning_ablate.errors import ConfigError
from tests import tiny
from tests.test_sites import hooks
from tests.test_sweep import sweep_of


@pytest.fixture
def compilations(monkeypatch):
    """How often the target was compiled; without code being generated, which needs a compiler and takes long."""
    from torch import nn

    found, plain = [], nn.Module.compile

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", lambda self: plain(self, backend=backend))
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


def run(folder, module, compiled, methods):
    callback = AblationCallback(methods, [0.5, 1.0], [1, 2], compile=compiled, folder=folder / str(compiled))
    tiny.trainer(folder, callback).fit(module, tiny.loader(6, 2, seed=1), tiny.loader(8, 2, seed=2))
    return callback.results.rows


def test_the_compiled_target_gives_the_same_figures(tmp_path, gpt2_folder, compilations):
    methods = ["zero", "mean", "peak", "resample-ids"]
    module = CausalLM(gpt2_folder)
    plain, compiled = (run(tmp_path, module, compiled, methods) for compiled in (False, True))
    assert compilations and hooks(module.target) == 0 and module.target._compiled_call_impl is None
    for one, other in zip(plain, compiled, strict=True):
        assert other.cross_entropy == pytest.approx(one.cross_entropy, abs=1e-5)
        assert other.kl == pytest.approx(one.kl, abs=1e-5) and other.n == one.n


def test_no_condition_compiles_anew(compilations):
    model = tiny.gpt2()
    sweep, counted = sweep_of(model, fractions=(0.25, 0.5, 0.75, 1.0), seeds=(1, 2, 3)), []
    assert len(sweep.conditions) == 1 + 3 * 10
    with sweep.compiled():
        for condition in sweep.conditions:
            with sweep.applied(condition):
                tiny.run(model)
            counted.append(len(compilations))
    assert counted[0] > 0 and set(counted) == {counted[0]}


def test_hooks_are_gone_after_an_exception(compilations):
    model = tiny.gpt2()
    sweep = sweep_of(model)
    with pytest.raises(ZeroDivisionError), sweep.compiled():
        raise ZeroDivisionError
    assert hooks(model) == 0 and model._compiled_call_impl is None


def test_a_module_that_runs_again_is_refused():
    with pytest.raises(ConfigError, match="runs several times"), sweep_of(tiny.albert()).compiled():
        pass
