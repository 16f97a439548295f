"""Experts of mixtures: against a router and experts written out here, token by token."""

import copy
from contextlib import ExitStack, contextmanager
from unittest import mock

import accelerate
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_ablate import (
    AblationCallback,
    Attribution,
    Calibration,
    ConditionalMean,
    ConditionalTuned,
    EachExpert,
    Moments,
    Optimal,
    ablated,
    find_sites,
)
from lightning_ablate.attribution import table_of
from lightning_ablate.errors import ConfigError, SiteError, StatisticsError
from lightning_ablate.methods import AblationMethod
from lightning_ablate.methods.reroute import OfRouter
from lightning_ablate.sites import hooked
from tests import coverage, reference, tiny
from tests.test_coverage import tiny as small

RIDGE = 0.01
PATH = "model.layers.{}.mlp.experts"
MIXTURES = [case for case in coverage.COVERED if case.experts]


def plain(model, layer, change=None, without=(), kept=None):
    """The mixture of a layer, token by token: ``change`` maps an expert to what is done with its neurons."""
    block = model.model.layers[layer].mlp

    def forward(states):
        output = torch.zeros_like(states)
        for example, position in torch.cartesian_prod(*map(torch.arange, states.shape[:2])).tolist():
            x = states[example, position]
            shares = (block.gate.weight @ x).softmax(0)
            shares[list(without)] = -1
            best = sorted(range(4), key=lambda expert: -shares[expert].item())[:2]
            for expert in best:
                gate, up = (block.experts.gate_up_proj[expert] @ x).chunk(2)
                own = F.silu(gate) * up
                if kept is not None:
                    kept.append((example, position, expert, own))
                own = change[expert](own) if change and expert in change else own
                output[example, position] += block.experts.down_proj[expert] @ own * shares[expert] / shares[best].sum()
        return output

    return mock.patch.object(block, "forward", forward)


def raw(model, batches, layer):
    """The neurons of each expert at the real positions that are routed to it, ``(positions, neurons)``."""
    found = {expert: [] for expert in range(4)}
    for batch in batches:
        kept = []
        with torch.no_grad(), plain(model, layer, kept=kept):
            reference.forward(model, batch)
        for example, position, expert, own in kept:
            if batch["attention_mask"][example, position]:
                found[expert].append(own)
    return {expert: torch.stack(rows) for expert, rows in found.items()}


@contextmanager
def stacked(contexts):
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def evaluated(model, contexts):
    with stacked(contexts):
        return reference.evaluation(model, tiny.loader(seed=2))


def swept(tmp_path, methods, **options):
    callback = AblationCallback(methods, seeds=[1], sites=["experts"], **options)
    module, _ = tiny.fit(tmp_path, tiny.Own(tiny.mixtral()), callback=callback, train=tiny.loader(40, seed=1))
    return module.target, callback


def test_each_expert_is_swept_as_one_would_by_hand(tmp_path):
    model, callback = swept(tmp_path, ["zero", "mean", "reroute"], neurons=EachExpert())
    table = callback.results.table.set_index(["method", "part"])
    assert len(table) == 1 + 3 * 8
    intact = evaluated(model, [plain(model, 0), plain(model, 1)])
    assert callback.results.table["cross_entropy"][0] == pytest.approx(intact[0], abs=1e-6)
    for layer in (0, 1):
        neurons = raw(model, tiny.loader(40, seed=1), layer)
        for expert, x in neurons.items():
            name = f"{PATH.format(layer)}:expert{expert}"
            site = next(s for s in callback.run.calibration.sites if s.name == name)
            moments = callback.run.calibration[site][Moments]
            assert int(moments.count) == len(x) and site.kind == "expert" and site.layer == f"model.layers.{layer}"
            torch.testing.assert_close(moments.mean, x.double().mean(0), rtol=0, atol=1e-6)
            ways = {
                "zero": plain(model, layer, {expert: torch.zeros_like}),
                "mean": plain(model, layer, {expert: lambda own, x=x: x.double().mean(0).float()}),
                "reroute": plain(model, layer, without=[expert]),
            }
            for method, way in ways.items():
                loss, top1, n = evaluated(model, [way])
                found = table.loc[method, name]
                assert found["cross_entropy"] == pytest.approx(loss, abs=1e-6)
                assert (found["top1"], found["n"], found["ablated"]) == (pytest.approx(top1), n, 1 / 8)
    assert table.loc["zero"]["cross_entropy"].nunique() == 8


def test_neurons_of_experts_are_swept_as_one_would_by_hand(tmp_path):
    model, callback = swept(tmp_path, ["zero", "mean", ConditionalMean(RIDGE)], fractions=[0.5])
    table, sites = callback.results.table.set_index("method"), callback.run.calibration.sites
    neurons = [raw(model, tiny.loader(40, seed=1), layer) for layer in (0, 1)]
    for condition in callback.sweep.conditions(sites)[1:]:
        masks = callback.sweep.masks(condition, callback.run.calibration)
        ways = []
        for layer in (0, 1):
            change = {}
            for expert, x in neurons[layer].items():
                mask = next(mask for site, mask in masks.items() if site.name == f"{PATH.format(layer)}:expert{expert}")
                values = {"zero": torch.zeros(32), "mean": x.double().mean(0).float()}.get(condition.method)
                put = reference.conditional_mean(x, mask, RIDGE) if values is None else reference.put(mask, values)
                change[expert] = lambda own, put=put: put(own.unsqueeze(0))[0]
            ways.append(plain(model, layer, change))
        assert table.loc[condition.method]["cross_entropy"] == pytest.approx(evaluated(model, ways)[0], abs=1e-6)
        assert table.loc[condition.method]["ablated"] == 0.5


@torch.no_grad()
@pytest.mark.parametrize("case", MIXTURES, ids=lambda case: case.name)
def test_zero_is_a_matrix_of_zeros_on_every_mixture(case):
    target = small(case)
    sites = find_sites(target.model, lambda: target.run(0), "experts")
    assert len({site.layer for site in sites}) == 2 and len(sites) == 8
    with hooked(target.model, {}):
        intact = target.run(0)
    different = 0
    for site in (sites[1], sites[-1]):
        with hooked(target.model, {site: torch.zeros_like}, once=True):
            found = target.run(0)
        own = target.model.get_submodule(site.path).down_proj[site.expert]
        before = own.clone()
        own.zero_()
        expected = target.run(0)
        own.copy_(before)
        for one, other, whole in zip(found, expected, intact, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
            different += not torch.equal(one, whole)
    assert different
    assert reference.hooks(target.model) == 0
    assert not any("forward" in vars(module) for module in target.model.modules())


@torch.no_grad()
@pytest.mark.parametrize("case", MIXTURES, ids=lambda case: case.name)
def test_no_token_is_routed_to_an_expert_whose_score_is_least(case):
    target, seen = small(case), {}
    sites = find_sites(target.model, lambda: target.run(0), "experts")
    hooks = dict.fromkeys([one for one in sites if one.path == sites[2].path], lambda x: None)
    hooks[sites[2]] = OfRouter(torch.ones(1), lambda scores: torch.full_like(scores, -torch.inf))
    with ExitStack() as stack:
        if case.name == "phimoe":  # it takes the largest twice, by max
            stack.enter_context(pytest.raises(SiteError, match="doesn't choose by the largest scores"))
        with hooked(target.model, hooks, once=True, routed=seen):
            target.run(0)
    if case.name == "phimoe":
        return
    assert sites[2] not in seen
    each = torch.stack([*seen.values()]).sum(0)
    assert set(each.flatten().tolist()) == {2}  # as many experts as before, all of them others


@torch.no_grad()
def test_only_tokens_of_the_expert_are_rerouted_where_groups_are_chosen_first():
    sizes = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 2, "first_k_dense_replace": 0}
    case = coverage.Case("decoder", "deepseek_v3", options={**coverage.LATENT, **sizes})
    target, chosen = small(case), []
    experts = target.model.layers[0].mlp.experts
    handle = experts.register_forward_pre_hook(lambda module, inputs: chosen.append(inputs[1].sort(1).values))
    target.run(0)
    often = int(chosen[0].flatten().mode().values)
    name = f"layers.0.mlp.experts:expert{often}"
    with ablated(target.model, {name: torch.ones(16, dtype=torch.bool)}, "reroute"):
        target.run(0)
    handle.remove()
    had = (chosen[0] == often).any(1)
    assert had.any() and not (chosen[1] == often).any()
    assert torch.equal((chosen[0] != chosen[1]).any(1), had)


def test_attribution_of_an_expert_is_its_effect_where_that_is_small(tmp_path):
    """A tenth of the way to the mean is a tenth of the first order, so the two must agree there."""
    options = Attribution(["mean"], examples=6, draws=2, verify=0)
    model, callback = swept(tmp_path, [], attribution=options)
    table = table_of(callback.run.calibration.attributed).query("level == 'site'").set_index("site")
    base = reference.evaluation(model, tiny.loader(40, seed=1))[0]
    assert len(table) == 8 and base > 0
    batches = [batch for batch, _ in zip(tiny.loader(40, seed=1), range(3), strict=False)]
    before = reference.evaluation(model, batches)[0]
    for expert in range(4):
        mean = raw(model, tiny.loader(40, seed=1), 1)[expert].mean(0)
        with plain(model, 1, {expert: lambda own, mean=mean: own + 1e-3 * (mean - own)}):
            after = reference.evaluation(model, batches)[0]
        assert table.loc[f"{PATH.format(1)}:expert{expert}"]["first"] == pytest.approx(
            (after - before) / 1e-3, abs=2e-3
        )


def one_idle():
    """A mixture whose first layer sends nothing to the last of five experts, as two scores are always above its."""
    model = tiny.mixtral(num_local_experts=5)
    with torch.no_grad():
        gate = model.model.layers[0].mlp.gate.weight
        gate.copy_(torch.tensor([[1.0], [2.0], [-1.0], [-2.0], [0.0]]) * gate[0])
    return model


def test_an_expert_that_serves_no_token_is_left_out_and_said(tmp_path):
    model = one_idle()
    callback = AblationCallback(["zero", "mean", "peak"], seeds=[1], sites=["experts"], neurons=EachExpert())
    with pytest.warns(
        UserWarning, match="no calibration position is routed to these, which are left out and run intact"
    ):
        tiny.fit(tmp_path, tiny.Own(model), callback=callback, train=tiny.loader(40, seed=1))
    names = {site.name for site in callback.run.calibration.sites}
    assert len(names) == 9 and f"{PATH.format(0)}:expert4" not in names
    assert "which are left out and run intact: model.layers.0.mlp.experts:expert4" in str(callback.results)
    assert set(callback.results.table["part"]) - {""} == names


def test_experts_by_name_in_python():
    model = tiny.mixtral()
    batch = tiny.tokens()
    name = f"{PATH.format(1)}:expert2"
    with torch.no_grad():
        with ablated(model, {name: torch.ones(32, dtype=torch.bool)}):
            found = reference.forward(model, batch)
        with plain(model, 1, {2: torch.zeros_like}):
            expected = reference.forward(model, batch)
        with ablated(model, {name: torch.ones(32, dtype=torch.bool)}, "reroute"):
            rerouted = reference.forward(model, batch)
        with plain(model, 1, without=[2]):
            other = reference.forward(model, batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(rerouted, other, rtol=0, atol=1e-5)
    assert not torch.allclose(found, rerouted, atol=1e-3)
    with pytest.raises(SiteError, match=f"no site '{PATH.format(1)}:expert4'"), ablated(model, {f"{name[:-1]}4": []}):
        pass


def test_what_experts_are_not_for_is_refused_in_a_line(tmp_path):
    model = tiny.mixtral()
    half = torch.arange(32) < 16
    with pytest.raises(SiteError, match="reroute ablates whole experts, got 16 of 32"):
        with ablated(model, {f"{PATH.format(1)}:expert2": half}, "reroute"):
            pass
    with pytest.raises(SiteError, match="reroute ablates whole experts, got 16 of 16 neurons of model.layers.0.self"):
        with ablated(model, {"model.layers.0.self_attn.o_proj": torch.ones(16, dtype=torch.bool)}, "reroute"):
            pass
    all_but_one = {f"{PATH.format(1)}:expert{number}": torch.ones(32, dtype=torch.bool) for number in range(3)}
    with pytest.raises(SiteError, match="a router has 1 experts left and chooses 2"):
        with ablated(model, all_but_one, "reroute"):
            tiny.run(model)
    with pytest.raises(SiteError, match=r"resample-same-position can't replace neurons of an expert"):
        swept(tmp_path, ["resample-same-position"], fractions=[0.5])
    with pytest.raises(ConfigError, match="reroute can't be attributed"):
        swept(tmp_path, [], attribution=Attribution(["reroute"]))
    with pytest.raises(SiteError, match="EachExpert found no experts"):
        tiny.fit(tmp_path, callback=AblationCallback(["zero"], neurons=EachExpert()))
    with pytest.raises(SiteError, match="no experts ran"):
        find_sites(tiny.gpt2(), lambda: None, "experts")


def test_checkpoints_and_other_phases_know_experts(tmp_path):
    options = {"sites": ["mlp"], "seeds": [1], "fractions": [0.5], "dirpath": str(tmp_path / "run")}
    methods = [
        "zero",
        "positional-mean",
        "noise",
        Optimal(steps=3, lr=1e-6),
        ConditionalTuned(1e-2, steps=2, examples=4),
    ]
    callback = AblationCallback(methods, explain=2, attribution=Attribution(["mean"], verify=1), **options)
    tiny.fit(tmp_path, tiny.Own(tiny.mixtral()), callback=callback, train=tiny.loader(40, seed=1))
    assert {site.kind for site in callback.run.calibration.sites} == {"expert"}
    assert len(callback.results.table) == 1 + len(methods)
    assert callback.results.table["cross_entropy"].notna().all()
    loaded = Calibration.load(tmp_path / "run", tiny.mixtral())
    assert loaded.sites == callback.run.calibration.sites
    again = AblationCallback(methods, **(options | {"dirpath": str(tmp_path / "again")}))
    results = tiny.validate(tmp_path, tmp_path / "run" / "ablation.ckpt", again, tiny.Own(tiny.mixtral()))
    assert results.table["cross_entropy"].tolist() == callback.results.table["cross_entropy"].tolist()


@pytest.mark.parametrize("explain", [2, [f"{PATH.format(0)}:expert1", f"{PATH.format(1)}:expert2"]])
def test_an_expert_is_explained_where_it_serves(tmp_path, explain):
    _, callback = swept(tmp_path, ["zero", "reroute"], neurons=EachExpert(), explain=explain, dirpath=tmp_path)
    table = callback.results.table.set_index(["method", "part"])
    evidence = pd.read_parquet(tmp_path / "evidence.parquet")
    assert evidence["unit"].nunique() == 2
    base = callback.results.table["cross_entropy"][0]
    for (unit, method), own in evidence.groupby(["unit", "method"], observed=True):
        assert own["change"].mean() == pytest.approx(table.loc[method, unit]["cross_entropy"] - base, abs=1e-6)
        assert 0 < (own["change"] != 0).mean() <= 1


def test_an_expert_is_ablated_at_the_last_position_alone(tmp_path):
    model, callback = swept(tmp_path, ["zero", "reroute"], neurons=EachExpert(), positions=(1,))
    table = callback.results.table.set_index(["method", "part"])
    name = f"{PATH.format(0)}:expert1"
    whole = {}
    for method in ("zero", "reroute"):
        total, n = 0.0, 0
        for batch in tiny.loader(seed=2):
            with torch.no_grad():
                with ablated(model, {name: torch.ones(32, dtype=torch.bool)}, method, positions=torch.eye(16)[1:2] > 0):
                    logits, targets = reference.scored(model, batch)
            total, n = total + F.cross_entropy(logits.double(), targets, reduction="sum").item(), n + len(targets)
        whole[method] = total / n
        assert table.loc[method, name]["cross_entropy"] == pytest.approx(total / n, abs=1e-6)
    assert whole["zero"] != whole["reroute"]


class Mixture(nn.Module):
    """A mixture of one's own; ``body`` is one expert. With ``slots``, an expert runs for each slot of the choice."""

    def __init__(self, body, slots=False):
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 4), Own(body, slots)

    def forward(self, x):
        shares, chosen = self.gate(x.reshape(-1, 8)).softmax(-1).topk(2, -1)
        return self.experts(x.reshape(-1, 8), chosen, shares).view_as(x)


class Own(nn.Module):
    def __init__(self, body, slots):
        super().__init__()
        self.body, self.slots = body, slots
        self.up, self.mid, self.down = (nn.Parameter(torch.randn(4, *size)) for size in ((6, 8), (6, 6), (8, 6)))

    def forward(self, hidden, chosen, shares):
        out = torch.zeros_like(hidden)
        for columns in [[0], [1]] if self.slots else [[0, 1]]:
            for expert in range(4):
                token, slot = torch.where(chosen[:, columns] == expert)
                out.index_add_(0, token, self.body(self, expert, hidden, token) * shares[:, columns][token, slot, None])
        return out


def two(own, expert, hidden, token):
    return F.linear(F.silu(F.linear(hidden[token], own.up[expert])), own.down[expert])


def three(own, expert, hidden, token):
    inner = F.relu(F.linear(hidden[token], own.up[expert]))
    return F.linear(F.relu(F.linear(inner, own.mid[expert])), own.down[expert])


def transposed(own, expert, hidden, token):
    return F.silu(hidden[token] @ own.up[expert].T) @ own.down[expert].T


def copied(own, expert, hidden, token):
    return two(own, expert, hidden * 1.0, token)


ALL = {"0.experts:expert1": torch.ones(6, dtype=torch.bool)}


def test_a_mixture_of_ones_own_is_ablated_as_its_matrix_of_zeros():
    target, x = nn.Sequential(Mixture(two)), torch.randn(2, 5, 8)
    with torch.no_grad(), ablated(target, ALL):
        found = target(x)
    with torch.no_grad():
        target[0].experts.down[1] = 0
        torch.testing.assert_close(found, target(x))


@pytest.mark.parametrize(
    ("body", "slots", "said"),
    [
        (two, True, "several products could have its neurons"),
        (three, False, "several products could have its neurons"),
        (transposed, False, "no expert of 0.experts was seen"),
        (copied, False, "tokens aren't taken from the hidden states by an index"),
    ],
)
def test_experts_that_cannot_be_read_are_refused_and_not_found(body, slots, said):
    target, x = nn.Sequential(Mixture(body, slots)), torch.randn(2, 5, 8)
    with torch.no_grad(), pytest.raises(SiteError, match=said), ablated(target, ALL):
        target(x)
    assert reference.hooks(target) == 0 and "forward" not in vars(target[0].experts)
    with pytest.raises(SiteError, match="no experts ran"):
        find_sites(target, x, "experts")


def test_where_positions_are_not_known_or_the_router_is_passed_by_is_refused():
    target = nn.Sequential(Mixture(two))
    with torch.no_grad(), pytest.raises(SiteError, match=r"gets \(5, 8\), expected hidden states \(batch, seq"):
        with ablated(target, ALL):
            target(torch.randn(5, 8))
    chosen = torch.zeros(5, 2, dtype=torch.int64)
    with (
        torch.no_grad(),
        pytest.raises(SiteError, match="ran by itself, expected within the module"),
        ablated(target, ALL),
    ):
        target[0].experts(torch.randn(5, 8), chosen, torch.ones(5, 2))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_scripted_modules_are_no_experts():
    target = nn.Sequential(nn.Linear(4, 8), torch.jit.script(nn.ReLU()), nn.Linear(8, 4))
    assert [site.name for site in find_sites(target, torch.rand(1, 3, 4), "*2")] == ["2"]


def test_experts_of_an_offloaded_target_are_ablated():
    model, ids, all_ = tiny.mixtral(), tiny.tokens()["input_ids"], torch.ones(32, dtype=torch.bool)
    for method in ("zero", "reroute"):
        with torch.no_grad(), ablated(model, {f"{PATH.format(1)}:expert2": all_}, method):
            expected = model(input_ids=ids).logits
        offloaded = accelerate.cpu_offload(copy.deepcopy(model), torch.device("cpu"))
        with torch.no_grad(), ablated(offloaded, {f"{PATH.format(1)}:expert2": all_}, method):
            torch.testing.assert_close(offloaded(input_ids=ids).logits, expected, rtol=0, atol=0)
        assert next(offloaded.parameters()).is_meta


class Intact(AblationMethod):
    name = "intact"

    def prepare(self, ablation):
        return lambda activations: activations


def test_a_run_computes_intact_passes_as_those_in_which_experts_are_read(tmp_path):
    """To the bit, also in bfloat16, where implementations differ in the second digit; the configuration stays."""
    model = tiny.mixtral().bfloat16()
    before = copy.deepcopy(model.config.to_dict()), model.config._experts_implementation
    callback = AblationCallback([Intact()], sites=["experts"], neurons=EachExpert())
    tiny.fit(tmp_path, tiny.Own(model), callback=callback, train=tiny.loader(40, seed=1))
    table = callback.results.table
    assert len(table) == 1 + 8 and set(table["kl"]) == {0.0} and table["cross_entropy"].nunique() == 1
    assert (model.config.to_dict(), model.config._experts_implementation) == before and before[1] != "eager"


@pytest.mark.filterwarnings("ignore:.*no calibration position")
def test_a_run_none_of_whose_experts_serves_a_token_ends_in_a_line(tmp_path):
    model = one_idle()
    callback = AblationCallback(["zero"], sites=[f"{PATH.format(0)}:expert4"])
    with pytest.raises(
        StatisticsError, match="no calibration position is routed to any of the experts, model.layers.0"
    ):
        tiny.fit(tmp_path, tiny.Own(model), callback=callback, train=tiny.loader(40, seed=1))
