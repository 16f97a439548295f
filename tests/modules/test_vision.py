import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lightning_ablate import ImageClassifier
from lightning_ablate.errors import TargetError
from tests import reference, tiny


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory):
    from timm.models import save_for_hf

    folder = tmp_path_factory.mktemp("timm")
    save_for_hf(tiny.vit(), str(folder), model_args=tiny.VIT, safe_serialization=True)
    return str(folder)


@pytest.fixture(scope="module")
def transformers_folder(tmp_path_factory):
    from transformers import ViTImageProcessor

    folder = tmp_path_factory.mktemp("transformers")
    sizes = {**tiny.SMALL, "intermediate_size": 32, "image_size": 8, "patch_size": 4, "num_labels": 7}
    tiny.made(5, "ViTForImageClassification", "ViTConfig", **sizes).save_pretrained(folder)
    size = {"height": 8, "width": 8}
    ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(folder)
    return str(folder)


def picture(mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def batch(module):
    image = picture("L" if module.library == "timm" else "RGB")
    return {"pixel_values": module.transform(image)[None], "label": torch.zeros(1).long(), "index": torch.arange(1)}


LIBRARIES = {"timm": ("L", 0.4, 0.2), "transformers": ("RGB", 0.5, 0.25)}  # the mode, mean and sd of their pictures


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_folder_loads_with_its_weights_and_preprocessing(library, request):
    module = tiny.built(ImageClassifier(request.getfixturevalue(f"{library}_folder")))
    mode, mean, std = LIBRARIES[library]
    assert module.library == library
    one = batch(module)
    levels = torch.from_numpy(np.array(picture(mode))).float().view(8, 8, -1)
    torch.testing.assert_close(one["pixel_values"][0], (levels.permute(2, 0, 1) / 255 - mean) / std)
    with torch.no_grad():
        expected = reference.forward(tiny.vit() if library == "timm" else module.target, one)
        torch.testing.assert_close(module.evaluate(one).logits, expected)


@pytest.mark.parametrize("library", LIBRARIES)
def test_source_is_random_pixels_preprocessed(library, request):
    module = tiny.built(ImageClassifier(request.getfixturevalue(f"{library}_folder")))
    _, mean, std = LIBRARIES[library]
    like = batch(module)
    made, again, other = (module.source("pixels", seed, like)["pixel_values"] for seed in (42, 42, 123))
    assert made.shape == like["pixel_values"].shape
    assert torch.equal(made, again) and not torch.equal(made, other)
    levels = made * std + mean
    assert 0 <= levels.min() < 0.1 and 0.9 < levels.max() <= 1.0001


def test_dtype_is_an_option(timm_folder):
    module = tiny.built(ImageClassifier(timm_folder, dtype="bfloat16"))
    assert module.evaluate(batch(module)).logits.dtype == torch.bfloat16
    assert module.describe()["dtype"] == "bfloat16"


def test_the_name_tells_the_library():
    names = ["vit_base_patch16_224", "timm/vit_base_patch16_224.augreg_in21k_ft_in1k", "google/vit-base-patch16-224"]
    names.append(f"hf-hub:{names[1]}")
    assert [ImageClassifier(name).library for name in names] == ["timm", "timm", "transformers", "timm"]


@pytest.mark.parametrize("name", ["some/typo", "vit_of_no_kind", "timm/some-typo"])
def test_a_name_that_does_not_load_is_one_error(name):
    with pytest.raises(TargetError, match=f"could not load '{name}'"):
        ImageClassifier(name).configure_model()


def test_probes_differ_in_one_pixel_inside_one_patch_and_hidden_gives_the_tokens_last():
    import timm

    module = ImageClassifier("swinv2_cr_tiny_224")
    options = {"img_size": 64, "embed_dim": 32, "depths": (2, 2), "num_heads": (4, 4), "window_size": 8}
    module.target = timm.create_model("swinv2_cr_tiny_224", **options).eval()  # gives features before height and width
    first, second = module.probes({"pixel_values": torch.zeros(2, 3, 64, 64), "index": torch.arange(2)})
    changed = (first["pixel_values"] != second["pixel_values"]).any(1).nonzero().tolist()
    assert changed == [[0, 33, 33]] and first["pixel_values"].shape[0] == 1
    with torch.no_grad():
        (tokens,) = module.hidden(first)
        assert tokens.shape == (1, 8, 8, 64) and module.target.num_features == 64
        torch.testing.assert_close(tokens.movedim(-1, 1), module.target.forward_features(first["pixel_values"]))


def test_a_timm_targets_class_names_come_from_its_configuration(timm_folder, tmp_path):
    import timm

    assert ImageClassifier(timm_folder).class_names is None
    names = [f"kind {number}" for number in range(10)]
    for nested in (False, True):
        config = json.loads((Path(timm_folder) / "config.json").read_text())
        (config["pretrained_cfg"] if nested else config)["label_names"] = names
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "model.safetensors").write_bytes((Path(timm_folder) / "model.safetensors").read_bytes())
        module = ImageClassifier(str(tmp_path))
        assert module.class_names == names == tiny.built(module).class_names
    assert ImageClassifier("vit_tiny_patch16_224").class_names is None
    given = timm.create_model("vit_tiny_patch16_224", pretrained_cfg={"label_names": names}, **tiny.VIT)
    assert ImageClassifier.of(given).class_names == names


def test_a_timm_head_that_the_checkpoint_lacks_is_refused(timm_folder, tmp_path):
    weights = load_file(Path(timm_folder) / "model.safetensors")
    save_file({name: one for name, one in weights.items() if name != "head.bias"}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((Path(timm_folder) / "config.json").read_text())
    with pytest.raises(TargetError, match='Missing key.*"head.bias"'):
        tiny.built(ImageClassifier(str(tmp_path)))


def test_a_transformers_target_of_one_channel_takes_grey_images(tmp_path):
    from transformers import ViTImageProcessor

    sizes = {**tiny.SMALL, "intermediate_size": 32, "image_size": 8, "patch_size": 4, "num_labels": 7}
    tiny.made(5, "ViTForImageClassification", "ViTConfig", **sizes, num_channels=1).save_pretrained(tmp_path)
    size = {"height": 8, "width": 8}
    ViTImageProcessor(size=size, image_mean=[0.5], image_std=[0.25]).save_pretrained(tmp_path)
    module = tiny.built(ImageClassifier(str(tmp_path)))
    levels = torch.from_numpy(np.array(picture("L"))).float()[None]
    for image in (picture("L"), picture("L").convert("RGB")):
        torch.testing.assert_close(module.transform(image), (levels / 255 - 0.5) / 0.25)
    with pytest.raises(ValueError, match=r"mode RGB can't be given to a target of 1 channels .* \(--data.mode L\)"):
        module.transform(picture())
