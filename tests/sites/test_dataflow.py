"""What attention made is followed to the projection that reads it, by targets made by hand."""

import pytest
import torch
from torch import nn

from lightning_ablate.errors import SiteError
from lightning_ablate.sites import Site, heads_of
from tests.sites.parts import Parts, attention, found, linear, three

ORDER = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])


@pytest.mark.parametrize(
    "between",
    [
        lambda parts, x: attention(parts, x) * torch.sigmoid(parts["gate"](x)),
        lambda parts, x: parts["norm"](attention(parts, x)),
        lambda parts, x: torch.cat([attention(parts, x[:, :2]), attention(parts, x[:, 2:])], 1),
        lambda parts, x: attention(parts, x[:, torch.tensor([3, 1])]).roll(1, 1).contiguous().to(torch.float64).float(),
    ],
    ids=["gate", "norm", "windows", "moved"],
)
def test_what_stands_between_attention_and_its_projection_doesnt_hide_it(between):
    parts = {**three(), **linear(gate=8, o=4), "norm": nn.LayerNorm(8)}
    assert found(Parts(lambda parts, x: parts["o"](between(parts, x)), **parts)) == [Site("parts.o", 8, 2)]


@pytest.mark.parametrize(
    "product",
    [
        lambda weights, value: weights @ value,
        lambda weights, value: torch.einsum("bhqk,bhkd->bhqd", weights, value),
        lambda weights, value: torch.einsum("bhqk,bhkd->bqhd", weights, value).transpose(1, 2),
        lambda weights, value: (value.transpose(2, 3) @ weights.transpose(2, 3)).transpose(2, 3),
        lambda weights, value: torch.bmm(weights.flatten(0, 1), value.flatten(0, 1)).view(2, 4, 5, 2),
        lambda weights, value: nn.functional.scaled_dot_product_attention(value, value, value),
    ],
    ids=["matmul", "einsum", "einsum heads last", "values first", "flat heads", "fused"],
)
def test_heads_are_counted_however_weights_meet_values(product):
    def run(parts, x):
        heads = x.unflatten(-1, (4, 2)).transpose(1, 2)
        mixed = product((heads @ heads.transpose(2, 3)).softmax(-1), heads)
        return parts["o"](mixed.transpose(1, 2).flatten(2))

    assert found(Parts(run, **linear(o=8))) == [Site("parts.o", 8, 4)]


@pytest.mark.parametrize(
    "order",
    [
        lambda mixed: mixed.permute(0, 2, 3, 1).flatten(2),  # neuron by neuron, head after head
        lambda mixed: mixed.flip(1).transpose(1, 2).flatten(2),  # the last head first
        lambda mixed: mixed.transpose(1, 2).flatten(2).gather(2, ORDER.expand(2, 5, 8)),  # by an index
    ],
    ids=["interleaved", "permuted", "gathered"],
)
def test_heads_that_do_not_lie_side_by_side_in_order_are_not_counted(order):
    def run(parts, x):
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        return parts["o"](order(nn.functional.scaled_dot_product_attention(heads, heads, heads)))

    (site,) = found(Parts(run, **linear(o=8)))
    assert site == Site("parts.o", 8, None)
    with pytest.raises(SiteError, match="parts.o .* has no heads that lie side by side"):
        heads_of(site)


def test_a_wrapped_projection_is_one_site():
    class Adapted(nn.Module):
        in_features = out_features = 8

        def __init__(self):
            super().__init__()
            self.base, self.down, self.up = nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(2, 8)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    target = Parts(lambda parts, x: parts["o"](attention(parts, x)), **three(), o=Adapted())
    assert found(target) == [Site("parts.o", 8, 2)]


def weighing_experts(parts, x):
    """A softmax that weighs what two experts made is no attention."""
    x = x + parts["o"](attention(parts, x))
    made = torch.stack([parts["first"](x), parts["second"](x)], -2)
    return parts["head"](x + torch.einsum("bse,bsed->bsd", parts["router"](x).softmax(-1), made))


def fused(parts, x):
    """The function behind MultiheadAttention, called with bare weights."""
    own, x = parts["o"], x.transpose(0, 1)
    weights = own.in_proj_weight, own.in_proj_bias, None, None, False, 0.0, own.out_proj.weight, own.out_proj.bias
    return nn.functional.multi_head_attention_forward(x, x, x, 8, 2, *weights)[0]


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (
            lambda: Parts(lambda p, x: attention(p, x) @ p["o"].weight, **three(), **linear(o=8)),
            r"the target itself \(1",
        ),
        (lambda: Parts(lambda p, x: p["o"](x + attention(p, x)), **three(), **linear(o=8)), "the target itself"),
        (lambda: Parts(fused, o=nn.MultiheadAttention(8, 2)), "the target itself"),
        (lambda: Parts(weighing_experts, **three(), **linear(o=8, router=2, first=8, second=8, head=3)), "the target"),
    ],
    ids=["bare", "sum", "fused", "experts"],
)
def test_attention_without_a_projection_of_its_own_is_refused(make, where):
    with pytest.raises(SiteError, match=f"no projection module reads what attention makes in {where}"):
        found(make())


def test_a_target_without_attention_is_refused():
    mixer = Parts(lambda parts, x: parts["o"](x.cumsum(1)), **linear(o=3))
    with pytest.raises(SiteError, match=r"found no attention.*pattern.*the projections that ran are parts.o \(8\)"):
        found(mixer)


def test_an_output_that_two_projections_read_is_refused():
    def run(parts, x):
        made = attention(parts, x)
        return parts["base"](made) + parts["up"](parts["down"](made))

    adapted = {**linear(base=8, down=2), "up": nn.Linear(2, 8)}
    with pytest.raises(SiteError, match="read by several projections, among parts.base, parts.down"):
        found(Parts(run, **three(), **adapted))
