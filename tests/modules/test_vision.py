import numpy as np
import pytest
import torch
from PIL import Image

from lightning_ablate import ImageClassifier
from lightning_ablate.errors import TargetError
from tests import tiny


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory):
    from timm.models import save_for_hf

    folder = tmp_path_factory.mktemp("timm")
    save_for_hf(tiny.vit(), str(folder), model_args=tiny.VIT, safe_serialization=True)
    return str(folder)


@pytest.fixture(scope="module")
def transformers_folder(tmp_path_factory):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    folder = tmp_path_factory.mktemp("transformers")
    torch.manual_seed(5)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_labels=7,
    )
    ViTForImageClassification(config).eval().save_pretrained(folder)
    size = {"height": 8, "width": 8}
    ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(folder)
    return str(folder)


def built(name, **options):
    module = ImageClassifier(name, **options)
    module.configure_model()
    return module


def picture(mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def batch(pixels):
    return {"pixel_values": pixels, "label": torch.arange(len(pixels)), "index": torch.arange(len(pixels))}


@pytest.mark.parametrize(
    ("library", "mode", "mean", "std"), [("timm", "L", 0.4, 0.2), ("transformers", "RGB", 0.5, 0.25)]
)
def test_a_folder_loads_with_its_weights_and_preprocessing(library, mode, mean, std, request):
    module = built(request.getfixturevalue(f"{library}_folder"))
    assert module.library == library
    pixels = module.transform(picture())
    levels = torch.from_numpy(np.array(picture(mode))).float().view(8, 8, -1)
    torch.testing.assert_close(pixels, (levels.permute(2, 0, 1) / 255 - mean) / std)
    with torch.no_grad():
        expected = tiny.vit()(pixels[None]) if library == "timm" else module.target(pixels[None]).logits
        torch.testing.assert_close(module.evaluate(batch(pixels[None])).logits, expected)


@pytest.mark.parametrize("which", ["timm_folder", "transformers_folder"])
def test_source_is_random_pixels_preprocessed(which, request):
    module = built(request.getfixturevalue(which))
    like = batch(module.transform(picture())[None])
    made = module.source("pixels", 42, like)["pixel_values"]
    assert made.shape == like["pixel_values"].shape
    again, other = (module.source("pixels", seed, like)["pixel_values"] for seed in (42, 123))
    assert torch.equal(made, again) and not torch.equal(made, other)
    mean, std = (0.4, 0.2) if which == "timm_folder" else (0.5, 0.25)
    levels = made * std + mean
    assert 0 <= levels.min() < 0.1 and 0.9 < levels.max() <= 1.0001


def test_dtype_is_an_option(timm_folder):
    module = built(timm_folder, dtype="bfloat16")
    assert module.evaluate(batch(module.transform(picture())[None])).logits.dtype == torch.bfloat16
    assert module.describe()["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("vit_base_patch16_224", "timm"),
        ("timm/vit_base_patch16_224.augreg_in21k_ft_in1k", "timm"),
        ("hf-hub:timm/vit_base_patch16_224.augreg_in21k_ft_in1k", "timm"),
        ("google/vit-base-patch16-224", "transformers"),
    ],
)
def test_the_name_tells_the_library(name, library):
    assert ImageClassifier(name).library == library


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
