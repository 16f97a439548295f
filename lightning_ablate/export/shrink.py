"""The smaller model: ablated neurons leave the weights, and their replacement is folded into what stays."""

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ablate.errors import SiteError, few
from lightning_ablate.export.form import Form, form_of
from lightning_ablate.methods import Affine, Edit
from lightning_ablate.sites import Site, hooked, weights_of
from lightning_ablate.sites.site import features

Folded = dict[str, tuple[Tensor, Tensor]]


class BiasError(SiteError):
    """A replacement adds a constant, but the projection has no bias to hold it."""


def fold(target: nn.Module, edits: Mapping[Site, Edit]) -> Folded:
    """New weights and biases of the projections, by path: they do to intact inputs what the edits lead to.

    The target itself is never written. SiteError if a replacement isn't affine, or a projection is no plain one.
    """
    folded: Folded = {}
    for site, edit in edits.items():
        weights = weights_of(target, site)
        if weights is None or not isinstance(edit.replacement, Affine):
            raise SiteError(
                f"what is done at {site.name} can't be folded, expected a constant or conditional method at the input "
                "of a plain linear projection that runs once"
            )
        weight, bias, transposed = weights
        weight, bias = edit.replacement.fold(weight.T if transposed else weight, bias, edit.mask)
        folded[site.path] = (weight.T if transposed else weight), bias
    return folded


def shrunk(target: nn.Module, edits: Mapping[Site, Edit]) -> tuple[Form, nn.Module]:
    """A model of the target's own class without the ablated neurons, and the form that saves it.

    Nothing is known of any architecture. The shapes of the model built under other options show which options make it
    narrower, and which rows and columns go with a neuron. At last both models run on a random input and are compared.

    Raises:
        BiasError: if a constant must be added where neither the projection nor an option has a bias.
        SiteError: if the edits can't be folded, or the architecture can't be narrower by just these neurons.
    """
    dtype = next(target.parameters()).dtype
    if dtype != torch.float32:  # fold and compare exactly, round once
        target = copy.deepcopy(target).float()
    folded, form = fold(target, edits), form_of(target)
    kept = {site: ~edit.mask.cpu() for site, edit in edits.items()}
    _narrow(form, kept)
    _add_biases(form, folded)
    model = form.built("cpu")
    if uneven := [site for site, own in kept.items() if _width(model, site) != int(own.sum())]:
        raise _uneven(form, uneven)
    model.load_state_dict(_kept_weights(form, model, kept, folded))
    _check_same(target, edits, model.requires_grad_(False).eval(), form)
    return form, model.to(dtype)


def _narrow(form: Form, kept: Mapping[Site, Tensor]) -> None:
    """Changes the options so that every site is as wide as its kept neurons; SiteError if none do that."""
    skeleton = form.built("meta")
    layers = [site.layer for site in kept]
    for site, own in kept.items():
        _check_whole(site, own)
        candidates, width = list(form.narrower(site, own)), int(own.sum())
        if _width(skeleton, site) != width:
            found = form.adopt(candidates, partial(_fits, form, site, width, layers))
            if found is None:
                raise SiteError(
                    f"{form.name} has no option that makes {site.name} narrower by these neurons alone: expected as "
                    "many of every layer, and an MLP whose width, or heads whose number, is set apart from the hidden "
                    "size"
                )
            skeleton = found
        elif width < site.width and not any(more.items() <= form.options.items() for more in candidates):
            raise _uneven(form, [site])  # an earlier site fixed other options


def _fits(form: Form, site: Site, width: int, layers: Sequence[str], model: nn.Module) -> bool:
    """Whether a site has the width, and no tensor outside these layers has another shape than in the target."""
    changed = [name for name, tensor in model.state_dict().items() if tensor.shape != form.shapes.get(name)]
    return _width(model, site) == width and all(name.startswith(tuple(f"{n}." for n in layers)) for name in changed)


def _width(model: nn.Module, site: Site) -> int | None:
    return features(model.get_submodule(site.path))


def _add_biases(form: Form, folded: Folded) -> None:
    """Changes the options so that there is a bias wherever a constant is added; BiasError if none do that."""
    added = [f"{path}.bias" for path, (_, bias) in folded.items() if bool(bias.any())]
    lacking = [name for name in added if name not in form.shapes]
    if lacking and form.adopt(form.biased(), lambda model: set(lacking) <= set(model.state_dict())) is None:
        raise BiasError(f"{form.name} has no option that gives {few(lacking)} to hold what takes the neurons' place")


def _kept_weights(form: Form, model: nn.Module, kept: Mapping[Site, Tensor], folded: Folded) -> dict[str, Tensor]:
    """The state of the smaller ``model``: the kept rows and columns of the target's and the folded weights."""
    narrow, state = model.state_dict(), dict(form.target.state_dict())
    for path, (weight, bias) in folded.items():
        state |= {f"{path}.weight": weight, **({f"{path}.bias": bias} if f"{path}.bias" in narrow else {})}
    for name, like in narrow.items():
        value = state[name].detach().cpu() if name in state else torch.zeros_like(like)  # an option added this bias
        for dim, (before, after) in enumerate(zip(value.shape, like.shape, strict=True)):
            if before != after:
                value = value.index_select(dim, _kept_rows(name, kept, form.key_heads, before, after))
        narrow[name] = value
    return narrow


def _kept_rows(name: str, kept: Mapping[Site, Tensor], key_heads: int | None, before: int, after: int) -> Tensor:
    """Which ``after`` of the ``before`` rows or columns of a tensor stay, int64; SiteError if that can't be told.

    The site whose path is most like the tensor's name decides. Rows of an MLP are its neurons, or a gate and an up
    projection one behind the other. Rows of attention are neurons, heads, or queries, keys and values.
    """
    site = max(kept, key=lambda one: len(os.path.commonprefix([one.path, name])))  # noqa: RUF071
    own, width = kept[site], site.width
    if site.heads is None:
        layouts = {width: own, 2 * width: own.repeat(2)}
    else:
        heads, groups = (own.view(count, -1).any(1) for count in (site.heads, key_heads or site.heads))
        keys = groups.repeat_interleave(width // site.heads)
        layouts = {len(one): one for one in (groups, heads, own, keys, torch.cat([own, keys, keys]))}
    if before not in layouts or int(layouts[before].sum()) != after:
        raise SiteError(f"{name} would have {after} of its {before} rows or columns, which is not how {site.name} lies")
    return layouts[before].nonzero().squeeze(1)


def _check_whole(site: Site, kept: Tensor) -> None:
    """Refuses heads that are ablated in part, and sites that keep nothing."""
    if not bool(kept.any()):
        raise SiteError(f"nothing is kept at {site.name}, and no layer can be without it; take a smaller fraction")
    if site.heads is not None and bool(kept.view(site.heads, -1).diff().any()):
        raise SiteError(
            f"single attention neurons go at {site.name}, but in a smaller model all heads are equally wide: take "
            "heads (--ablation.neurons.unit head), all that share a key and value head (unit: their neurons), or "
            "MLP neurons (--ablation.sites mlp)"
        )


def _uneven(form: Form, sites: Iterable[Site]) -> SiteError:
    return SiteError(
        f"not as much is kept everywhere, but {form.name} has one width for all layers ({few(s.name for s in sites)} "
        "differ from the first): take the same share of every site; of heads that share a key and value head all "
        "together, or as many of each (--ablation.neurons.unit)"
    )


def _check_same(target: nn.Module, edits: Mapping[Site, Edit], model: nn.Module, form: Form) -> None:
    """Runs both models on a random input; SiteError if their outputs differ."""
    device = next(target.parameters()).device
    try:
        probe = form.probe()
        with torch.no_grad(), hooked(target, edits):
            expected = _logits(target(**{name: value.to(device) for name, value in probe.items()})).cpu()
    except Exception as error:  # a library raises anything for inputs of another kind
        raise SiteError(f"{form.name} can't be tried out on token ids or pixels alone: {error!s:.100}") from error
    off, real = float("inf"), expected.abs() < torch.finfo(expected.dtype).max / 2  # what isn't masked
    most = float(expected[real].abs().max())
    with torch.no_grad(), suppress(Exception):  # a model may raise if its parts don't fit one another
        off = float((expected - _logits(model(**probe)))[real].abs().max())
    if not off <= 1e-4 * max(1.0, most):
        fresh, why = dict(model.named_buffers()), "its weights lie in another way, or its heads differ by layer"
        if rounded := [name for name, buffer in target.named_buffers() if _differs(buffer, fresh.get(name))]:
            why = f"{few(rounded)} aren't as the class makes them, as a .to(bfloat16) rounds them: load it in its dtype"
        raise SiteError(
            f"the smaller {form.name} doesn't compute what the ablated one does (logits are off by {off:.2g} of "
            f"{most:.2g}): {why}"
        )


def _logits(output: Any) -> Tensor:
    """The logits, or the last hidden states of a model without a head."""
    return output if isinstance(output, Tensor) else output["logits"] if "logits" in output else output[0]


def _differs(one: Tensor, other: Tensor | None) -> bool:
    """Whether two buffers of one shape hold different values."""
    same_shape = other is not None and one.shape == other.shape
    return other is not None and same_shape and not torch.equal(one.cpu().float(), other.float())
