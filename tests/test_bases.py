"""Directions and features in place of neurons: against neurons, plain hooks and their own arithmetic by numpy."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lightning_ablate import AblationCallback, Attribution, Calibration, ConditionalMean, Directions, Features, ablated
from lightning_ablate.errors import ConfigError, SiteError, StatisticsError
from lightning_ablate.sites import hooked
from tests import reference, tiny

SITE = "transformer.h.1:output"
METHODS = ["zero", "mean", "peak", "resample-same-position", ConditionalMean(0.01)]
GENERATOR = torch.Generator().manual_seed(0)


def vectors(folder, tensor, name="directions"):
    save_file({name: tensor}, folder / "directions.safetensors")
    return str(folder / "directions.safetensors")


def autoencoder(folder, architecture, width=24, features=16, **more):
    draw = torch.Generator().manual_seed(1)
    about = {"architecture": architecture, "d_in": features, "d_sae": width, "dtype": "float32", "k": 5}
    about |= {"apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none", **more}
    about = {name: value for name, value in about.items() if value is not None}
    found = {"W_enc": torch.randn(features, width, generator=draw), "b_enc": torch.randn(width, generator=draw)}
    found |= {"W_dec": torch.randn(width, features, generator=draw), "b_dec": torch.randn(features, generator=draw)}
    if architecture == "jumprelu":
        found["threshold"] = torch.rand(width, generator=draw)
    folder.mkdir(exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(about))
    save_file(found, folder / "sae_weights.safetensors")
    return about, {name: tensor.double().numpy() for name, tensor in found.items()}


def encoded(about, w, x):
    """What an autoencoder makes of activations, by numpy."""
    norm = np.linalg.norm(w["W_dec"], axis=1) if about.get("rescale_acts_by_decoder_norm") else 1.0
    pre = ((x - about["apply_b_dec_to_input"] * w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norm
    if about["architecture"] == "topk":
        kept = pre >= np.sort(pre, -1)[..., -5, None]
        return np.maximum(pre, 0) * kept, w["W_dec"] / (norm[:, None] if isinstance(norm, np.ndarray) else 1)
    return np.maximum(pre, 0) * (pre > w.get("threshold", -np.inf)), w["W_dec"]


def run(folder, name, **options):
    callback = AblationCallback(METHODS, fractions=[0.5], seeds=[1, 2], **options)
    module, _ = tiny.fit(folder / name, tiny.Own(tiny.gpt2()), callback=callback, train=tiny.loader(30, seed=1))
    return module, callback


@pytest.mark.parametrize("orthonormal", [True, False])
def test_in_the_basis_of_neurons_everything_equals_the_neurons(tmp_path, orthonormal):
    basis = Directions(vectors(tmp_path, torch.eye(16)), orthonormal=orthonormal)
    options = {"attribution": Attribution(["zero", "mean"], verify=3), "explain": [f"{SITE} neuron 3"]}
    _, neurons = run(tmp_path, "neurons", sites=["residual", "attention"], **options)
    _, directions = run(tmp_path, "directions", sites=["residual", "attention"], bases={"residual": basis}, **options)
    scores = ["cross_entropy", "top1", "ablated"]
    one, other = (callback.results.table[scores].to_numpy() for callback in (neurons, directions))
    np.testing.assert_allclose(other, one, atol=1e-6)
    one, other = neurons.attributions, directions.attributions
    assert one[["method", "site", "level", "unit"]].equals(other[["method", "site", "level", "unit"]].loc[one.index])
    for column in ("first", "second", "estimate"):
        np.testing.assert_allclose(other[column], one[column], atol=1e-6)
    one, other = (callback.results.gathered.evidence for callback in (neurons, directions))
    np.testing.assert_allclose(other["change"], one["change"], atol=1e-6)
    np.testing.assert_allclose(other["activation"], one["activation"], atol=1e-6)


def test_a_direction_is_replaced_and_what_is_at_right_angles_stays(tmp_path):
    given = torch.randn(3, 16, generator=GENERATOR)
    x = torch.randn(2, 5, 16, generator=GENERATOR)
    for orthonormal in (True, False):
        basis = Directions(vectors(tmp_path, given), orthonormal=orthonormal)
        units = basis.read(x)
        after = units.clone()
        after[..., 1] = 7.0
        written = basis.write(x, units, after)
        torch.testing.assert_close(basis.read(written), after, atol=1e-5, rtol=1e-5)  # the others stay
        span = np.linalg.qr(given.double().numpy().T)[0]
        outside = np.eye(16) - span @ span.T
        np.testing.assert_allclose(written.numpy() @ outside, x.numpy() @ outside, atol=1e-5)
    q = np.linalg.qr(given.double().numpy().T)[0].T
    signs = np.sign(np.sum(q * given.double().numpy(), 1))[:, None]
    np.testing.assert_allclose(
        Directions(vectors(tmp_path, given)).read(x), x.double().numpy() @ (q * signs).T, atol=1e-5
    )


@pytest.mark.parametrize(
    ("architecture", "more"),
    [
        ("standard", {}),
        ("standard", {"apply_b_dec_to_input": False}),
        ("topk", {}),
        ("topk", {"rescale_acts_by_decoder_norm": True}),
        ("topk", {"k": None, "activation_fn_kwargs": {"k": 5}}),
        ("jumprelu", {}),
    ],
)
def test_features_are_swept_as_plain_hooks_would_with_what_is_not_reconstructed_kept(tmp_path, architecture, more):
    about, w = autoencoder(tmp_path / "sae", architecture, **more)
    module, callback = run(tmp_path, "run", sites=[SITE], bases={SITE: Features(str(tmp_path / "sae"))})
    (site,) = callback.run.calibration.sites
    assert (site.width, site.heads, site.neuron(4)) == (24, None, "feature 4")
    assert f"NOTE: what is called a neuron is a feature at {SITE}\n" in str(callback.results)
    seen = []
    for batch in tiny.loader(30, seed=1):
        with torch.no_grad(), reference.plain_hooks(module.target, {SITE: lambda x: seen.append(x) and None}):
            reference.forward(module.target, batch)
        seen[-1] = seen[-1][batch["attention_mask"].bool()]
    means = encoded(about, w, torch.cat(seen).double().numpy())[0].mean(0)
    table = callback.results.table.set_index(["method", "seed"])
    for condition in callback.sweep.conditions([site])[1:]:
        if condition.method not in ("zero", "mean"):
            continue
        mask = callback.sweep.masks(condition, callback.run.calibration)[site].numpy()

        def own(x, mask=mask, values=means * (condition.method == "mean")):
            before, decoder = encoded(about, w, x.double().numpy())
            return x + torch.from_numpy((np.where(mask, values, before) - before) @ decoder).float()

        loss, top1, _ = reference.evaluation(module.target, tiny.loader(seed=2), {SITE: own})
        found = table.loc[(condition.method, condition.seed)]
        assert found["cross_entropy"] == pytest.approx(loss, abs=1e-5) and found["top1"] == pytest.approx(top1)


def test_a_checkpoint_needs_its_own_basis(tmp_path):
    one, other = torch.eye(16)[:3], torch.eye(16)[1:4]
    bases = {SITE: Directions(vectors(tmp_path, one))}
    _, callback = run(tmp_path, "run", sites=[SITE], bases=bases, dirpath=tmp_path / "kept")
    given = {"methods": METHODS, "fractions": [0.5], "seeds": [1, 2], "sites": [SITE]}
    again = tiny.validate(tmp_path, tmp_path / "kept" / "ablation.ckpt", AblationCallback(**given, bases=bases))
    assert again.table["cross_entropy"].tolist() == callback.results.table["cross_entropy"].tolist()
    for wrong in ({SITE: Directions(vectors(tmp_path, other))}, {}):
        with pytest.raises(StatisticsError, match="another basis, expected"):
            tiny.validate(tmp_path, tmp_path / "kept" / "ablation.ckpt", AblationCallback(**given, bases=wrong))
    model, ids = tiny.gpt2(), tiny.tokens()["input_ids"]
    calibration = Calibration.load(tmp_path / "kept", model, bases)
    with torch.no_grad(), ablated(model, neurons={SITE: [0]}, method="mean", calibration=calibration):
        found = model(ids).logits
    mean = callback.run.calibration
    (site,) = mean.sites
    value = next(iter(mean.statistics[site].values())).mean[0].item()

    def own(x):
        x = x.clone()
        x[..., 0] = value
        return x

    with torch.no_grad(), reference.plain_hooks(model, {SITE: own}):
        torch.testing.assert_close(found, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_some_sites_of_a_run_with_two_bases_are_swept_again_and_runs_say_the_same(tmp_path):
    bases = {word: Directions(vectors(tmp_path, torch.eye(size)[:3])) for word, size in (("residual", 16), ("mlp", 64))}
    for name in ("one", "two"):
        run(tmp_path, name, sites=["residual", "mlp"], bases=bases, dirpath=tmp_path / name)
    one, two = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two"))
    assert one["sites"] == two["sites"] and " at 0x" not in json.dumps(one["sites"])
    callback = AblationCallback(["zero"], sites=["residual"], bases={"residual": bases["residual"]})
    results = tiny.validate(tmp_path, tmp_path / "one" / "ablation.ckpt", callback)
    assert len(callback.run.calibration.sites) == 2 and results.table["ablated"].max() > 0.8


def test_bases_are_exact_under_autocast(tmp_path):
    basis, model = Directions(vectors(tmp_path, torch.randn(2, 16, generator=GENERATOR))), tiny.gpt2()
    calibration = Calibration(["residual"], tiny.sites(model, "residual"), bases={"residual": basis})
    seen, plain = [], tiny.sites(model, "residual")[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with hooked(model, {calibration.sites[0]: lambda own: seen.append(own) or torch.full_like(own, 1.5)}):
            with hooked(model, {plain: seen.append}):
                tiny.run(model)
    assert seen[0].dtype == torch.float32
    torch.testing.assert_close(basis.read(seen[1].float()), torch.full_like(seen[0], 1.5), atol=1e-5, rtol=0)


def test_what_is_no_basis_of_a_site_is_refused_in_a_line(tmp_path):
    file = vectors(tmp_path, torch.eye(8))
    for bases, why in [
        ({SITE: Directions(file)}, "of 8 features, expected the whole of"),
        ({"mlp": Directions(file)}, "no site is 'mlp'"),
    ]:
        with pytest.raises(SiteError, match=why):
            run(tmp_path, "run", sites=[SITE], bases=bases)
    with pytest.raises(ConfigError, match="none of which is made up of others"):
        Directions(vectors(tmp_path, torch.ones(2, 8)))
    with pytest.raises(ConfigError, match="holds directions, expected other"):
        Directions(file, "other")
    refused = [("gated", {}), ("standard", {"normalize_activations": "layer_norm"}), ("topk", {"k": None})]
    refused += [("standard", {"activation_fn_str": "topk"}), ("standard", {"finetuning_scaling_factor": True})]
    for architecture, more in refused:
        autoencoder(tmp_path / "sae", architecture, **more)
        with pytest.raises(ConfigError, match="expected standard, topk, jumprelu, reading activations as they are"):
            Features(str(tmp_path / "sae"))
    with pytest.raises(ConfigError, match="isn't the folder of a sparse autoencoder"):
        Features(str(tmp_path))
