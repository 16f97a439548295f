"""A smaller model: ablated neurons leave the weights, and what takes their place is folded into those that stay."""

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_ablate.errors import SiteError, few
from lightning_ablate.methods import Affine, Edit
from lightning_ablate.sites import Site, hooked, weights_of
from lightning_ablate.sites.site import features

Options = dict[str, Any]


class BiasError(SiteError):
    """A projection has no bias to take what an edit adds."""


def fold(target: nn.Module, edits: Mapping[Site, Edit]) -> dict[str, tuple[Tensor, Tensor]]:
    """By path, the weights and biases with which projections do by themselves what edits do to their inputs.

    The target is left as it is. SiteError if an edit isn't affine, or a projection can't take other weights.
    """
    made = {}
    for site, edit in edits.items():
        weights = weights_of(target, site)
        if weights is None or not isinstance(edit.replacement, Affine):
            raise SiteError(
                f"what is done at {site.name} can't be folded, expected a constant or conditional method at a plain "
                "linear projection that runs once"
            )
        weight, bias, transposed = weights
        weight, bias = edit.replacement.fold(weight.T if transposed else weight, bias, edit.mask)
        made[site.path] = (weight.T if transposed else weight), bias
    return made


def shrunk(target: nn.Module, edits: Mapping[Site, Edit]) -> tuple["Form", nn.Module]:
    """A model of the target's own class without the ablated neurons, and the form in which it can be saved.

    Which options of its configuration make it narrower, and which rows and columns go with a neuron, is told by the
    shapes of the model built under other options: nothing is known of any architecture. That it computes what the
    ablated target does is tried out on an input.

    Raises:
        BiasError: if something must be added where neither the projection nor an option has a bias.
        SiteError: if the edits can't be folded, or the architecture can't be narrower by just these neurons.
    """
    dtype = next(target.parameters()).dtype
    if dtype != torch.float32:  # folded and compared before it is rounded
        target = copy.deepcopy(target).float()
    folded, form = fold(target, edits), form_of(target)
    kept = {site: ~edit.mask.cpu() for site, edit in edits.items()}
    widths = {site: int(own.sum()) for site, own in kept.items()}
    shapes = {name: tensor.shape for name, tensor in target.state_dict().items()}
    skeleton = form.built("meta")
    for site, own in kept.items():
        _check_whole(site, own)
        candidates = list(form.narrower(site, own))
        if features(skeleton.get_submodule(site.path)) != widths[site]:
            error = SiteError(
                f"{form.name} has no option that makes {site.name} narrower by these neurons alone: expected as many "
                "of every layer, and an MLP whose width, or heads whose number, is set apart from the hidden size"
            )
            skeleton = form.choose(candidates, partial(_fits, site, widths[site], edits, shapes), error)
        elif widths[site] < site.width and not any(more.items() <= form.options.items() for more in candidates):
            raise _uneven(form, [site])
    added = [f"{path}.bias" for path, (_, bias) in folded.items() if bool(bias.any())]
    if lacking := [name for name in added if name not in shapes]:
        error = BiasError(f"{form.name} has no option that gives {few(lacking)} to hold what takes the neurons' place")
        form.choose(form.biased(), lambda model: set(lacking) <= set(model.state_dict()), error)
    model = form.built("cpu")
    narrow = model.state_dict()
    if wrong := [site for site, width in widths.items() if features(model.get_submodule(site.path)) != width]:
        raise _uneven(form, wrong)
    state = dict(target.state_dict())
    for path, (weight, bias) in folded.items():
        state |= {f"{path}.weight": weight, **({f"{path}.bias": bias} if f"{path}.bias" in narrow else {})}
    for name, like in narrow.items():
        value = state[name].detach().cpu() if name in state else torch.zeros_like(like)  # a bias that came along
        for dim, (before, after) in enumerate(zip(value.shape, like.shape, strict=True)):
            if before != after:
                value = value.index_select(dim, _places(name, kept, form.shared, before, after))
        narrow[name] = value
    model.load_state_dict(narrow)
    _check_same(target, edits, model.requires_grad_(False).eval(), form)
    return form, model.to(dtype)


def _uneven(form: "Form", sites: Iterable[Site]) -> SiteError:
    return SiteError(
        f"not as much is kept everywhere, but {form.name} has one width for all layers ({few(s.name for s in sites)} "
        "differ from the first): take the same share of every site; of heads that share a key and value head all "
        "together, or as many of each (--ablation.neurons.unit)"
    )


class Form:
    """How a target of transformers is built again, under other ``options`` of its configuration, and saved."""

    def __init__(self, target: nn.Module) -> None:
        self.target, self.options = cast(Any, target), Options()
        self.name, self.known = type(target).__name__, self.target.config.to_dict()
        self.shared: int | None = self.known.get("num_key_value_heads")  # of the heads, where they are fewer

    def build(self, options: Options) -> nn.Module:
        """A model with weights of no meaning."""
        config = copy.deepcopy(self.target.config)
        for name, value in options.items():
            setattr(config, name, value)
        type(config).from_dict(config.to_dict())  # which must be there to be read, or raises
        return type(self.target)._from_config(config, dtype=self.target.dtype)

    def narrower(self, site: Site, kept: Tensor) -> Iterator[Options]:
        """Options that may leave a site the neurons kept, ``(neurons,)`` bool."""
        left, beside = int(kept.sum()), Options()
        if site.heads is not None:
            size = site.width // site.heads
            left, beside = left // size, {"head_dim": size}
            beside |= {} if self.shared is None else {"num_key_value_heads": _groups(site, kept, self.shared)}
        for name, value in self.known.items():
            if site.heads is None and (value == site.width or (value is None and ("inner" in name or "inter" in name))):
                yield {name: left}
            elif site.heads is not None and value == site.heads and name not in beside:
                yield {name: left, **beside}

    def biased(self) -> Iterator[Options]:
        """Options that may give projections a bias."""
        yield from ({name: True} for name, value in self.known.items() if value is False and "bias" in name)

    def probe(self) -> dict[str, Tensor]:
        """Some input."""
        config, generator = self.target.config, torch.Generator().manual_seed(0)
        if self.target.main_input_name == "pixel_values":
            size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
            pixels = torch.randn(2, getattr(config, "num_channels", 3), size, size, generator=generator)
            return {"pixel_values": pixels.to(self.target.dtype)}
        ids = torch.randint(config.vocab_size, (2, 12), generator=generator)
        return {"input_ids": ids, **({"decoder_input_ids": ids} if config.is_encoder_decoder else {})}

    def save(self, model: nn.Module, folder: Path) -> None:
        """Writes the model, so that its library loads it by the name of the folder."""
        made = cast(Any, model)
        if getattr(self.target, "generation_config", None) is not None:
            made.generation_config = self.target.generation_config
        made.save_pretrained(folder)

    def built(self, device: str, more: Options | None = None) -> nn.Module:
        """A model under the options chosen so far."""
        with torch.device(device):
            return self.build(self.options | (more or {}))

    def choose(self, candidates: Iterable[Options], fits: Callable[[nn.Module], bool], error: SiteError) -> nn.Module:
        """Takes the first options under which a model without weights fits, and returns it; or raises the error."""
        for more in candidates:
            with suppress(Exception):  # what a library raises for options that make no model
                if fits(model := self.built("meta", more)):
                    self.options |= more
                    return model
        raise error


class _Timm(Form):
    shared = None

    def __init__(self, target: nn.Module) -> None:
        self.target, self.options = cast(Any, target), Options()
        self.name, self.known = self.target.pretrained_cfg["architecture"], dict(getattr(target, "_model_args", {}))

    def build(self, options: Options) -> nn.Module:
        import timm

        given = self.known | {"pretrained_cfg": dict(self.target.pretrained_cfg)} | options
        return timm.create_model(self.name, **given).to(next(self.target.parameters()).dtype)

    def narrower(self, site: Site, kept: Tensor) -> Iterator[Options]:
        if site.heads is None:
            hidden = len(self.target.get_submodule(site.path).weight)
            yield {"mlp_ratio": int(kept.sum()) / hidden}
            yield {"mlp_ratio": (int(kept.sum()) + 0.5) / hidden}  # where the product would be rounded down

    def biased(self) -> Iterator[Options]:
        yield from ()

    def probe(self) -> dict[str, Tensor]:
        channels, *size = self.target.pretrained_cfg["input_size"]
        channels, size = self.known.get("in_chans", channels), self.known.get("img_size", size)
        size = [size, size] if isinstance(size, int) else size
        pixels = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))
        return {"x": pixels.to(next(self.target.parameters()).dtype)}

    def save(self, model: nn.Module, folder: Path) -> None:
        from timm.models import save_for_hf

        save_for_hf(model, str(folder), safe_serialization=True)


def form_of(target: nn.Module) -> Form:
    """The form of a target; SiteError if it is neither of transformers nor of timm."""
    if hasattr(target, "_from_config"):
        return Form(target)
    if hasattr(target, "pretrained_cfg"):
        return _Timm(target)
    raise SiteError(f"a {type(target).__name__} can't be built again: expected a model of transformers or timm")


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


def _groups(site: Site, kept: Tensor, shared: int) -> int:
    """How many key and value heads are left, of ``shared`` that serve all heads; SiteError if they can't be told."""
    left = kept.view(shared, -1).sum(1)
    if int(left.min()) == int(left.max()):
        return shared
    if int(left[left > 0].min()) * shared < site.width:
        raise SiteError(
            f"of the heads that share a key and value head some go at {site.name}, and not as many everywhere: take "
            f"them together (--ablation.neurons.unit {site.width // shared})"
        )
    return int((left > 0).sum())


def _fits(site: Site, width: int, edits: Mapping[Site, Edit], shapes: Mapping[str, Any], model: nn.Module) -> bool:
    """Whether a site is so wide, and nothing but layers with edits has another shape than before."""
    layers = tuple(f"{one.layer}." for one in edits)
    others = {name for name, tensor in model.state_dict().items() if tensor.shape != shapes.get(name)}
    return features(model.get_submodule(site.path)) == width and all(name.startswith(layers) for name in others)


def _places(name: str, kept: Mapping[Site, Tensor], shared: int | None, before: int, after: int) -> Tensor:
    """Which of ``before`` rows or columns of a tensor stay; SiteError if that can't be told.

    They are those of the site that is closest by name: its neurons, gate and up projections one behind the other; or
    of a site with heads also these, the ``shared`` key and value heads that they use, or queries, keys and values.
    """
    site = max(kept, key=lambda one: len(os.path.commonprefix([one.path, name])))  # noqa: RUF071
    own, width = kept[site], site.width
    if site.heads is None:
        layouts = {width: own, 2 * width: own.repeat(2)}
    else:
        heads, groups = (own.view(count, -1).any(1) for count in (site.heads, shared or site.heads))
        rows = groups.repeat_interleave(width // site.heads)
        layouts = {len(one): one for one in (groups, heads, own, rows, torch.cat([own, rows, rows]))}
    if before not in layouts or int(layouts[before].sum()) != after:
        raise SiteError(f"{name} would have {after} of its {before} rows or columns, which is not how {site.name} lies")
    return layouts[before].nonzero().squeeze(1)


def _said(output: Any) -> Tensor:
    """The logits, or the last hidden states of a model without a head."""
    return output if isinstance(output, Tensor) else output["logits"] if "logits" in output else output[0]


def _check_same(target: nn.Module, edits: Mapping[Site, Edit], model: nn.Module, form: Form) -> None:
    """Runs both on an input; SiteError unless they say the same."""
    device = next(target.parameters()).device
    try:
        probe = form.probe()
        with torch.no_grad(), hooked(target, edits):
            expected = _said(target(**{name: value.to(device) for name, value in probe.items()})).cpu()
    except Exception as error:  # what a library raises for inputs of another kind
        raise SiteError(f"{form.name} can't be tried out on token ids or pixels alone: {error!s:.100}") from error
    off, real = float("inf"), expected.abs() < torch.finfo(expected.dtype).max / 2
    most = float(expected[real].abs().max())
    with torch.no_grad(), suppress(Exception):  # what a model raises whose parts don't fit one another
        off = float((expected - _said(model(**probe)))[real].abs().max())
    if not off <= 1e-4 * max(1.0, most):
        fresh, why = dict(model.named_buffers()), "its weights lie in another way, or its heads differ by layer"
        if other := [
            n for n, b in target.named_buffers() if n in fresh and b.shape == fresh[n].shape and _apart(b, fresh[n])
        ]:
            why = f"{few(other)} aren't as the class makes them, as a .to(bfloat16) rounds them: load it in its dtype"
        raise SiteError(
            f"the smaller {form.name} doesn't compute what the ablated one does (logits are off by {off:.2g} of "
            f"{most:.2g}): {why}"
        )


def _apart(one: Tensor, other: Tensor) -> bool:
    return not torch.equal(one.cpu().float(), other.float())
