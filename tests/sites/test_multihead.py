"""torch.nn.MultiheadAttention, and what is built of it, against equal models written by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_ablate import ablated
from lightning_ablate.errors import SiteError
from lightning_ablate.sites import check_mixing, find_sites, hooked
from tests import reference

MASK = torch.arange(16) % 3 == 0


class Heads(nn.Module):
    """The same as a MultiheadAttention, batch first, with a projection that runs by itself."""

    def __init__(self, like):
        super().__init__()
        self.like, self.out_proj = [like], like.out_proj

    def forward(self, query, key, value, mask=None):
        (like,) = self.like
        if like.in_proj_weight is None:
            weights = like.q_proj_weight, like.k_proj_weight, like.v_proj_weight
        else:
            weights = like.in_proj_weight.chunk(3)
        each = zip((query, key, value), weights, like.in_proj_bias.chunk(3), strict=True)
        q, k, v = (F.linear(x, w, b).unflatten(-1, (like.num_heads, -1)).transpose(1, 2) for x, w, b in each)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        scores = scores if mask is None else scores.masked_fill(mask, -torch.inf)
        return self.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def by_hand(layer, x, mask):
    """An encoder layer, batch first."""
    attend = Heads(layer.self_attn)

    def forward(x):
        def feed(y):
            return layer.linear2(layer.activation(layer.linear1(y)))

        if layer.norm_first:
            x = x + attend(*[layer.norm1(x)] * 3, mask)
            return x + feed(layer.norm2(x))
        x = layer.norm1(x + attend(x, x, x, mask))
        return layer.norm2(x + feed(x))

    with torch.no_grad(), reference.plain_hooks(layer, {"self_attn.out_proj": reference.put(MASK, torch.zeros(16))}):
        return forward(x)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor is True")
@torch.no_grad()
def test_an_encoder_is_ablated_as_one_written_by_hand(batch_first, norm_first, masked):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=batch_first, norm_first=norm_first)
    target = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    for parameter in target.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[0, 5:] = masked
    x, options = torch.randn(3, 7, 16), {"src_key_padding_mask": padding} if masked else {}
    given = x if batch_first else x.transpose(0, 1)
    clean = target(given, **options)
    sites = find_sites(target, lambda: target(given, **options), ("attention", "mlp"))
    assert [(site.width, site.heads, site.layer) for site in sites[:2]] == [(16, 4, "layers.0"), (32, None, "layers.0")]
    seen = {}
    with hooked(target, {sites[0]: lambda activations: seen.update(at=activations.shape)}, once=True):
        target(given, **options)
    assert seen["at"] == (3, 7, 16)  # the batch first, whatever the layer takes
    masks = {site.name: MASK for site in sites if site.kind == "self-attention"}
    with ablated(target, masks):
        found = target(given, **options)
    expected = x
    for layer in target.layers:
        expected = by_hand(layer, expected, padding[:, None, None, :])
    found, real = found if batch_first else found.transpose(0, 1), ~padding
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-5)
    with ablated(target, {}):
        nothing = target(given, **options)
    feeds = {site.name: torch.zeros(32, dtype=torch.bool) for site in sites if site.kind == "mlp"}
    with ablated(target, feeds):  # which with a mask would get nested tensors from the fast path
        assert torch.equal(target(given, **options), nothing)
    with ablated(target, masks), ablated(target, feeds):
        again = target(given, **options)
    torch.testing.assert_close(again if batch_first else again.transpose(0, 1), found, rtol=0, atol=0)
    assert torch.equal(target(given, **options), clean) and torch.backends.mha.get_fastpath_enabled()
    assert not any("forward" in vars(module) for module in target.modules()) and reference.hooks(target) == 0


@torch.no_grad()
def test_cross_attention_of_ones_own_with_other_widths_and_weights():
    torch.manual_seed(0)
    own = nn.MultiheadAttention(16, 4, kdim=6, vdim=5).eval()
    target, x, other, values = nn.ModuleDict({"cross": own}), torch.randn(3, 7, 16), *torch.randn(2, 4, 3, 6).split(1)
    other, values = other[0], values[0, ..., :5]
    target.forward = lambda: target["cross"](x.transpose(0, 1), other, values, need_weights=True)
    (site,) = find_sites(target, target.forward)
    assert (site.name, site.width, site.heads, site.kind) == ("cross.out_proj", 16, 4, "cross-attention")
    weights = target.forward()[1]
    with ablated(target, {site.name: MASK}):
        found = target.forward()
    with reference.plain_hooks(own, {"out_proj": reference.put(MASK, torch.zeros(16))}):
        expected = Heads(own)(x, other.transpose(0, 1), values.transpose(0, 1))
    torch.testing.assert_close(found[0].transpose(0, 1), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1], weights)


@torch.no_grad()
def test_one_with_a_forward_of_its_own_is_refused_and_left_as_it_is():
    class Scaled(nn.MultiheadAttention):
        def forward(self, *inputs):
            return 3 * super().forward(*inputs)[0]

    own = nn.MultiheadAttention(16, 4)
    own.forward = lambda *inputs: nn.MultiheadAttention.forward(own, *inputs)[0]
    for attention in (Scaled(16, 4), own):
        target, x, before = nn.Sequential(attention), torch.randn(5, 2, 16), vars(attention).get("forward")
        target.forward = lambda target=target, x=x: target[0](x, x, x)
        with pytest.raises(SiteError, match="no projection module reads what attention makes"):
            find_sites(target, target.forward)
        assert vars(attention).get("forward") is before


def small():
    from torchvision.models import VisionTransformer

    options = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 16, "mlp_dim": 32}
    return VisionTransformer(**options)


@pytest.mark.parametrize(("make", "size", "layers", "heads"), [(small, 32, 2, 4), ("vit_b_16", 224, 12, 12)])
@torch.no_grad()
def test_torchvisions_vision_transformer_mixes_by_its_sites_alone_and_a_head_is_its_slice(make, size, layers, heads):
    import torchvision.models

    torch.manual_seed(0)
    made = getattr(torchvision.models, make)() if isinstance(make, str) else make()
    target, images = made.eval(), torch.randn(2, 3, size, size)
    images[1] = images[0]
    images[1, :, 9, 9] += 9.0
    sites = find_sites(target, lambda: target(images), ("attention", "mlp"))
    assert [site.kind for site in sites] == ["self-attention", "mlp"] * layers
    assert {site.heads for site in sites} == {heads, None}
    attention, states = sites[::2], {}
    target.encoder.ln.register_forward_hook(lambda module, inputs, output: states.update(last=output))

    def hidden(number):
        target(images[number, None])
        return [states["last"]]

    check_mixing(target, attention, hidden)
    with pytest.raises(SiteError, match="also mixes positions by other ways"):
        check_mixing(target, attention[1:], hidden)

    def read():
        seen = []
        with hooked(target, {attention[0]: seen.append}):
            target(images)
        return seen[0]

    before = read()
    width, head = sites[0].width, sites[0].width // heads
    values = target.encoder.layers[0].self_attention.in_proj_weight[2 * width :]
    values[head : 2 * head] += torch.randn(head, width)  # those of head 1
    changed = (read() - before).abs().amax((0, 1)) > 0
    assert changed.nonzero().flatten().tolist() == list(range(head, 2 * head))


@torch.no_grad()
def test_mlps_are_found_where_attention_cannot_be_followed():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.up, self.down = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x):
            x = x + (x @ x.mT).softmax(-1) @ x @ self.mix
            return x + self.down(self.up(x).relu())

    target = nn.Sequential(Layer(), Layer())
    sites = find_sites(target, lambda: target(torch.randn(2, 5, 8)), ["mlp"])
    assert [(site.name, site.layer) for site in sites] == [("0.down", "0"), ("1.down", "1")]
    with pytest.raises(SiteError, match="no projection module reads what attention makes"):
        find_sites(target, lambda: target(torch.randn(2, 5, 8)))
