"""Layers that are answered from the intact pass: exact to the bit, or not at all (invariant 18)."""

import pytest
import torch
from torch import nn

from lightning_ablate import EachHead, EachLayer, Scored, Zero
from lightning_ablate.phases import SweepPhase
from lightning_ablate.run import Run
from lightning_ablate.sites import Prefix, Site, blocks_of, hooked
from lightning_ablate.sweep import Sweep
from tests import reference, tiny


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.runs, self.left = 0, []

    def forward(self, x):
        self.runs += 1
        self.left.append(x)
        return x + self.down(self.up(x).relu())


class Stack(nn.Module):
    """Three layers, the last two of which have sites, and what else a target may do with them."""

    def __init__(self, kind="plain"):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.layers = kind, nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            layer.left.clear()
            y = layer(x)
            if self.kind == "writes":
                y += 1  # into what the layer has returned
            x = layer(y) if self.kind == "twice" else y
        return x * sum(len(layer.left) for layer in self.layers) if self.kind == "leaves more" else x


SITES = [Site(f"layers.{number}.down", 8, kind="mlp", layer=f"layers.{number}") for number in (1, 2)]
TWICE = [Site(f"layers.{n}.down#{use}", 8, kind="mlp", uses=2) for n in (1, 2) for use in (0, 1)]
INPUT = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))


class Module(tiny.Ran):
    def evaluate(self, batch):
        logits = self.target(INPUT).flatten(0, 1)
        return Scored(logits, torch.zeros(6, dtype=torch.int64), torch.arange(6) // 3)


def swept_alone(model, room=2**30):
    calibration = Run("", tiny.Calibration(sites=SITES))
    phase = SweepPhase(Module(model), calibration, Sweep((Zero(),), (1.0,), (0,), EachLayer()), [0])
    phase._prefix._room = room
    phase.step(None, 0)
    return phase


def swept(model, choice, module=None, room=2**30):
    """The sweep of each unit alone after its one batch, with so many bytes for what is kept."""
    module = module(model) if isinstance(module, type) else module or tiny.Ran(model)
    sites = SITES if isinstance(model, Stack) else tiny.sites(model)
    calibration = Run("", tiny.Calibration(sites=sites))
    phase = SweepPhase(module, calibration, Sweep((Zero(),), (1.0,), (0,), choice), [0])
    phase._prefix._room = room
    for layer in model.layers if isinstance(model, Stack) else ():
        layer.runs = 0
    phase.step(None, 0)
    assert reference.hooks(model) == 0 and not any("forward" in vars(one) for one in model.modules())
    return phase


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "writes"])
def test_each_layer_alone_runs_no_layer_before_it_again(kind):
    model = Stack(kind)
    phase = swept(model, EachLayer(), Module(model))
    # the intact pass; the proof; the last layer alone; the one before it
    assert [layer.runs for layer in model.layers] == [2, 3, 4]
    whole = swept(model, EachLayer(), Module(model), room=0)
    assert [layer.runs for layer in model.layers] == [3, 3, 3]
    assert torch.equal(phase.metrics.sums, whole.metrics.sums)


@torch.no_grad()
def test_what_a_layer_hands_on_in_other_ways_than_it_returns_is_noticed():
    model = Stack("leaves more")
    phase = swept(model, EachLayer(), Module(model))
    assert not phase._prefix._modules
    assert [layer.runs for layer in model.layers][1:] == [3, 4]  # all whole, and the proof


@torch.no_grad()
@pytest.mark.parametrize("kind", ["hook", "shared"])
def test_what_layers_hand_on_is_noticed_where_a_pass_of_all_answers_hides_it(kind):
    """The last layer that is answered doesn't run there."""

    class Hands(Stack):
        def forward(self, x):
            left, made = {}, x
            for number, layer in enumerate(self.layers):
                if kind == "shared" and number == 1:
                    made = made + left.get("first", 0)  # what the layer before left, and not returned
                self.layers[0].leaves = left
                made = layer(made)
            return made

    model, whole = Hands(), Hands()
    for one in (model, whole):
        own = one.layers[0].forward
        if kind == "hook":
            one.layers[0].register_forward_hook(lambda module, inputs, output: output + 1)
        else:
            one.layers[0].forward = lambda x, own=own, one=one: one.layers[0].leaves.update(first=x) or own(x)
    found = swept_alone(model)
    assert torch.equal(found.metrics.sums, swept_alone(whole, room=0).metrics.sums)
    assert not found._prefix._modules


@torch.no_grad()
def test_a_metric_of_ones_own_must_be_the_same_too():
    class Counts(Module):
        metrics = ("runs",)

        def evaluate(self, batch):
            before = sum(layer.runs for layer in self.target.layers)
            scored = super().evaluate(batch)
            count = sum(layer.runs for layer in self.target.layers) - before
            return scored._replace(extra={"runs": torch.full((6,), float(count))})

    phase = swept(Stack(), EachLayer(), Counts)
    assert phase.metrics.means["runs"].tolist() == [3, 3, 3]


@torch.no_grad()
def test_a_layer_that_fails_where_an_earlier_one_did_not_run_is_run_whole():
    class Failing(Stack):
        def forward(self, x):
            self.layers[0].made = None
            x = super().forward(x)
            return x + self.layers[0].made

    model = Failing()
    model.layers[0].register_module("inner", nn.Identity())
    model.layers[0].forward = lambda x: setattr(model.layers[0], "made", x) or x + 1
    module = Module(model)
    calibration = Run("", tiny.Calibration(sites=SITES))
    phase = SweepPhase(module, calibration, Sweep((Zero(),), (1.0,), (0,), EachLayer()), [3])
    own = model.layers[0].forward
    phase.step(None, 0)
    assert not phase._prefix._modules and model.layers[0].forward is own


@torch.no_grad()
def test_a_layer_that_runs_twice_or_returns_an_object_is_never_answered():
    model = Stack("twice")
    prefix = Prefix(model, TWICE, 3, 1e9)
    with prefix.recorded():
        model(INPUT)
    assert not prefix._kept
    model = Stack()
    prefix = Prefix(model, SITES, 1, 1e9)
    model.layers[0].register_forward_hook(lambda *_: [INPUT, object()])
    model.layers[1].register_forward_pre_hook(lambda *_: (INPUT,))
    with prefix.recorded():
        model(INPUT)
    assert list(prefix._kept) == ["layers.1"]


@torch.no_grad()
@pytest.mark.parametrize("make", [tiny.gpt2, tiny.roberta, tiny.vit, tiny.t5, tiny.mistral])
def test_a_map_of_heads_has_the_sums_of_whole_passes_to_the_bit(make):
    model = make()
    found = swept(model, EachHead())
    assert torch.equal(found.metrics.sums, swept(model, EachHead(), room=0).metrics.sums)


def test_blocks_are_the_numbered_modules_around_sites_and_those_beside_them():
    model = nn.ModuleDict({"stages": nn.ModuleList([nn.ModuleDict({"block_1": Layer(), "block_2": Layer()})])})
    model["head"] = nn.ModuleList([Layer()])
    found = blocks_of(model, [Site("stages.0.block_2.down", 8)])
    assert found == ["stages.0", "stages.0.block_1", "stages.0.block_2"]


@torch.no_grad()
def test_the_forward_that_a_module_was_given_is_back_afterwards():
    model = Stack()
    own = model.layers[0].forward
    model.layers[0].forward = own  # as accelerate does
    prefix = Prefix(model, SITES, 1, 1e9)
    with hooked(model, {}), prefix.recorded():
        expected = model(INPUT)
    with pytest.raises(RuntimeError, match="in the pass"), prefix.reused(1):
        assert torch.equal(model(INPUT), expected)
        raise RuntimeError("in the pass")
    assert vars(model.layers[0])["forward"] is own and "forward" not in vars(model.layers[1])
